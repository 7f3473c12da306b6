"""Models that speak in a few whole words, small enough to learn a task within a test."""

from __future__ import annotations

import pathlib

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

DIGITS = tuple("0123456789")
SPECIAL = ("<pad>", "<eos>", "<unk>")


def tokenizer(words: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """Returns a tokenizer of these words, each one token, without a chat template."""
    names = dict.fromkeys((*SPECIAL, *DIGITS, *words))
    vocabulary = {name: i for i, name in enumerate(names)}
    whole = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    whole.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=whole, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


def save(directory: pathlib.Path, words: tuple[str, ...], seed: int = 0, **sizes: int) -> str:
    """Saves a random model of these words with its tokenizer, and returns the path."""
    import torch  # programs that tests start find none
    import transformers

    names = tokenizer(words)
    torch.manual_seed(seed)
    shape = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    config = transformers.LlamaConfig(
        vocab_size=len(names), eos_token_id=names.eos_token_id, bos_token_id=None,
        pad_token_id=names.pad_token_id, **(shape | sizes),
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    names.save_pretrained(directory)
    return str(directory)
