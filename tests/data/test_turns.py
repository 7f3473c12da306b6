"""data.turns: what becomes of conversations whose earlier turns the chat template changes."""

import numpy as np
import pytest

from atlas_jax.config import DataConfig, SFTConfig
from atlas_jax.data import chat, loader
from atlas_jax.data.chat_template import ChatTemplate
from atlas_jax.data.examples import Conversation
from atlas_jax.data.sources import Row, Rows
from tests.data.test_chat import THINKS, TOOLS, call
from tests.tokenizers import CHATML, LLAMA2, QWEN3, chatml_tokenizer, llama2_tokenizer

THINKS_TOOLS = TOOLS.replace(
    "{{ m.content }}",
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}",
)


def encode(tokenizer, *turns, options=None, **changes):
    """Returns what becomes of messages, given as `(role, content)` or whole."""
    messages = [dict(zip(("role", "content"), t, strict=True)) if isinstance(t, tuple) else t
                for t in turns]  # fmt: skip
    mask_options = chat.mask_options(tokenizer, True, 1000, turns="history")._replace(**changes)
    return list(
        chat.encode(ChatTemplate(tokenizer, options), [Conversation("r", messages)], mask_options)
    )


def talk(*answers):
    return [turn for i, a in enumerate(answers) for turn in (("user", f"q{i}"), ("assistant", a))]


def shown(tokenizer, encoded):
    return chat.render_sample(tokenizer, encoded.example)


@pytest.mark.parametrize("options", [{}, {"enable_thinking": False}])
def test_history_trains_every_turn_once_and_the_last_as_it_is_answered(options):
    tokenizer = chatml_tokenizer(THINKS)
    (encoded,) = encode(tokenizer, *talk("x", "<y>", "z"), ("user", "bye"), options=options)
    assert shown(tokenizer, encoded) == (
        "<|im_start|>user\nq0<|im_end|>\n<|im_start|>assistant\n⟦x<|im_end|>⟧\n"
        "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n⟦<y><|im_end|>⟧\n"
        "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        "⟦z<|im_end|>⟧\n"
    )
    assert encoded.notes == ("other_prompt",)
    assert len(encode(tokenizer, *talk("x", "<y>", "z"), options=options, turns="each")) == 3


def test_the_tokens_of_history_grow_with_the_conversation_not_with_its_square():
    tokenizer = chatml_tokenizer(THINKS)
    few, many = (
        {kind: sum(len(e.example.tokens) for e in encode(tokenizer, *talk(*"x" * n), turns=kind))
         for kind in ("each", "history")}
        for n in (4, 16)
    )  # fmt: skip
    assert many["history"] < 5 * few["history"]
    assert many["each"] > 10 * few["each"]


@pytest.mark.parametrize(
    "tokenizer", [chatml_tokenizer(CHATML), llama2_tokenizer(LLAMA2)], ids=["chatml", "llama2"]
)
def test_templates_that_only_append_are_the_same_under_both(tokenizer):
    both = [encode(tokenizer, *talk("x", "y"), turns=kind) for kind in ("each", "history")]
    assert len(both[0]) == len(both[1]) == 1
    np.testing.assert_array_equal(both[0][0].example.tokens, both[1][0].example.tokens)
    np.testing.assert_array_equal(both[0][0].example.loss_mask, both[1][0].example.loss_mask)
    assert both[0][0].notes == both[1][0].notes


def test_a_turn_that_history_does_not_show_is_rejected():
    (encoded,) = encode(chatml_tokenizer(QWEN3), *talk("<think>why</think>x", "y"))
    assert encoded.notes == ("rejected",)
    assert "leaves content of message 2 out, or a part of it" in encoded.reason
    assert "data.turns=each" in encoded.reason
    turns = talk("x", "y")
    turns[1] = {"role": "assistant", "content": "x", "reasoning_content": "why"}
    (encoded,) = encode(chatml_tokenizer(THINKS), *turns)
    assert "leaves reasoning_content of message 2 out" in encoded.reason


def test_a_thought_in_the_last_turn_alone_is_kept():
    tokenizer = chatml_tokenizer(QWEN3.replace("loop.index0 < ns.last", "not loop.last"))
    (encoded,) = encode(tokenizer, *talk("x", "<think>why</think>y"), ("user", "bye"))
    assert shown(tokenizer, encoded).endswith("assistant\n⟦<think>why</think>y<|im_end|>⟧\n")
    assert "assistant\n⟦x<|im_end|>⟧\n" in shown(tokenizer, encoded)


def test_turns_that_a_row_leaves_out_are_context():
    tokenizer = chatml_tokenizer(THINKS)
    turns = talk("x", "y", "z", "w")
    turns[1] = {"role": "assistant", "content": "x", "weight": 0}
    turns[7] = {"role": "assistant", "content": "w", "train": False}
    (encoded,) = encode(tokenizer, *turns)
    assert "assistant\nx<|im_end|>" in shown(tokenizer, encoded)
    assert "assistant\n⟦y<|im_end|>⟧" in shown(tokenizer, encoded)
    assert shown(tokenizer, encoded).endswith("\n⟦z<|im_end|>⟧\n")


def test_calls_of_tools_are_trained_in_history():
    tokenizer = chatml_tokenizer(THINKS_TOOLS)
    turns = [
        ("user", "go"), call({"x": 1}), ("tool", "done"), ("assistant", "<|im_end|> it is"),
        ("user", "more"), ("assistant", "no"),
    ]  # fmt: skip
    turns[1]["content"] = ""
    (encoded,) = encode(tokenizer, *turns)
    assert shown(tokenizer, encoded) == (
        "<|im_start|>user\ngo<|im_end|>\n"
        '<|im_start|>assistant\n⟦move {"x": 1}<|im_end|>⟧\n'
        "<|im_start|>tool\ndone<|im_end|>\n"
        "<|im_start|>assistant\n⟦<|im_end|> it is<|im_end|>⟧\n"
        "<|im_start|>user\nmore<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n⟦no<|im_end|>⟧\n"
    )


def test_turns_without_a_special_token_behind_them_are_rejected():
    tokenizer = chatml_tokenizer(THINKS.replace("<|im_end|>", "").replace("<|im_start|>", ""))
    (encoded,) = encode(tokenizer, *talk("x", "y"))
    assert "ends no turn with a special token" in encoded.reason


def test_the_option_reaches_the_rows_of_a_run():
    rows = Rows(
        [Row("r", {"messages": [{"role": r, "content": c} for r, c in talk("x", "y", "z")]})], []
    )
    template = ChatTemplate(chatml_tokenizer(THINKS))
    found = {}
    for kind in ("each", "history"):
        data = DataConfig(turns=kind)
        config = SFTConfig(max_seq_length=128, data=data)
        found[kind] = loader.build(rows, config, template, loader.HostRows(1)).report
    assert (found["each"].examples, found["history"].examples) == (3, 1)
    assert found["each"].trained_tokens == found["history"].trained_tokens
