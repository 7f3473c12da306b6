"""What is trained: spans of turns in characters, then in tokens."""

import datetime
import json

import numpy as np
import pytest
from tokenizers import processors

from atlas_jax.config import DataConfig
from atlas_jax.data import chat
from atlas_jax.data.chat_template import ChatTemplate, read_options
from atlas_jax.data.examples import Conversation, PlainText, to_sample
from atlas_jax.data.sources import Row
from atlas_jax.types import Example
from tests.tokenizers import CHATML, QWEN3, R1, chatml_tokenizer, llama2_tokenizer


def conversation(*contents, num_context=0):
    roles = ("user", "assistant") * len(contents)
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    return Conversation("rows.jsonl:1", messages, num_context)


def encode(tokenizer, sample, completion_only=True, max_length=1000, stop_ids=()):
    options = chat.mask_options(tokenizer, completion_only, max_length, stop_ids)
    return list(chat.encode(ChatTemplate(tokenizer), [sample], options))


def encode_one(tokenizer, sample, **options):
    (encoded,) = encode(tokenizer, sample, **options)
    return encoded


def trained_text(tokenizer, example):
    return tokenizer.decode(example.tokens[example.loss_mask].tolist())


def test_mask_of_a_single_turn_worked_by_hand():
    tokenizer = chatml_tokenizer()
    # <|im_start|> user \n x <|im_end|> \n <|im_start|> assistant \n y <|im_end|> \n
    encoded = encode_one(tokenizer, conversation("x", "y"))
    words = tokenizer.convert_ids_to_tokens(encoded.example.tokens.tolist())
    answer = words.index("y")
    expected = [i in (answer, answer + 1) for i in range(len(words))]
    assert words[answer : answer + 3] == ["y", "<|im_end|>", "Ċ"]
    assert encoded.example.loss_mask.tolist() == expected
    assert encoded.example.tokens.dtype == np.int32
    assert encoded.notes == ()


def test_mask_of_two_turns_worked_by_hand():
    tokenizer = chatml_tokenizer()
    example = encode_one(tokenizer, conversation("x", "y", "z", "w")).example
    words = tokenizer.convert_ids_to_tokens(example.tokens.tolist())
    stops = [i for i, word in enumerate(words) if word == "<|im_end|>"]
    trained = np.flatnonzero(example.loss_mask).tolist()
    assert len(stops) == 4
    assert trained == [stops[1] - 1, stops[1], stops[3] - 1, stops[3]]


ANSWERS = ("It is four.", "  two spaces, café 😀😀 naïve é", "a\n\nb ", "\n\n lines first", "😀")


@pytest.mark.parametrize("trim_offsets", [True, False])
@pytest.mark.parametrize("answer", ANSWERS)
def test_trained_tokens_decode_to_the_answers_and_stop_tokens_with_byte_level_bpe(
    answer, trim_offsets
):
    tokenizer = chatml_tokenizer(trim_offsets=trim_offsets)
    example = encode_one(tokenizer, conversation("Why 😀?", answer, "é?", answer)).example
    text = trained_text(tokenizer, example)
    # A newline that opens an answer can share its token with the newline of the header.
    assert text.replace("\n", "") == (answer + "<|im_end|>").replace("\n", "") * 2
    if not answer.startswith("\n"):
        assert text == (answer + "<|im_end|>") * 2


@pytest.mark.parametrize("answer", ["It is four.", "café 😀😀 naïve é", "😀"])
def test_trained_tokens_decode_to_the_answers_and_stop_tokens_with_metaspace(answer):
    tokenizer = llama2_tokenizer()
    example = encode_one(tokenizer, conversation("Why 😀?", answer, "é?", answer)).example
    assert trained_text(tokenizer, example) == f"{answer} </s> {answer} </s>"
    assert example.tokens[0] == tokenizer.bos_token_id != example.tokens[1]


def test_marker_text_inside_messages_does_not_move_the_mask():
    tokenizer = chatml_tokenizer()
    sample = conversation("say <|im_start|>assistant\nnow", "It is <|im_start|>user\nfour.")
    example = encode_one(tokenizer, sample).example
    assert trained_text(tokenizer, example) == "It is <|im_start|>user\nfour.<|im_end|>"


def test_assistant_turns_of_a_prompt_are_context():
    tokenizer = chatml_tokenizer()
    sample = conversation("x", "not this", "z", "but this", num_context=3)
    assert trained_text(tokenizer, encode_one(tokenizer, sample).example) == "but this<|im_end|>"


def test_system_and_trailing_user_messages_are_not_trained():
    tokenizer = chatml_tokenizer()
    messages = [
        {"role": "system", "content": "assistant"},
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "y"},
        {"role": "user", "content": "thanks"},
    ]
    example = encode_one(tokenizer, Conversation("r", messages)).example
    assert trained_text(tokenizer, example) == "y<|im_end|>"


def test_template_that_strips_earlier_thinking_gives_an_example_for_each_turn():
    tokenizer = chatml_tokenizer(QWEN3)
    thought = "<think>\nfirst\n</think>\n"
    sample = conversation("x", thought + "y", "z", thought + "w")
    first, second = encode(tokenizer, sample)
    assert trained_text(tokenizer, first.example) == thought + "y<|im_end|>"
    assert trained_text(tokenizer, second.example) == thought + "w<|im_end|>"
    assert thought + "y" not in tokenizer.decode(second.example.tokens.tolist())
    assert first.name == "rows.jsonl:1 (message 2)"
    assert first.notes == second.notes == ("split",)


def test_template_that_strips_nothing_keeps_one_example():
    (encoded,) = encode(chatml_tokenizer(QWEN3), conversation("x", "y", "z", "w"))
    assert encoded.notes == ()


def test_turn_that_begins_otherwise_than_the_generation_prompt_is_noted():
    tokenizer = chatml_tokenizer(R1)
    encoded = encode_one(tokenizer, conversation("x", "It is four."))
    assert trained_text(tokenizer, encoded.example) == "It is four.<|im_end|>"
    assert encoded.notes == ("other_prompt",)


def test_template_that_does_not_append_is_rejected():
    template = (
        "{{ messages | length }} messages: {% for m in messages %}{{ m.content }}{% endfor %}"
    )
    encoded = encode_one(chatml_tokenizer(template), conversation("x", "y"))
    assert encoded.example is None
    assert encoded.notes == ("rejected",)
    assert "renders message 2 otherwise than as a continuation" in encoded.reason


def test_row_that_the_template_refuses_is_rejected_with_its_words():
    messages = [{"role": "user", "content": "x"}] * 2 + [{"role": "assistant", "content": "y"}]
    encoded = encode_one(llama2_tokenizer(), Conversation("r", messages))
    assert encoded.notes == ("rejected",)
    assert "roles must alternate" in encoded.reason


def test_turn_without_a_stop_token_is_noted_and_trained_whole():
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer = chatml_tokenizer(template)
    encoded = encode_one(tokenizer, conversation("x", "y"))
    assert encoded.notes == ("no_stop",)
    assert trained_text(tokenizer, encoded.example).strip() == "y"


def test_further_stop_tokens_end_a_turn():
    template = "{% for m in messages %}{{ m.role }}\n{{ m.content }}<|endoftext|>\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant\n{% endif %}"
    tokenizer = chatml_tokenizer(template)
    stop = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    encoded = encode_one(tokenizer, conversation("x", "y"), stop_ids=(stop,))
    assert encoded.notes == ()
    assert trained_text(tokenizer, encoded.example) == "y<|endoftext|>"


def test_all_tokens_but_the_first_are_trained_without_completion_only():
    sample = conversation("x", "y", "z", "w")
    for tokenizer in (chatml_tokenizer(), llama2_tokenizer()):
        mask = encode_one(tokenizer, sample, completion_only=False).example.loss_mask
        assert mask.tolist() == [False] + [True] * (len(mask) - 1)


@pytest.mark.parametrize("trim_offsets", [True, False])
@pytest.mark.parametrize(
    ("prompt", "completion", "trained"),
    [
        ("2+2 =", " four", " four<|im_end|>"),
        ("It is", " 😀", " 😀<|im_end|>"),
        # " four" is one token over the edge; the answer is not lost.
        ("2+2 = ", "four", " four<|im_end|>"),
    ],
)
def test_plain_text_is_prompt_completion_and_end(prompt, completion, trained, trim_offsets):
    tokenizer = chatml_tokenizer(None, trim_offsets)
    example = encode_one(tokenizer, PlainText("r", prompt, completion)).example
    assert tokenizer.decode(example.tokens.tolist()) == prompt + completion + "<|im_end|>"
    assert trained_text(tokenizer, example) == trained


def test_first_token_of_plain_text_is_never_trained():
    tokenizer = chatml_tokenizer(None)
    mask = encode_one(tokenizer, PlainText("r", "", "It is four.")).example.loss_mask
    assert mask.tolist() == [False] + [True] * (len(mask) - 1)


def test_plain_text_has_the_tokenizers_start_token_once():
    tokenizer = llama2_tokenizer(None)
    example = encode_one(tokenizer, PlainText("r", "What is it?", " It is four.")).example
    assert example.tokens[0] == tokenizer.bos_token_id
    assert np.count_nonzero(example.tokens == tokenizer.bos_token_id) == 1
    assert trained_text(tokenizer, example) == "It is four.</s>"
    assert example.tokens[-1] == tokenizer.eos_token_id


def test_end_token_that_the_tokenizer_adds_a_second_time_is_not_trained():
    tokenizer = llama2_tokenizer(None)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    example = encode_one(tokenizer, PlainText("r", "", "It is four.")).example
    assert example.tokens[-2:].tolist() == [tokenizer.eos_token_id] * 2
    assert example.loss_mask.tolist() == [False] + [True] * (len(example.tokens) - 2) + [False]


def test_long_example_is_cut_and_noted():
    tokenizer = chatml_tokenizer()
    whole = encode_one(tokenizer, conversation("x", "one two three four")).example
    cut = encode_one(
        tokenizer, conversation("x", "one two three four"), max_length=len(whole.tokens) - 3
    )
    assert cut.notes == ("truncated",)
    np.testing.assert_array_equal(cut.example.tokens, whole.tokens[:-3])
    np.testing.assert_array_equal(cut.example.loss_mask, whole.loss_mask[:-3])


def test_example_cut_before_its_answer_is_masked():
    encoded = encode_one(chatml_tokenizer(), conversation("x" * 50, "y"), max_length=20)
    assert encoded.example is None
    assert encoded.notes == ("masked",)


@pytest.mark.parametrize("sample", [conversation("x", " \n"), PlainText("r", "x", "")])
def test_sample_without_written_words_is_empty(sample):
    encoded = encode_one(chatml_tokenizer(), sample)
    assert encoded.example is None
    assert encoded.notes == ("empty",)


def test_mixed_samples_keep_their_order():
    tokenizer = chatml_tokenizer()
    samples = [PlainText("a", "x", "y"), conversation("x", ""), PlainText("c", "x", "z")]
    encoded = list(
        chat.encode(ChatTemplate(tokenizer), samples, chat.mask_options(tokenizer, True, 99))
    )
    assert [e.name for e in encoded] == ["a", "rows.jsonl:1", "c"]


def test_conversation_without_a_chat_template_is_an_error():
    with pytest.raises(ValueError, match=r"has no chat template.*tokenizer_name_or_path"):
        chat.check_tokenizer(chatml_tokenizer(None), [conversation("x", "y")])


def test_plain_text_without_an_end_token_is_an_error():
    tokenizer = chatml_tokenizer(None)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-text token"):
        chat.check_tokenizer(tokenizer, [PlainText("r", "x", "y")])


def test_token_spans_give_trimmed_spaces_their_character():
    # "a  b" as: "a", " ", " b" with trimmed offsets; then two byte tokens of one emoji.
    offsets = np.array([[0, 1], [2, 2], [3, 4], [4, 5], [4, 5]])
    expected = [[0, 1], [1, 2], [3, 4], [4, 5], [4, 5]]
    assert chat.token_spans(offsets).tolist() == expected


def test_rendered_sample_shows_the_whole_text_with_trained_parts_marked():
    tokenizer = chatml_tokenizer()
    example = encode_one(tokenizer, conversation("x 😀", "é 😀", "z", "w")).example
    assert chat.render_sample(tokenizer, example) == (
        "<|im_start|>user\nx 😀<|im_end|>\n<|im_start|>assistant\n⟦é 😀<|im_end|>⟧\n"
        "<|im_start|>user\nz<|im_end|>\n<|im_start|>assistant\n⟦w<|im_end|>⟧\n"
    )
    assert "\x1b[32mw<|im_end|>\x1b[0m" in chat.render_sample(tokenizer, example, color=True)


def test_rendered_sample_keeps_spaces_that_a_decoder_strips():
    tokenizer = llama2_tokenizer()
    example = encode_one(tokenizer, conversation("hello", "you")).example
    assert chat.render_sample(tokenizer, example) == "<s>[INST] hello [/INST]⟦ you </s>⟧"


def test_rendered_sample_of_no_trained_tokens_is_its_text():
    tokenizer = chatml_tokenizer()
    ids = np.asarray(tokenizer("hello you")["input_ids"], np.int32)
    assert chat.render_sample(tokenizer, Example(ids, np.zeros(len(ids), bool))) == "hello you"


THINKS = (  # as Qwen3: the last answer gets a thought, an empty one where it has none
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last and '</think>' not in m.content %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t.function.name }}{% endfor %}"
    "<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }} {{ c.function.arguments | tojson }}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT_TOOLS = TOOLS.replace("c.function.arguments | tojson", "c.function.arguments + '!'")
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DATED = "{{ strftime_now('%d %b %Y') + ' ' + style }}{{ strftime_now( \"%Y\" ) }}" + CHATML


def test_what_a_template_leaves_out_of_what_is_read_is_told():
    tool = {"type": "function", "function": {"name": "add"}}
    talk = ("user", "q"), ("assistant", "a")
    for template, seen in ((TOOLS, True), (CHATML, False)):
        encoded = encode_one(chatml_tokenizer(template), row_of(*talk, tools=[tool]))
        assert encoded.notes == (() if seen else ("unseen",))
        assert encoded.example is not None
    no_results = CHATML.replace("{{ m.content }}", "{{ m.content if m.role != 'tool' }}")
    as_json = CHATML.replace("m.content", "(m.content | tojson if m.role == 'tool' else m.content)")
    rows = row_of(("user", "q"), ("tool", 'a "result"'), ("assistant", "a"))
    for template, notes in ((no_results, ("unseen",)), (as_json, ()), (CHATML, ())):
        assert encode_one(chatml_tokenizer(template), rows).notes == notes
    after = row_of(*talk, ("tool", "not read by any turn"))
    assert encode_one(chatml_tokenizer(no_results), after).notes == ()


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function", "function": {"name": "\ud800"}}]},
        {"messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a", "tool_calls": [
                {"function": {"name": "add", "arguments": {"x": "\ud800"}}}]}]},
    ],
    ids=["tools", "arguments"],
)  # fmt: skip
def test_half_a_surrogate_pair_in_what_a_template_shows_rejects_the_row(fields):
    plain = {"messages": [{"role": r, "content": "x"} for r in ("user", "assistant")]}
    sample = to_sample(Row("r", plain | fields), DataConfig())
    encoded = encode_one(chatml_tokenizer(TOOLS), sample)
    assert encoded.notes == ("rejected",)
    assert "half a surrogate pair" in encoded.reason


def whole_text(tokenizer, example):
    return tokenizer.decode(example.tokens.tolist())


def row_of(*messages, **fields):
    fields["messages"] = [dict(zip(("role", "content"), m, strict=True)) for m in messages]
    return to_sample(Row("r", fields), DataConfig())


def test_an_empty_thought_that_the_template_adds_is_prompt():
    tokenizer = chatml_tokenizer(THINKS)
    added, own = (encode_one(tokenizer, conversation("x", a)) for a in ("y", "<think>z</think>y"))
    assert trained_text(tokenizer, added.example) == "y<|im_end|>"
    assert added.notes == ("other_prompt",)
    assert trained_text(tokenizer, own.example) == "<think>z</think>y<|im_end|>"
    template = ChatTemplate(tokenizer, {"enable_thinking": False})
    options = chat.mask_options(tokenizer, True, 1000)
    (encoded,) = chat.encode(template, [conversation("x", "y")], options)
    assert trained_text(tokenizer, encoded.example) == "y<|im_end|>"
    assert encoded.notes == ()


@pytest.mark.parametrize("answer", ["<answer>y</answer>", "<thinking>y", "<", "y"])
def test_an_answer_that_begins_like_the_generation_prompt_is_whole(answer):
    tokenizer = chatml_tokenizer(R1)
    encoded = encode_one(tokenizer, conversation("x", answer))
    assert trained_text(tokenizer, encoded.example) == answer + "<|im_end|>"
    assert encoded.notes == ("other_prompt",)


def test_what_the_template_leaves_out_is_rejected_not_trained_as_silence():
    tokenizer = chatml_tokenizer(R1)
    encoded = encode_one(tokenizer, conversation("x", "<think>why</think>y"))
    assert encoded.example is None
    assert "leaves content of message 2 out, or a part of it" in encoded.reason
    sample = conversation("x", "y")
    sample.messages[1]["reasoning_content"] = "why"
    assert "leaves reasoning_content of message 2" in encode_one(tokenizer, sample).reason


def test_an_empty_answer_among_others_is_rejected():
    encoded = encode_one(chatml_tokenizer(), conversation("a", " ", "b", "x"))
    assert "has nothing in message 2, of the assistant" in encoded.reason


def call(arguments):
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "move", "arguments": arguments}}],
    }


@pytest.mark.parametrize("arguments", ['{"x": 1}', {"x": 1}, {"x": 1, "theta": None}])
@pytest.mark.parametrize(("template", "shown"), [(TOOLS, '{"x": 1}'), (TEXT_TOOLS, '{"x": 1}!')])
def test_tools_and_their_calls_reach_the_template(arguments, template, shown):
    tool = {"type": "function", "function": {"name": "move", "strict": None}}
    messages = [{"role": "user", "content": "go"}, call(arguments)]
    for tools in ([tool], json.dumps([tool])):
        row = Row("r", {"messages": messages, "tools": tools})
        tokenizer = chatml_tokenizer(template)
        example = encode_one(tokenizer, to_sample(row, DataConfig())).example
        assert trained_text(tokenizer, example) == f"move {shown}<|im_end|>"
        assert whole_text(tokenizer, example).startswith("<|im_start|>system\nmove<|im_end|>")


def test_a_call_that_the_template_does_not_show_is_rejected():
    row = Row("r", {"messages": [{"role": "user", "content": "go"}, call({})]})
    encoded = encode_one(chatml_tokenizer(), to_sample(row, DataConfig()))
    assert "does not show that message 2 calls 'move'" in encoded.reason


@pytest.mark.parametrize(
    ("template", "named"),
    [("{{ messages[0].content + 1 }}", "TypeError"), ("{{ 1 / 0 }}", "ZeroDivisionError"),
     ("{{ [1][messages[0].content | length * 9] + 1 }}", "Error")],
)  # fmt: skip
def test_whatever_a_template_raises_is_the_rows_rejection(template, named):
    encoded = encode_one(chatml_tokenizer(template), conversation("x", "y"))
    assert encoded.notes == ("rejected",)
    assert f"the chat template fails with {named}" in encoded.reason or named == "Error"


@pytest.mark.parametrize("left_out", [{"weight": 0}, {"weight": 0.0}, {"train": False}])
def test_an_answer_that_the_row_leaves_out_is_read_and_not_trained(left_out):
    tokenizer = chatml_tokenizer()
    sample = conversation("x", "wrong", "z", "right")
    sample.messages[1].update(left_out)
    example = encode_one(tokenizer, sample).example
    assert trained_text(tokenizer, example) == "right<|im_end|>"
    assert "wrong<|im_end|>" in whole_text(tokenizer, example)
    assert "weight" not in whole_text(tokenizer, example)
    sample.messages[3].update(left_out)
    with pytest.raises(ValueError, match="no assistant message to train on"):
        to_sample(Row("r", {"messages": sample.messages}), DataConfig())


def test_a_greeting_of_the_assistant_is_context():
    tokenizer = chatml_tokenizer()
    sample = row_of(("assistant", "Hello!"), ("user", "x"), ("assistant", "y"))
    example = encode_one(tokenizer, sample).example
    assert trained_text(tokenizer, example) == "y<|im_end|>"
    assert whole_text(tokenizer, example).startswith("<|im_start|>assistant\nHello!")
    with pytest.raises(ValueError, match="after one of the user"):
        row_of(("system", "s"), ("assistant", "y"))


def test_a_template_without_room_for_a_system_message_gets_it_with_the_question(caplog):
    tokenizer = chatml_tokenizer(NO_SYSTEM)
    template = ChatTemplate(tokenizer)
    samples = [row_of(("system", "be kind"), ("user", "x"), ("assistant", "y"))] * 2
    encoded = list(chat.encode(template, samples, chat.mask_options(tokenizer, True, 1000)))
    for one in encoded:
        assert whole_text(tokenizer, one.example).startswith(
            "<|im_start|>user\nbe kind\n\nx<|im_end|>"
        )
        assert trained_text(tokenizer, one.example) == "y<|im_end|>"
    assert caplog.text.count("has no place for a system message") == 1
    assert ChatTemplate(chatml_tokenizer()).fitted(samples[0].messages) == samples[0].messages
    assert samples[0].messages[0]["role"] == "system"


def test_a_run_gives_templates_its_options_and_its_date():
    tokenizer = chatml_tokenizer(DATED)
    template = ChatTemplate(tokenizer, {"style": "terse"}, datetime.date(2025, 2, 3))
    options = chat.mask_options(tokenizer, True, 1000)
    (encoded,) = chat.encode(template, [conversation("x", "y")], options)
    assert whole_text(tokenizer, encoded.example).startswith("03 Feb 2025 terse2025<|im_start|>")
    assert ChatTemplate(tokenizer).date == datetime.date.today()


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not JSON"), ("[1]", "is no JSON object"), ('{"tools": []}', "cannot give tools")],
)
def test_options_of_a_template_are_checked(text, message):
    with pytest.raises(ValueError, match=f"kwargs=.*{message}|kwargs {message}"):
        read_options(text, "kwargs")
    assert read_options("") == {}
