"""GGUF files: tensors, configs and refusals."""

from __future__ import annotations

import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from atlas_jax.checkpoint.gguf import GGUFSource, load_tokenizer
from tests import assets
from tests.gguf_files import embedding, model_metadata, write_gguf


def _transformers_tensors(path: Path) -> dict[str, np.ndarray]:
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return tensors


def test_smollm2_tensors_equal_those_of_transformers() -> None:
    path = assets.smollm2_gguf()
    expected = _transformers_tensors(path)
    source = GGUFSource(str(path))
    assert source.shapes == {name: tensor.shape for name, tensor in expected.items()}
    for name, tensor in expected.items():
        assert np.array_equal(source.read(name), tensor), name


def test_smollm2_config_is_the_published_one() -> None:
    source = GGUFSource(str(assets.smollm2_gguf()))
    assert source.config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "rope_scaling": None,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    assert source.generation_config == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_every_tensor_of_an_architecture_is_read_as_by_transformers(
    tmp_path: Path, arch: str
) -> None:
    shapes = {
        "token_embd.weight": (5, 256), "output_norm.weight": (256,), "output.weight": (5, 256),
        "blk.0.attn_norm.weight": (256,), "blk.0.ffn_norm.weight": (256,),
        "blk.0.attn_q.weight": (256, 256), "blk.0.attn_k.weight": (128, 256),
        "blk.0.attn_v.weight": (128, 256), "blk.0.attn_output.weight": (256, 256),
        "blk.0.ffn_gate.weight": (32, 256), "blk.0.ffn_up.weight": (32, 256),
        "blk.0.ffn_down.weight": (256, 32),
    }  # fmt: skip
    if arch == "qwen2":
        shapes |= {"blk.0.attn_q.bias": (256,), "blk.0.attn_k.bias": (128,)}
        shapes |= {"blk.0.attn_v.bias": (128,)}
    if arch == "qwen3":
        shapes |= {"blk.0.attn_q_norm.weight": (128,), "blk.0.attn_k_norm.weight": (128,)}
    rng = np.random.default_rng(0)
    tensors = {n: rng.standard_normal(s, dtype=np.float32) for n, s in shapes.items()}
    metadata = model_metadata(arch, vocab_size=5, rope__freq_base=10000.0)
    path = write_gguf(tmp_path / "m.gguf", metadata, tensors)
    source, expected = GGUFSource(path), _transformers_tensors(Path(path))
    assert source.config["tie_word_embeddings"] is False
    assert source.shapes == {name: tensor.shape for name, tensor in expected.items()}
    for name, tensor in expected.items():
        assert np.array_equal(source.read(name), tensor), name


def test_query_rows_of_llama_are_put_back_in_halves(tmp_path: Path) -> None:
    # Two heads of 4 dims. llama.cpp stores dims 0 2 1 3, so that rotated pairs are neighbours.
    stored = np.array([0, 2, 1, 3, 10, 12, 11, 13], np.float32)
    matrix = np.repeat(stored[:, None], 8, axis=1)
    sizes = {"embedding_length": 8, "attention.head_count": 2, "attention.head_count_kv": 2}
    tensors = {"token_embd.weight": np.zeros((3, 8), np.float32), "blk.0.attn_q.weight": matrix}
    llama = write_gguf(tmp_path / "l.gguf", model_metadata(**sizes), tensors)
    qwen = write_gguf(tmp_path / "q.gguf", model_metadata("qwen2", **sizes), tensors)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert GGUFSource(llama).read(name)[:, 0].tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
    assert GGUFSource(qwen).read(name)[:, 0].tolist() == stored.tolist()


def _half(rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(-2, 2, 1).astype(np.float16)


def _q8_0(rng: np.random.Generator) -> tuple[bytes, list[float]]:
    scale, codes = _half(rng), rng.integers(-128, 128, 32, np.int8)
    return scale.tobytes() + codes.tobytes(), [float(scale[0]) * int(c) for c in codes]


def _nibbles(rng: np.random.Generator) -> tuple[np.ndarray, list[int]]:
    packed = rng.integers(0, 256, 16, np.uint8)
    return packed, [int(b) & 15 for b in packed] + [int(b) >> 4 for b in packed]


def _q4_0(rng: np.random.Generator) -> tuple[bytes, list[float]]:
    scale, (packed, codes) = _half(rng), _nibbles(rng)
    return scale.tobytes() + packed.tobytes(), [float(scale[0]) * (c - 8) for c in codes]


def _q4_1(rng: np.random.Generator) -> tuple[bytes, list[float]]:
    scale, low, (packed, codes) = _half(rng), _half(rng), _nibbles(rng)
    values = [float(scale[0]) * c + float(low[0]) for c in codes]
    return scale.tobytes() + low.tobytes() + packed.tobytes(), values


def _q4_k(rng: np.random.Generator) -> tuple[bytes, list[float]]:
    """Eight groups of 32, each with a 6-bit scale and a 6-bit minimum packed in 12 bytes."""
    scale, low = _half(rng), _half(rng)
    scales, minima = rng.integers(0, 64, 8).tolist(), rng.integers(0, 64, 8).tolist()
    codes = rng.integers(0, 16, 256).tolist()
    packed = [scales[j] | scales[j + 4] >> 4 << 6 for j in range(4)]
    packed += [minima[j] | minima[j + 4] >> 4 << 6 for j in range(4)]
    packed += [scales[j] & 15 | (minima[j] & 15) << 4 for j in range(4, 8)]
    bits = [codes[64 * j + i] | codes[64 * j + 32 + i] << 4 for j in range(4) for i in range(32)]
    d, m = float(scale[0]), float(low[0])
    values = [d * scales[i // 32] * c - m * minima[i // 32] for i, c in enumerate(codes)]
    return scale.tobytes() + low.tobytes() + bytes(packed) + bytes(bits), values


def _q6_k(rng: np.random.Generator) -> tuple[bytes, list[float]]:
    """Sixteen groups of 16 with an 8-bit scale; 4 low and 2 high bits of a code lie apart."""
    scale, scales = _half(rng), rng.integers(-128, 128, 16, np.int8)
    codes = rng.integers(0, 64, 256).tolist()
    low, high = [0] * 128, [0] * 64
    for i, code in enumerate(codes):
        half, quarter, place = i // 128, i % 128 // 32, i % 32
        low[64 * half + 32 * (quarter % 2) + place] |= (code & 15) << 4 * (quarter // 2)
        high[32 * half + place] |= (code >> 4) << 2 * quarter
    values = [float(scale[0]) * int(scales[i // 16]) * (c - 32) for i, c in enumerate(codes)]
    return bytes(low) + bytes(high) + scales.tobytes() + scale.tobytes(), values


_BLOCKS = {"Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1, "Q4_K": _q4_k, "Q6_K": _q6_k}


@pytest.mark.parametrize("kind", _BLOCKS)
def test_quantised_blocks_hold_the_values_they_were_packed_from(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(1)
    rows, expected = [], []
    for _ in range(3):
        blocks = [_BLOCKS[kind](rng) for _ in range(2)]
        rows.append(b"".join(data for data, _ in blocks))
        expected.append([value for _, values in blocks for value in values])
    data = np.frombuffer(b"".join(rows), np.uint8).reshape(3, -1)
    metadata = model_metadata(embedding_length=len(expected[0]))
    path = write_gguf(tmp_path / "m.gguf", metadata, {"token_embd.weight": (data, kind)})
    source = GGUFSource(path)
    values = source.read("model.embed_tokens.weight")
    assert values.dtype == np.float32
    assert values.shape == source.shapes["model.embed_tokens.weight"] == (3, len(expected[0]))
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-4)
    assert source.config["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("F32", np.float32), ("F16", np.float16), ("BF16", ml_dtypes.bfloat16)],
)
def test_plain_tensors_keep_dtype_and_bits(tmp_path: Path, kind: str, dtype: type) -> None:
    values = np.random.default_rng(2).standard_normal((3, 256)).astype(dtype)
    stored = (values.view(np.uint8), kind) if kind == "BF16" else values
    path = write_gguf(tmp_path / "m.gguf", model_metadata(), {"token_embd.weight": stored})
    source = GGUFSource(path)
    read = source.read("model.embed_tokens.weight")
    assert read.dtype == values.dtype
    assert read.tobytes() == values.tobytes()
    assert not isinstance(read, np.memmap)
    assert source.config["dtype"] == np.dtype(dtype).name


def test_all_ends_of_generation_are_known(tmp_path: Path) -> None:
    ids = {"bos": 0, "eos": 1, "eot": 2, "eom": 1}
    metadata = model_metadata() | {f"tokenizer.ggml.{k}_token_id": v for k, v in ids.items()}
    source = GGUFSource(write_gguf(tmp_path / "m.gguf", metadata, embedding()))
    assert source.generation_config == {"bos_token_id": 0, "eos_token_id": [1, 2]}
    assert source.config["eos_token_id"] == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, None),
        ({"type": "none"}, None),
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"type": "yarn", "factor": 2.0, "original_context_length": 32},
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
        ),
    ],
)
def test_rope_scaling_is_translated(tmp_path: Path, options: dict, expected: dict | None) -> None:
    metadata = model_metadata(**{f"rope.scaling.{k}": v for k, v in options.items()})
    source = GGUFSource(write_gguf(tmp_path / "m.gguf", metadata, embedding()))
    assert source.config["rope_scaling"] == expected


def _llama3_factors(factor: float, low: float, high: float) -> np.ndarray:
    """What llama.cpp's conversion writes for 128 dims, base 500000 and 8192 positions."""
    factors = []
    for i in range(0, 128, 2):
        wavelength = 2 * math.pi * 500000 ** (i / 128)
        smooth = (8192 / wavelength - low) / (high - low)
        if wavelength < 8192 / high:
            factors.append(1.0)
        elif wavelength > 8192 / low:
            factors.append(factor)
        else:
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recovered_from_its_factors(tmp_path: Path, factor: float) -> None:
    tensors = embedding() | {"rope_freqs.weight": _llama3_factors(factor, 1, 4)}
    metadata = model_metadata(rope__freq_base=500000.0)
    source = GGUFSource(write_gguf(tmp_path / "m.gguf", metadata, tensors))
    assert source.config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert list(source.shapes) == ["model.embed_tokens.weight"]


def test_other_rope_factors_are_refused(tmp_path: Path) -> None:
    tensors = embedding() | {"rope_freqs.weight": _llama3_factors(8.0, 1, 3)}
    path = write_gguf(tmp_path / "m.gguf", model_metadata(rope__freq_base=500000.0), tensors)
    with pytest.raises(ValueError, match=r"rope_freqs\.weight is not Llama 3 scaling"):
        GGUFSource(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (model_metadata("mamba"), "architecture 'mamba' is not supported.*llama, qwen2, qwen3"),
        (model_metadata(expert_count=8), "option llama.expert_count = 8"),
        (model_metadata(attention__sliding_window=16), "llama.attention.sliding_window = 16"),
        (model_metadata(rope__scaling__type="longrope"), "type = 'longrope' is not supported"),
        (model_metadata(rope__dimension_count=64), "rope.dimension_count = 64 differs from"),
        (model_metadata(attention__head_count=[2, 4]), r"head_count = \[2, 4\] is not supported"),
        (model_metadata() | {"split.count": 2}, "one of 2 parts"),
        (model_metadata() | {"general.type": "adapter"}, "general.type is 'adapter'"),
        ({"general.architecture": "llama"}, "llama.block_count is missing"),
        (model_metadata() | {"tokenizer.ggml.eos_token_id": 3}, "eos_token_id = 3 is not below"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    tmp_path: Path, metadata: dict, message: str
) -> None:
    path = write_gguf(tmp_path / "m.gguf", metadata, embedding())
    with pytest.raises(ValueError, match=message) as error:
        GGUFSource(path)
    assert path in str(error.value)


def test_options_that_change_nothing_are_accepted(tmp_path: Path) -> None:
    metadata = model_metadata(expert_count=0, attention__causal=True)
    assert GGUFSource(write_gguf(tmp_path / "m.gguf", metadata, embedding())).shapes


@pytest.mark.parametrize(("kind", "size"), [("Q2_K", 84), ("Q5_K", 176), ("IQ4_NL", 144)])
def test_other_quantisations_are_refused_by_name(tmp_path: Path, kind: str, size: int) -> None:
    tensors = embedding() | {"output.weight": (np.zeros((3, size), np.uint8), kind)}
    path = write_gguf(tmp_path / "m.gguf", model_metadata(), tensors)
    with pytest.raises(ValueError, match=f"tensor output.weight is stored as {kind}"):
        GGUFSource(path)


@pytest.mark.parametrize("name", ["blk.0.ffn_gate_inp.weight", "cls.weight", "blk.0.attn_q.scale"])
def test_unknown_tensors_are_refused_by_name(tmp_path: Path, name: str) -> None:
    tensors = embedding() | {name: np.zeros((2, 256), np.float32)}
    path = write_gguf(tmp_path / "m.gguf", model_metadata(), tensors)
    with pytest.raises(ValueError, match=f"tensor {name} is not part of any supported model"):
        GGUFSource(path)


@pytest.mark.parametrize("opened", [GGUFSource, load_tokenizer])
def test_a_cut_off_file_is_refused_wherever_it_is_cut(tmp_path: Path, opened: type) -> None:
    metadata = model_metadata() | {"tokenizer.ggml.tokens": ["a", "b", "c"]}
    whole = Path(write_gguf(tmp_path / "m.gguf", metadata, embedding())).read_bytes()
    for size in range(4, len(whole), 61):
        path = tmp_path / "cut.gguf"
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=rf"cut.gguf \({size} bytes\) cannot be read"):
            opened(str(path))


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 a zip file"])
def test_another_kind_of_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not a GGUF file"):
        GGUFSource(str(path))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        GGUFSource(str(tmp_path / "none.gguf"))
