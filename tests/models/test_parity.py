"""The decoder computes what transformers computes."""

import jax
import numpy as np
import pytest
import torch
import transformers

from atlas_jax.checkpoint import gguf, hf, names
from atlas_jax.config import MeshConfig
from atlas_jax.models import attention
from atlas_jax.models.config import from_hf
from atlas_jax.sharding import make_mesh
from tests import tiny
from tests.assets import smollm2_gguf

ONE = jax.devices()[:1]


def hf_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens)[None], dtype=torch.long)).logits[0].numpy()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logits_equal_transformers_padded_and_packed(family, tmp_path):
    decoder, params = tiny.load(tiny.save(family, tmp_path), devices=ONE)
    rows = tiny.batch([[23], [11, 13], [4, 5, 9]], width=28)
    ours = jax.jit(lambda p: our_logits(decoder, p, rows))(params)
    for row in range(3):
        for segment in range(1, rows.segment_ids[row].max() + 1):
            at = rows.segment_ids[row] == segment
            expected = hf_logits(tiny.hf_model(family), rows.tokens[row][at])
            np.testing.assert_allclose(np.asarray(ours[row])[at], expected, atol=1e-4)


def our_logits(decoder, params, rows):
    return tiny.hidden(decoder, params, rows) @ decoder.output_table(params).T


@pytest.mark.parametrize("family", ["llama3.1", "qwen2", "qwen3", "gemma3", *tiny.ADDED])
def test_gradients_equal_torch(family, tmp_path):
    decoder, params = tiny.load(tiny.save(family, tmp_path), devices=ONE, remat="full")
    rows = tiny.batch([[21], [17]], width=21)
    grads = jax.jit(jax.grad(lambda p: tiny.loss_sum(decoder, p, rows)))(params)
    model = tiny.hf_model(family)
    model.zero_grad()
    for row, length in enumerate((21, 17)):
        tokens = torch.tensor(rows.tokens[row, :length][None], dtype=torch.long)
        logprobs = model(tokens).logits[0, :-1].log_softmax(-1)
        (-logprobs.gather(1, tokens[0, 1:, None]).sum()).backward()
    expected = {k: p.grad.numpy() for k, p in model.named_parameters()}
    for entry in names.entries(decoder.config):
        values = [np.asarray(names.leaf(grads, path)) for path in entry.paths]
        for i, name in enumerate(names.hf_names(entry, decoder.config)):
            found = names.to_hf(entry, [x[i] if entry.per_layer else x for x in values])
            scale = np.abs(expected[name]).max()
            np.testing.assert_allclose(found / scale, expected[name] / scale, atol=1e-4)


def test_smollm2_logits_equal_transformers():
    path = smollm2_gguf()
    source = gguf.GGUFSource(str(path))
    decoder, params = tiny.decoder_and_params(from_hf(source.config), source, devices=ONE)
    tokenizer = gguf.load_tokenizer(str(path))
    tokens = np.asarray(tokenizer("A good teacher asks what 17 + 25 is, and waits.").input_ids)
    size = len(tokens)
    rows = tiny.batch([[size]], width=size)._replace(tokens=tokens[None].astype(np.int32))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    ours = jax.jit(lambda p: our_logits(decoder, p, rows))(params)
    np.testing.assert_allclose(np.asarray(ours[0]), hf_logits(model, tokens), atol=1e-4)


@pytest.mark.parametrize("name", ["cudnn", "splash"])
def test_attention_of_another_device_is_refused(name):
    mesh = make_mesh(MeshConfig(fsdp=1), ONE)
    with pytest.raises(ValueError, match="use 'auto' or 'xla'"):
        attention.select(name, mesh, packed=False, dtype=np.dtype("float32"))


def test_random_parameters_have_the_shapes_of_loaded_ones(tmp_path):
    path = tiny.save("gemma3", tmp_path)
    decoder, params = tiny.load(path, devices=ONE)
    assert hf.model_files(hf.open_source(path), None).dtype == "float32"
    assert jax.tree.map(np.shape, decoder.init(0)) == jax.tree.map(np.shape, params)
