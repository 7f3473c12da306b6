"""Special tokens that messages name are text, and nothing else changes."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from atlas_jax.checkpoint import gguf
from atlas_jax.data import chat
from atlas_jax.data.chat_template import ChatTemplate, ControlTokens
from atlas_jax.data.examples import Conversation, PlainText
from atlas_jax.recipes.chat_models import asking, turn_encoder
from tests import words
from tests.assets import smollm2_gguf
from tests.tokenizers import CHATML, LLAMA2, QWEN3, SENTENCES, chatml_tokenizer, llama2_tokenizer


def unflagged_tokenizer():
    """Returns one whose tokens around turns are not called special, as DeepSeek's are."""
    tokenizer = chatml_tokenizer(CHATML.replace("im_start", "turn"))
    tokenizer.add_tokens(["<|turn|>", "<think>", "</think>", "\n\n"])
    return tokenizer


def unigram_tokenizer():
    """Returns a tokenizer whose model has special tokens as pieces, and that changes its texts."""
    whole = Tokenizer(models.Unigram())
    whole.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Prepend("▁")])
    whole.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    whole.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    whole.train_from_iterator(
        SENTENCES,
        trainers.UnigramTrainer(
            vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=whole, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        chat_template=LLAMA2,
    )  # fmt: skip


def words_tokenizer():
    tokenizer = words.tokenizer(("user", "assistant", "is", "it"))
    tokenizer.chat_template = CHATML.replace("<|im_start|>", "").replace("<|im_end|>", " <eos>")
    return tokenizer


def smollm2_tokenizer():
    return gguf.load_tokenizer(str(smollm2_gguf()))


TOKENIZERS = {
    "chatml": chatml_tokenizer,
    "chatml untrimmed": lambda: chatml_tokenizer(QWEN3, trim_offsets=False),
    "llama2": llama2_tokenizer,
    "unflagged": unflagged_tokenizer,
    "unigram": unigram_tokenizer,
    "words": words_tokenizer,
    "smollm2": smollm2_tokenizer,
}
ORDINARY = (
    "Hello, how are you today?", "  two spaces,\n\n\nlines 😀 naïve é", "1 < 2 and [a] <b> |",
    "<think> first </think> <|", "", "x",
)  # fmt: skip


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def names_of(tokenizer):
    """Returns the special tokens that a user's message must not become."""
    framing = {"<|turn|>"} & tokenizer.get_vocab().keys()
    return sorted({*tokenizer.all_special_tokens, *framing})


def encode(tokenizer, *contents, template=None, **options):
    template = template or ChatTemplate(tokenizer)
    roles = ("user", "assistant") * len(contents)
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    sample = Conversation("r", messages)
    mask_options = chat.mask_options(tokenizer, True, 10_000, **options)
    (encoded,) = chat.encode(template, [sample], mask_options)
    return encoded


def test_texts_without_special_tokens_keep_their_ids(tokenizer):
    tokens = ControlTokens(tokenizer)
    for text in ORDINARY:
        for adds in (False, True):
            for whole in (text, f"{tokenizer.eos_token}{text} {tokenizer.eos_token}\n{text}"):
                expected = tokenizer(
                    whole, add_special_tokens=adds, return_offsets_mapping=True,
                    return_special_tokens_mask=True,
                )  # fmt: skip
                found = tokens.encode(whole, adds)
                assert found.ids == expected.input_ids
                assert found.offsets == expected.offset_mapping
                assert found.special_tokens_mask == expected.special_tokens_mask
        assert tokens.cover(text) is text


def test_special_tokens_that_a_user_names_are_text_in_training_and_in_prompts(tokenizer):
    template = ChatTemplate(tokenizer)
    control = tokenizer.convert_tokens_to_ids(names_of(tokenizer))
    assert control
    plain = encode(tokenizer, "is it x, x?", "it is x", template=template)
    asked = asking(turn_encoder(template, ""))
    for name in names_of(tokenizer):
        text = f"is it{name}, {name}{name}?"
        found = encode(tokenizer, text, "it is x", template=template)
        assert found.notes == plain.notes
        pairs = [(plain.example.tokens, found.example.tokens), (asked("is it x?"), asked(text))]
        for without, named in pairs:
            count = [int(np.isin(ids, control).sum()) for ids in (without, named)]
            unknown = [list(ids).count(tokenizer.unk_token_id) for ids in (without, named)]
            assert count[0] - unknown[0] == count[1] - unknown[1]
            if not unknown[1]:  # what has no tokens for these characters loses them
                assert text in tokenizer.decode(named)
        answers = [e.example.tokens[e.example.loss_mask].tolist() for e in (plain, found)]
        assert answers[0] == answers[1]


def test_ids_of_a_named_special_token_worked_by_hand():
    tokenizer = chatml_tokenizer()
    (start, end) = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    prompt = asking(turn_encoder(ChatTemplate(tokenizer), ""))("say <|im_end|>")
    # ByteLevel cuts "say <|im_end|>" into "say", " <|", "im", "_", "end", "|>"
    written = [*"Ġ<|im_end|>"]
    expected = [start, *tokenizer("user\nsay").input_ids]
    found = tokenizer.convert_ids_to_tokens(list(prompt))
    assert list(prompt[: len(expected)]) == expected
    at = len(expected)
    rest = "".join(found[at : found.index("<|im_end|>")])
    assert rest == "".join(written)
    assert list(prompt).count(end) == 1


def test_a_prompt_of_a_model_without_a_chat_template_is_text():
    tokenizer = llama2_tokenizer(None)
    asked = asking(turn_encoder(ChatTemplate(tokenizer), "be kind"))
    assert asked("is it?") == tuple(tokenizer("be kind\n\nis it?").input_ids)
    ids = asked("is it </s> or <s>?")
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids[1:]) == "be kind\n\nis it </s> or <s>?"


def test_an_answer_that_names_the_end_of_turns_is_trained_whole():
    tokenizer = chatml_tokenizer()
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    example = encode(tokenizer, "x", "write <|im_end|> there").example
    trained = example.tokens[example.loss_mask].tolist()
    assert tokenizer.decode(trained) == "write <|im_end|> there<|im_end|>"
    assert trained.count(stop) == 1
    assert trained[-1] == stop


def test_tokens_that_the_model_writes_itself_stay_tokens_in_its_answers():
    tokenizer = chatml_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[THINK]", "[/THINK]"]})
    thought = tokenizer.convert_tokens_to_ids("[THINK]")
    example = encode(tokenizer, "use [THINK]", "[THINK]why[/THINK]y").example
    assert example.tokens.tolist().count(thought) == 1
    assert example.tokens[example.loss_mask][0] == thought


def test_plain_texts_are_their_own_template():
    tokenizer = chatml_tokenizer()
    sample = PlainText("r", "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n", "y")
    (encoded,) = chat.encode(
        ChatTemplate(tokenizer), [sample], chat.mask_options(tokenizer, True, 100)
    )
    expected = tokenizer(sample.prompt + sample.completion + "<|im_end|>").input_ids
    assert encoded.example.tokens.tolist() == expected


def test_tools_and_arguments_are_text_too():
    template = CHATML.replace(
        "{{ m.content }}",
        "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}",
    )
    tokenizer = chatml_tokenizer("{{ tools | tojson }}" + template)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    call = {"function": {"name": "find", "arguments": {"<|im_end|>": ["a <|im_end|>"]}}}
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    tools = ({"function": {"name": "find", "description": "finds <|im_end|>"}},)
    sample = Conversation("r", messages, tools=tools)
    (encoded,) = chat.encode(
        ChatTemplate(tokenizer), [sample], chat.mask_options(tokenizer, True, 1000)
    )
    tokens = encoded.example.tokens.tolist()
    assert tokens.count(stop) == 2
    assert tokenizer.decode(tokens).count("<|im_end|>") == 5
    assert '{"<|im_end|>": ["a <|im_end|>"]}' in tokenizer.decode(tokens)


def test_a_reason_shows_what_the_row_says():
    tokenizer = chatml_tokenizer(CHATML.replace("m.content", "m.content.split('|')[0]"))
    encoded = encode(tokenizer, "x", "y <|im_end|> | z")
    assert "of 'y <|im_end|> | z' it shows 'y <|im_end|> <|im_end|>" in encoded.reason


def test_private_characters_are_kept_unless_they_stand_beside_a_special_token():
    tokenizer = chatml_tokenizer()
    private = chr(0x100000)
    example = encode(tokenizer, f"x{private}", "y").example
    assert private in tokenizer.decode(example.tokens)
    encoded = encode(tokenizer, f"x{private} <|im_end|>", "y")
    assert encoded.notes == ("rejected",)
    assert "has the private character U+100000" in encoded.reason
