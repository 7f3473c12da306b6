"""cuDNN's attention primitives on a CPU, as their documentation defines them.

What cuDNN does not write is NaN here: on a device it is whatever the memory held.
"""

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused
from jax._src.interpreters import mlir


def register():
    """Lowers the primitives on CPUs to the functions of this file."""
    for primitive, function in (
        (fused._dot_product_attention_fwd_p, forward),
        (fused._dot_product_attention_bwd_p, backward),
    ):
        lowering = mlir.lower_fun(function, multiple_results=True)
        mlir.register_lowering(primitive, lowering, platform="cpu")


def forward(q, k, v, bias, q_len, k_len, q_off, k_off, *pages, is_training, **static):
    of_q, of_k = _parts(q, q_len, q_off), _parts(k, k_len, k_off)
    scores, values = jax.vmap(lambda a, b: _scores(q, k, v, a, b, static))(of_q, of_k)
    stats = jax.nn.logsumexp(scores, axis=-1)
    out = jnp.einsum("xnts,xsnh->xtnh", jnp.exp(scores - stats[..., None]), values)
    there = jnp.arange(q.shape[1]) < of_q[1][:, None]
    return _written(out, of_q, q), jnp.where(there[:, None], stats, jnp.nan)


def backward(q, k, v, bias, q_len, k_len, q_off, k_off, pk, pv, stats, out, gradient, **static):
    of_q, of_k = _parts(q, q_len, q_off), _parts(k, k_len, k_off)
    scores, values = jax.vmap(lambda a, b: _scores(q, k, v, a, b, static))(of_q, of_k)
    there = (jnp.arange(q.shape[1]) < of_q[1][:, None])[:, None, :, None]
    weights = jnp.where(there, jnp.exp(scores - stats[..., None]), 0.0)
    do, o = (jax.vmap(lambda a, x=x: _taken(x, a))(of_q) for x in (gradient, out))
    of_weights = jnp.einsum("xtnh,xsnh->xnts", do, values)
    mean = jnp.swapaxes((do * o).sum(-1), 1, 2)[..., None]
    ds = jnp.where(there & (weights > 0), weights * (of_weights - mean), 0.0) * static["scale"]
    queries = jax.vmap(lambda a: _taken(q, a))(of_q)
    keys = jax.vmap(lambda a: _repeated(_taken(k, a), q))(of_k)
    dk = _summed(jnp.einsum("xnts,xtnh->xsnh", ds, queries), k)
    dv = _summed(jnp.einsum("xnts,xtnh->xsnh", weights, jnp.where(_rows(there), do, 0.0)), v)
    dq = jnp.einsum("xnts,xsnh->xtnh", ds, keys)
    return _written(dq, of_q, q), _written(dk, of_k, k), _written(dv, of_k, v)


def _rows(there):
    return jnp.swapaxes(there, 1, 2)


def _parts(x, lengths, offsets):
    """Returns first tokens and lengths of all segments."""
    rows, length, heads, size = x.shape
    if offsets.ndim == 2:
        return offsets.reshape(-1)[: lengths.size] // (heads * size), lengths.reshape(-1)
    whole = jnp.full(rows, length, jnp.int32)
    return jnp.arange(rows) * length, lengths if lengths.shape == (rows,) else whole


def _taken(x, part):
    flat = x.reshape(-1, *x.shape[2:])
    return flat[jnp.minimum(part[0] + jnp.arange(x.shape[1]), len(flat) - 1)]


def _repeated(x, q):
    return jnp.repeat(x, q.shape[2] // x.shape[1], axis=1)


def _summed(x, like):
    return x.reshape(*x.shape[:2], like.shape[2], -1, x.shape[-1]).sum(3)


def _scores(q, k, v, of_q, of_k, static):
    queries, keys, values = _taken(q, of_q), _taken(k, of_k), _taken(v, of_k)
    scores = jnp.einsum("tnh,snh->nts", queries, _repeated(keys, q)) * static["scale"]
    t, s = jnp.arange(q.shape[1])[:, None], jnp.arange(k.shape[1])[None]
    seen = s < of_k[1]
    if static["mask_type"] in (fused.MaskType.CAUSAL, fused.MaskType.PADDING_CAUSAL):
        seen &= (s <= t) & (t - s < (static["sliding_window_length"] or q.shape[1]))
    return jnp.where(seen, scores, -jnp.inf), _repeated(values, q)


def _written(x, parts, like):
    """Puts the parts where they belong; the rest is NaN."""
    place = jnp.arange(like.shape[1])
    flat = jnp.full((like.shape[0] * like.shape[1], *like.shape[2:]), jnp.nan)
    index = jnp.where(place < parts[1][:, None], parts[0][:, None] + place, len(flat))
    return flat.at[index].set(x, mode="drop").reshape(like.shape)
