"""Every family, and every layout of a model directory, is trained for a step and exported."""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from jax.experimental.compilation_cache import compilation_cache

from atlas_jax import preflight
from atlas_jax.checkpoint import hf
from atlas_jax.config import SFTConfig
from atlas_jax.recipes import sft
from atlas_jax.sharding import to_global
from atlas_jax.startup.compute import Compute
from atlas_jax.startup.model import export, open_model
from tests import tiny
from tests.test_vocabulary import sentencepiece_directory
from tests.tokenizers import CHATML, chatml_tokenizer

ROWS = tiny.batch([[14], [11, 5]], width=16)
FAMILY = "smollm2"
QUICK = {"xla_backend_optimization_level": 0}  # programs that run twice
PROGRAMS = {}
"""Architecture -> its compiled step, which the layouts of one share."""


@pytest.fixture(autouse=True, scope="module")
def small_programs_are_compiled_once(tmp_path_factory):
    """Loading compiles a few anew for each model."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (str(tmp_path_factory.mktemp("xla")), 0.0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def compiled(compute, decoder, state, rows):
    """Returns the step of SFT, whose metrics have the logits too."""
    key = repr((decoder.config, decoder.shapes))
    if key not in PROGRAMS:
        loss = sft.make_loss(decoder, compute.config.loss_chunk_size)

        def with_logits(params, batch):
            hidden = decoder.hidden(params, batch.tokens, batch.positions, batch.segment_ids)
            logits = hidden @ decoder.output_table(params).T
            found, metrics = loss(params, batch)
            return found, metrics | {"logits": (logits, 1.0)}

        optimizer = compute.optimizer(decoder, 1)
        train = compute.train_step(with_logits, decoder, optimizer)
        PROGRAMS[key] = train.whole.lower(state, rows, None).compile(compiler_options=QUICK)
    return PROGRAMS[key]


def train_and_export(path, output, **options):
    """Checks a model, trains it for a step and exports it, as a run of SFT does on one device.

    Returns:
        The directory of the export, and its logits as the trainer computes them.
    """
    config = SFTConfig(
        model_name_or_path=str(path), output_dir=str(output), learning_rate=1e-2, max_steps=1,
        warmup_ratio=0.0, lr_scheduler_type="constant", gradient_checkpointing="none",
        max_seq_length=16, **options,
    )  # fmt: skip
    preflight.check_models(config)
    compute = Compute.of(config, jax.devices()[:1])
    model = open_model(compute)
    optimizer = compute.optimizer(model.decoder, 1)
    rows = to_global(ROWS, compute.sharding, 1)
    params = hf.load(model.source, model.decoder)
    before = jax.tree.map(np.array, params)
    state = compute.state(params, optimizer)
    train = compiled(compute, model.decoder, state, rows)
    state, metrics = train(state, rows, None)
    assert np.isfinite(metrics["loss/total"][0])
    final = export(config, model, state.params)
    stored = hf.load(hf.open_source(final), model.decoder)
    for old, new, after in zip(*map(jax.tree.leaves, (before, state.params, stored)), strict=True):
        assert np.abs(np.asarray(new) - old).max() > 1e-3
        np.testing.assert_allclose(after, new, atol=2e-2)  # what is stored may be rounded
    _, metrics = train(state._replace(params=stored), rows, None)
    return final, np.asarray(metrics["logits"][0])


def assert_transformers_agrees(final, logits):
    """Loads an export in transformers, and compares logits."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        final, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        for row in range(len(ROWS.tokens)):
            at = ROWS.segment_ids[row] == 1
            tokens = torch.tensor(ROWS.tokens[row][at][None], dtype=torch.long)
            np.testing.assert_allclose(logits[row][at], model(tokens).logits[0].numpy(), atol=2e-4)
    assert transformers.AutoTokenizer.from_pretrained(final).is_fast
    return model


def save(directory, family=FAMILY, tokenizer=None, **options):
    path = tiny.save(family, directory, **options)
    (tokenizer or chatml_tokenizer()).save_pretrained(path)
    return path


def edit(file, **changes):
    """Changes keys of a JSON file; None removes one."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def tensors(directory, change):
    """Changes the tensors of a whole file."""
    file = directory / "model.safetensors"
    content = safetensors.numpy.load_file(file)
    change(content)
    safetensors.numpy.save_file(content, file, metadata={"format": "pt"})


def stored_head(dtype):
    return lambda d: tensors(d, lambda t: t.update(
        {"lm_head.weight": t["model.embed_tokens.weight"].astype(dtype)}))  # fmt: skip


def without_generation_config(**config):
    def change(directory):
        (directory / "generation_config.json").unlink()
        edit(directory / "config.json", **config)

    return change


def beside(name):
    return lambda d: safetensors.numpy.save_file({"x": np.zeros(3, np.float32)}, d / name)


def stale_index(directory):
    content = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(content))


def linked(directory):
    """Leaves links, as the cache of the hub does."""
    blobs = directory.parent / "blobs"
    blobs.mkdir()
    for file in list(directory.iterdir()):
        file.rename(blobs / file.name)
        file.symlink_to(blobs / file.name)


def old_template(directory):
    (directory / "chat_template.jinja").unlink()
    edit(directory / "tokenizer_config.json", chat_template=CHATML)


def more_tokens(*names):
    tokenizer = chatml_tokenizer()
    tokenizer.add_tokens(list(names))
    return tokenizer


def sentencepiece_alone(directory):
    for file in directory.glob("*token*"):
        file.unlink()
    sentencepiece_directory(directory.parent / "pieces", "llama")
    shutil.copy(directory.parent / "pieces" / "tokenizer.model", directory)


NORM, INV_FREQ = "model.norm.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"
LAYOUTS = {
    "float32": {},
    "bfloat16": dict(dtype=torch.bfloat16),
    "float16": dict(dtype=torch.float16),
    "sharded": dict(max_shard_size="100KB"),
    "tied head stored": dict(change=stored_head("float32")),
    "tied head stored otherwise": dict(change=stored_head("float32"), dtype=torch.bfloat16),
    "list of eos": dict(
        change=lambda d: edit(d / "generation_config.json", eos_token_id=[2, 0])),
    "eos in config": dict(change=without_generation_config(eos_token_id=2)),
    "list of eos in config": dict(change=without_generation_config(eos_token_id=[2, 0])),
    "no eos": dict(change=without_generation_config(eos_token_id=None)),
    "greedy with temperature": dict(change=lambda d: edit(
        d / "generation_config.json", do_sample=False, temperature=0.6)),
    "inv_freq": dict(change=lambda d: tensors(
        d, lambda t: t.update({INV_FREQ: np.ones(8, np.float32)}))),
    "mixed dtypes": dict(dtype=torch.bfloat16, change=lambda d: tensors(
        d, lambda t: t.update({NORM: t[NORM].astype("float32")}))),
    "config lies": dict(change=lambda d: edit(d / "config.json", dtype="bfloat16")),
    "no dtype": dict(dtype=torch.bfloat16, change=lambda d: edit(d / "config.json", dtype=None)),
    "torch_dtype": dict(change=lambda d: edit(
        d / "config.json", dtype=None, torch_dtype="float32")),
    "consolidated beside": dict(change=beside("consolidated.safetensors")),
    "optimizer beside": dict(change=beside("optimizer.safetensors")),
    "second copy": dict(change=lambda d: shutil.copy(
        d / "model.safetensors", d / "model_old.safetensors")),
    "stale index": dict(change=stale_index),
    "shards without index": dict(max_shard_size="100KB", change=lambda d: (
        d / "model.safetensors.index.json").unlink()),
    "links": dict(change=linked),
    "folder of checkpoints": dict(change=lambda d: (d / "checkpoints").mkdir()),
    "named as a checkpoint": dict(at="checkpoints/500"),
    "trailing slash": dict(at="model/"),
    "several templates": dict(
        tokenizer=chatml_tokenizer({"default": CHATML, "tool_use": CHATML + "{# tools #}"})),
    "template in tokenizer_config": dict(change=old_template),
    "added tokens": dict(tokenizer=more_tokens("<image>", "<pad>")),
    "sentencepiece": dict(change=sentencepiece_alone),
    "one shard lost": dict(max_shard_size="100KB", change=lambda d: next(
        d.glob("model-00002*")).unlink(), refused="named in the index but does not exist"),
    "tied heads differ": dict(change=lambda d: tensors(d, lambda t: t.update(
        {"lm_head.weight": np.ones((400, 64), np.float32)})), refused=r"lm_head\.weight differs"),
    "only the head of a tied pair": dict(change=lambda d: tensors(d, lambda t: t.update(
        {"lm_head.weight": t.pop("model.embed_tokens.weight")})),
        refused=r"missing model\.embed_tokens\.weight"),
    "no prefix": dict(change=lambda d: tensors(d, lambda t: [t.update(
        {name.removeprefix("model."): t.pop(name)}) for name in list(t)]),
        refused=r"missing model\.embed_tokens\.weight"),
    "another prefix": dict(change=lambda d: tensors(d, lambda t: [t.update(
        {f"language_model.{name}": t.pop(name)}) for name in list(t)]),
        refused=r"unknown language_model\.model\."),
    "head of a reward model": dict(change=lambda d: tensors(d, lambda t: t.update(
        {"score.weight": np.zeros((1, 64), np.float32)})), refused=r"unknown score\.weight"),
    "float64": dict(change=lambda d: tensors(d, lambda t: t.update(
        {NORM: t[NORM].astype("float64")})), refused="has dtype F64; supported are BF16"),
    "quantised": dict(change=lambda d: edit(
        d / "config.json", quantization_config={"quant_method": "gptq"}),
        refused=r"is quantised \(gptq\)"),
    "adapter beside": dict(change=lambda d: (d / "adapter_config.json").write_text("{}"),
        refused="holds a LoRA adapter"),
}  # fmt: skip


@pytest.mark.parametrize("case", [*tiny.FAMILIES, *LAYOUTS])
def test_every_family_and_every_layout_trains_and_is_exported(case, tmp_path):
    asked = {"family": case} if case in tiny.FAMILIES else dict(LAYOUTS[case])
    change, refused = asked.pop("change", None), asked.pop("refused", "")
    place = asked.pop("at", "model")
    path = tmp_path / place
    save(path, **asked)
    if change:
        change(path)
    if refused:
        with pytest.raises(ValueError, match=refused):
            train_and_export(path, tmp_path / "run")
        return
    before = transformers.AutoTokenizer.from_pretrained(path)
    final, logits = train_and_export(f"{tmp_path}/{place}", tmp_path / "run")
    model = assert_transformers_agrees(final, logits)
    after = transformers.AutoTokenizer.from_pretrained(final)
    assert after("It is four.").input_ids == before("It is four.").input_ids
    assert after.chat_template == before.chat_template
    if case != "shards without index":  # which transformers does not open
        source = transformers.AutoModelForCausalLM.from_pretrained(path)
        assert model.generation_config.eos_token_id == source.generation_config.eos_token_id
