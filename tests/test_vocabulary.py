"""Tokenizers are those of their files, and their tokens have rows in the model."""

import json
from unittest import mock

import numpy as np
import pytest

from atlas_jax.checkpoint import hf
from atlas_jax.recipes import vocabulary
from tests.tokenizers import chatml_tokenizer


def test_a_tokenizer_that_differs_from_its_file_is_refused_with_both_lists(tmp_path, monkeypatch):
    chatml_tokenizer().save_pretrained(tmp_path)
    tokenizer = vocabulary.load_tokenizer(str(tmp_path))
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["pre_tokenizer"]["add_prefix_space"] = True  # as some releases of transformers do
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    changed = vocabulary.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    both = [list(changed.encode(vocabulary.CHECK_TEXT, add_special_tokens=False).ids),
            tokenizer(vocabulary.CHECK_TEXT, add_special_tokens=False).input_ids]  # fmt: skip
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda _: tokenizer)
    with pytest.raises(ValueError, match="loads another tokenizer than") as found:
        vocabulary.load_tokenizer(str(tmp_path))
    assert all(str(ids) in str(found.value) for ids in both)


def test_added_tokens_may_lie_beyond_the_model_but_rows_may_not_have_them():
    tokenizer = chatml_tokenizer()
    size = len(tokenizer)
    tokenizer.add_tokens(["<image>"])
    vocabulary.check_size(tokenizer, size)
    vocabulary.check_ids(tokenizer, np.arange(size), size)
    vocabulary.check_ids(tokenizer, np.zeros(0, int), size)
    with pytest.raises(ValueError, match=f"the rows contain '<image>', whose id {size} has no row"):
        vocabulary.check_ids(tokenizer, np.asarray([1, size]), size)
    with pytest.raises(ValueError, match=f"ids up to {size - 1}, but the model's vocab_size is 20"):
        vocabulary.check_size(tokenizer, 20)


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
    assert vocabulary.stop_ids(source, tokenizer) == expected
