"""Tokenizers are those of their files, and their tokens have rows in the model."""

import io
import json
import pathlib
import re
from unittest import mock

import numpy as np
import pytest
import sentencepiece
import transformers

from atlas_jax.checkpoint import hf
from atlas_jax.startup import model as startup_model
from tests.tokenizers import SENTENCES, chatml_tokenizer


def test_a_tokenizer_that_differs_from_its_file_is_refused_with_both_lists(tmp_path, monkeypatch):
    chatml_tokenizer().save_pretrained(tmp_path)
    tokenizer = startup_model.load_tokenizer(str(tmp_path))
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["pre_tokenizer"]["add_prefix_space"] = True  # as some releases of transformers do
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    changed = startup_model.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    both = [list(changed.encode(startup_model.CHECK_TEXT, add_special_tokens=False).ids),
            tokenizer(startup_model.CHECK_TEXT, add_special_tokens=False).input_ids]  # fmt: skip
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda _: tokenizer)
    with pytest.raises(ValueError, match="loads another tokenizer than") as found:
        startup_model.load_tokenizer(str(tmp_path))
    assert all(str(ids) in str(found.value) for ids in both)


def test_added_tokens_may_lie_beyond_the_model_but_rows_may_not_have_them():
    tokenizer = chatml_tokenizer()
    size = len(tokenizer)
    tokenizer.add_tokens(["<image>"])
    startup_model.check_size(tokenizer, size)
    startup_model.check_ids(tokenizer, np.arange(size), size)
    startup_model.check_ids(tokenizer, np.zeros(0, int), size)
    with pytest.raises(ValueError, match=f"the rows contain '<image>', whose id {size} has no row"):
        startup_model.check_ids(tokenizer, np.asarray([1, size]), size)
    with pytest.raises(ValueError, match=f"ids up to {size - 1}, but the model's vocab_size is 20"):
        startup_model.check_size(tokenizer, 20)


@pytest.mark.parametrize(
    ("config", "generation", "eos", "expected"),
    [
        ({"eos_token_id": 9}, {"eos_token_id": [3, 4]}, 5, (3, 4)),
        ({"eos_token_id": [9, 8]}, {"eos_token_id": 3}, 5, (3,)),
        ({"eos_token_id": [9, 8]}, {}, 8, (9, 8)),
        ({"eos_token_id": 9}, {}, 5, (9, 5)),
        ({"eos_token_id": None}, {"temperature": 0.6}, 5, (5,)),
        ({}, {}, None, ()),
    ],
)
def test_stop_tokens_are_those_of_the_first_file_that_names_some(config, generation, eos, expected):
    source, tokenizer = mock.Mock(hf.Source), chatml_tokenizer()
    source.config, source.generation_config = config, generation
    tokenizer.eos_token_id = eos
    assert startup_model.stop_ids(source, tokenizer) == expected


@pytest.mark.parametrize("ids", ["x", [3, "x"], 3.5, True, [[3]]])
def test_stop_tokens_that_are_no_whole_numbers_are_named(ids):
    source = mock.Mock(hf.Source)
    source.config, source.generation_config = {}, {"eos_token_id": ids}
    with pytest.raises(ValueError, match=r"eos_token_id=.* must be whole numbers"):
        startup_model.stop_ids(source, chatml_tokenizer())


PIECES = {
    "llama": dict(model_type="bpe", split_digits=True),
    "gemma": dict(model_type="bpe", add_dummy_prefix=False),
    "nmt": dict(model_type="unigram", normalization_rule_name="nmt_nfkc",
                remove_extra_whitespaces=True),
}  # fmt: skip


def sentencepiece_directory(path, kind, **options):
    """Writes a directory with tokenizer.model alone, and returns what sentencepiece makes of it."""
    content = io.BytesIO()
    usual = dict(normalization_rule_name="identity", remove_extra_whitespaces=False)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((*SENTENCES, "cats  saw    dogs  and   more")), minloglevel=2,
        model_writer=content, vocab_size=370, hard_vocab_limit=False, byte_fallback=True,
        **(usual | PIECES[kind]),
    )  # fmt: skip
    path.mkdir(parents=True)
    (path / "tokenizer.model").write_bytes(content.getvalue())
    (path / "config.json").write_text(json.dumps({"model_type": options.pop("of", "llama")}))
    (path / "tokenizer_config.json").write_text(json.dumps(options))
    return sentencepiece.SentencePieceProcessor(model_proto=content.getvalue())


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False}),
        ("llama", {}),
        ("llama", {"of": "mistral", "tokenizer_class": "LlamaTokenizer", "add_bos_token": True}),
        ("gemma", {"of": "gemma3_text", "tokenizer_class": "GemmaTokenizer"}),
        ("gemma", {"tokenizer_class": "LlamaTokenizer"}),  # which its class loads otherwise
        ("nmt", {"of": "mistral"}),
    ],
)
def test_a_directory_with_sentencepiece_alone_loads_and_so_does_its_export(kind, options, tmp_path):
    template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    pieces = sentencepiece_directory(tmp_path / "model", kind, chat_template=template, **options)
    tokenizer = startup_model.load_tokenizer(str(tmp_path / "model"))
    assert tokenizer.is_fast
    assert tokenizer.chat_template == template
    files = hf.ModelFiles({"model_type": "llama"}, {}, tokenizer, "float32")
    hf.write_files(str(tmp_path / "out"), files)
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    again = startup_model.load_tokenizer(str(tmp_path / "out"))
    for text in (startup_model.CHECK_TEXT, "It is  four.\n", "é 😀"):
        for found in (tokenizer, exported, again):
            assert found(text, add_special_tokens=False).input_ids == pieces.encode(text)
        assert exported(text).input_ids == tokenizer(text).input_ids
    assert exported.special_tokens_map == tokenizer.special_tokens_map
    assert exported.chat_template == template


def test_a_sentencepiece_model_that_transformers_makes_another_of_is_refused(tmp_path, monkeypatch):
    pieces = sentencepiece_directory(tmp_path / "model", "llama")
    for name in ("AutoTokenizer", "PreTrainedTokenizerFast"):
        monkeypatch.setattr(f"transformers.{name}.from_pretrained", lambda _: chatml_tokenizer())
    with pytest.raises(ValueError, match=r"another tokenizer than .*tokenizer\.model") as found:
        startup_model.load_tokenizer(str(tmp_path / "model"))
    assert str(pieces.encode(startup_model.CHECK_TEXT)) in str(found.value)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no tokenizer.json, nor another tokenizer's file; copy it from the model"),
        ({"tokenizer.json": "version https://git-lfs.github.com/spec/v1\n"}, "git lfs pull"),
        ({"tokenizer.json": '{"model": '}, "tokenizer.json is not JSON"),
        ({"tokenizer.model": ""}, "tokenizer.model is empty"),
        ({"tokenizer.model": "no model"}, "transformers loads no tokenizer from"),
    ],
)
def test_a_directory_without_a_tokenizer_is_one_line(files, message, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for name, text in files.items():
        pathlib.Path(tmp_path, name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as found:
        startup_model.load_tokenizer(str(tmp_path))
    assert "\n" not in str(found.value)
    assert str(tmp_path) in str(found.value)
