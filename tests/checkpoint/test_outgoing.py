"""Tensors on their way out: their order, their bytes, and who holds them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch

from atlas_jax import step
from atlas_jax.checkpoint import adapters, outgoing, writer
from atlas_jax.config import MeshConfig
from atlas_jax.options.train import LoraOptions
from tests import tiny


def test_a_layer_is_whole_before_the_next_one_begins(tmp_path):
    decoder, params = tiny.load(tiny.save("qwen3", tmp_path), MeshConfig(), jax.devices()[:1])
    (order,) = outgoing.order(decoder, 1)
    names = [name for name, _ in outgoing.Outgoing(params, decoder, "float32")]
    assert names == [tensor.name for tensor in order]
    assert sorted(names) == sorted(tensor.name for tensor in writer.tensors(decoder))
    layers = [int(name.split(".")[2]) for name in names if ".layers." in name]
    assert layers == sorted(layers)
    assert len(set(layers)) > 1
    assert "embed" in names[0]
    assert ".layers." not in names[-1]


def test_each_of_several_processes_sends_layers_of_its_own(tmp_path):
    decoder, _ = tiny.load(tiny.save("qwen3", tmp_path), MeshConfig(), jax.devices()[:1])
    shares = outgoing.order(decoder, 3)
    sent = [tensor.name for share in shares for tensor in share]
    assert sorted(sent) == sorted(tensor.name for tensor in writer.tensors(decoder))
    for process, share in enumerate(shares):
        layers = {int(t.name.split(".")[2]) for t in share if ".layers." in t.name}
        assert layers == set(range(process, decoder.config.num_layers, 3))


@pytest.mark.parametrize("family", ["qwen3", "phi3", "gemma3", "olmo2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_is_what_the_model_was_read_from(family, dtype, tmp_path):
    path = tiny.save(family, tmp_path / "source", getattr(torch, dtype))
    decoder, params = tiny.load(path, MeshConfig(fsdp=4, tensor=2))
    values = outgoing.Outgoing(params, decoder, dtype, keep=True)
    values.dispatch()
    jax.tree.map(lambda leaf: leaf.delete(), params)  # as a step does that donates them
    for name in ("first", "again"):
        out = tmp_path / name
        out.mkdir()
        outgoing.write_own(values, out, dtype, outgoing.order(decoder, 1), lambda: False)
        before = safetensors.numpy.load_file(tmp_path / "source" / "model.safetensors")
        after = safetensors.numpy.load_file(out / "model.safetensors")
        assert before.keys() == after.keys()
        for tensor, value in before.items():
            assert after[tensor].tobytes() == value.tobytes(), tensor


def test_what_leaves_has_the_factors_of_lora_added(tmp_path):
    path = tiny.save("qwen3", tmp_path)
    decoder, params = tiny.load(path, MeshConfig(fsdp=4, tensor=2))
    options = LoraOptions(rank=2, alpha=3.0, targets=("o_proj", "up_proj"))
    lora = adapters.factors(options, decoder.config, jnp.dtype("float32"))
    decoder = dataclasses.replace(decoder, lora=lora)
    shapes, _, placements = decoder.trained
    rng = np.random.default_rng(0)
    new = jax.tree.map(lambda s: rng.standard_normal(s.shape, np.float32), shapes)
    whole = step.joined(params, jax.device_put(new, placements))
    before = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    for name, value in outgoing.Outgoing(whole, decoder, "float32"):
        expected = before[name]
        part, _, matrix = name.removesuffix(".weight").rpartition(".")
        if matrix in options.targets:
            group = new["layers"]["attention" if "attn" in part else "mlp"][matrix[:-5]]
            a, b = (group[key][int(name.split(".")[2])] for key in ("lora_a", "lora_b"))
            added = a.reshape(-1, 2) @ b.reshape(2, -1)
            expected = expected + 3 / 2 * added.T
        np.testing.assert_allclose(value, expected, atol=1e-5)


def test_no_device_holds_more_than_its_share_of_a_tensor(tmp_path):
    """Eight devices of one process send; each copies an eighth to the host."""
    decoder, params = tiny.load(tiny.save("llama2", tmp_path), MeshConfig(fsdp=8))
    shares = []
    for block in outgoing._begin(params, decoder, "bfloat16"):
        for value in block.values:
            sizes = {shard.data.nbytes for shard in value.addressable_shards}
            assert len(sizes) == 1
            shares.append(sizes.pop() / value.nbytes)
    assert np.mean(np.asarray(shares) == 1 / 8) > 0.9
    assert len(shares) == len(writer.tensors(decoder))


def test_checksums_change_with_the_tensor_that_changes(tmp_path):
    decoder, params = tiny.load(tiny.save("llama2", tmp_path), MeshConfig(fsdp=4, tensor=2))

    def checksums(tree):
        values = outgoing.Outgoing(tree, decoder, "bfloat16")
        assert len(list(values)) == len(values.checksums)
        return values.checksums

    first = checksums(params)
    np.testing.assert_array_equal(checksums(params), first)
    layers = dict(params["layers"])
    layers["mlp"] = jax.tree.map(lambda p: p.at[1].multiply(2), layers["mlp"])
    changed = np.flatnonzero(checksums({**params, "layers": layers}) != first)
    (order,) = outgoing.order(decoder, 1)
    found = {order[i].name for i in changed}
    assert found == {f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
