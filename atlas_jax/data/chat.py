r"""Tokenization of conversations and plain texts, with the mask of the trained tokens.

The chat template itself delimits an assistant turn. The conversation up to and including the turn
is rendered, and so is the conversation before it with the generation prompt; the turn is the
difference. The text is tokenized once, as a whole, and a token is trained if it holds a character
of a trained turn:

    user "2+2?", assistant "4", user "3+3?", assistant "6", in ChatML; trained text is underlined

    …assistant\n4<|im_end|>\n<|im_start|>user\n3+3?<|im_end|>\n<|im_start|>assistant\n6<|im_end|>\n
               -----------                                                          -----------

Text after the last stop token of a turn (here the newline) belongs to the next prompt: the model
has stopped by then. Some templates render earlier turns differently from the last one (Qwen3 puts
an empty thought before the last one only). They give one example for each assistant turn, as the
model would have seen it. With `turns="history"` they give one example, in which earlier turns are
trained as they are rendered there.

A turn is trained as the template renders it. A row is rejected if the rendered turn omits the
assistant's words, its reasoning, or the name of a tool that it calls. A message is text, even if it
names special tokens (`chat_template`). Plain texts need no template, and special tokens in them
are special tokens.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from atlas_jax.data.chat_template import EMPTY_THOUGHT, ChatTemplate, errors
from atlas_jax.data.examples import (
    Conversation,
    PlainText,
    Sample,
    check_encodable,
    trained_turns,
)
from atlas_jax.types import Example, Message

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

NOTES = {
    "rejected": "left out, each for the reason given",
    "empty": "dropped: nothing is written in them that could be trained on",
    "masked": "dropped: no trained token within max_seq_length",
    "truncated": "cut at max_seq_length",
    "no_stop": "the model will not learn to stop: an assistant turn ends without a stop token",
    "split": "one example for each assistant turn: the template changes earlier turns",
    "other_prompt": "the template starts the turn otherwise than its generation prompt does",
    "unseen": "the template shows no tools, or leaves out a message that is only read",
}
"""Notes on examples, with their meanings."""

_QUOTED = re.compile(r"\\U(0010[0-9a-f]{4})")
_Render: TypeAlias = Callable[..., str]  # a chat template with a row's tools
_CHUNK = 256  # texts that one call of the tokenizer spreads over its threads


class MaskOptions(NamedTuple):
    """Options of the loss mask."""

    completion_only: bool
    """True to train on assistant turns and completions only, false to train on all tokens."""
    max_length: int
    """Number of tokens to which an example is cut."""
    stop_ids: frozenset[int]
    """Tokens that end a turn."""
    turns: str = "each"
    """Examples if a template changes earlier turns: one for `each`, or one of the `history`."""


class Rendered(NamedTuple):
    """A rendered text with its trained character spans `[start, end)`."""

    name: str
    text: str
    spans: tuple[tuple[int, int], ...]
    templated: bool
    """True if the text came from a chat template, which writes the special tokens itself."""
    covered: bool = False
    """True if names of special tokens in messages are covered in the text (`chat_template`)."""
    notes: tuple[str, ...] = ()
    reason: str = ""
    """Reason for its rejection."""


class Encoded(NamedTuple):
    """The example of a row, or the reason for its rejection."""

    name: str
    example: Example | None
    notes: tuple[str, ...]
    """Keys of `NOTES`."""
    reason: str = ""


def mask_options(
    tokenizer: PreTrainedTokenizerBase,
    completion_only: bool,
    max_length: int,
    stop_ids: Collection[int] = (),
    turns: str = "each",
) -> MaskOptions:
    """Returns mask options whose stop tokens are the tokenizer's end of text and `stop_ids`."""
    end_ids = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    return MaskOptions(
        completion_only=completion_only,
        max_length=max_length,
        stop_ids=frozenset((*end_ids, *stop_ids)),
        turns=turns,
    )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, samples: Iterable[Sample]) -> None:
    """Checks that the tokenizer has what the samples need.

    Raises:
        ValueError: if the tokenizer has no offsets, no chat template although samples are
            conversations, or no end-of-text token although samples are plain texts.
    """
    where = tokenizer.name_or_path
    if not tokenizer.is_fast:
        raise ValueError(
            f"tokenizer {where!r} reports no character offsets; use one with a tokenizer.json"
        )
    kinds = {type(sample) for sample in samples}
    if Conversation in kinds and not tokenizer.chat_template:
        raise ValueError(
            f"tokenizer {where!r} has no chat template, which conversations need; set "
            "--config.tokenizer_name_or_path to the instruction-tuned model's tokenizer, put a "
            "chat_template.jinja beside the model, or give rows of plain prompt and completion"
        )
    if PlainText in kinds and tokenizer.eos_token is None:
        raise ValueError(
            f"tokenizer {where!r} has no end-of-text token for completions to end with; set "
            "eos_token in its tokenizer_config.json"
        )


def encode(
    template: ChatTemplate, samples: Iterable[Sample], options: MaskOptions
) -> Iterator[Encoded]:
    """Yields the examples of each sample, in order, and a record for a sample without one."""
    rendered = (part for sample in samples for part in render(template, sample, options))
    for _, group in itertools.groupby(rendered, key=lambda part: (part.templated, part.covered)):
        while chunk := list(itertools.islice(group, _CHUNK)):
            yield from _encode_chunk(template, chunk, options)


def render(template: ChatTemplate, sample: Sample, options: MaskOptions) -> list[Rendered]:
    """Returns the rendered texts of a sample, one for each of its examples.

    A sample with nothing to train on, or one that the template refuses, has a note that says so.
    """
    templated = isinstance(sample, Conversation)
    if not _written(sample, options.completion_only).strip():
        return [
            Rendered(name=sample.name, text="", spans=(), templated=templated, notes=("empty",))
        ]
    if isinstance(sample, PlainText):
        text = sample.prompt + sample.completion + str(template.tokenizer.eos_token)
        start = len(sample.prompt) if options.completion_only else 0
        return [
            Rendered(name=sample.name, text=text, spans=((start, len(text)),), templated=templated)
        ]
    try:
        sample = _fitted(template, sample)
        covered = _covered(template, sample)
        parts = _render_conversation(template, covered, options)
        for part in parts:
            check_encodable(part.text, "its text")
        more = () if _shows_context(covered, parts[-1].text) else ("unseen",)
        return [
            part._replace(covered=covered != sample, notes=(*part.notes, *more)) for part in parts
        ]
    except errors() as error:
        reason = str(error) if isinstance(error, ValueError) else _named(error)
        # An error may quote the text, with covers in it.
        reason = _QUOTED.sub(lambda match: chr(int(match[1], 16)), reason)
        reason = template.control_tokens.uncover(reason)
        return [
            Rendered(
                name=sample.name,
                text="",
                spans=(),
                templated=templated,
                notes=("rejected",),
                reason=reason,
            )
        ]


def _named(error: Exception) -> str:
    return f"the chat template fails with {type(error).__name__}: {error}"


def _fitted(template: ChatTemplate, sample: Conversation) -> Conversation:
    messages = template.fitted(sample.messages)
    fewer = len(sample.messages) - len(messages)
    return sample._replace(messages=messages, num_context=max(sample.num_context - fewer, 0))


def _covered(template: ChatTemplate, sample: Conversation) -> Conversation:
    tokens = template.control_tokens
    return sample._replace(
        messages=tokens.cover_messages(sample.messages), tools=tokens.cover_tools(sample.tools)
    )


def render_sample(tokenizer: PreTrainedTokenizerBase, example: Example, color: bool = False) -> str:
    """Returns the example's text with the trained parts marked, for a person to check.

    Args:
        tokenizer: the tokenizer that decodes the tokens.
        example: the example.
        color: whether to mark by green terminal colour instead of ⟦ and ⟧.
    """
    opening, closing = ("\x1b[32m", "\x1b[0m") if color else ("⟦", "⟧")
    mask = example.loss_mask
    edges = [0, *(np.flatnonzero(mask[1:] != mask[:-1]) + 1).tolist(), len(mask)]
    # Decoded from the start each time, because some decoders drop the space before a first word.
    texts = [_decode(tokenizer, example.tokens[:edge]) for edge in edges]
    parts = []
    for start, before, after in zip(edges[:-1], texts[:-1], texts[1:], strict=True):
        part = after[len(before) :]
        parts.append(f"{opening}{part}{closing}" if mask[start : start + 1].any() else part)
    return "".join(parts)


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray) -> str:
    text = tokenizer.decode(tokens.tolist(), clean_up_tokenization_spaces=False)
    return str(text)


def _written(sample: Sample, completion_only: bool) -> str:
    """Returns the words that training can reach, of every turn together."""
    if isinstance(sample, PlainText):
        return sample.completion if completion_only else sample.prompt + sample.completion
    if not completion_only:
        return "".join(message["content"] for message in sample.messages)
    turns = (sample.messages[i] for i in trained_turns(sample))
    return "".join(m["content"] + str(m.get("tool_calls") or "") for m in turns)


def _render_conversation(
    template: ChatTemplate, sample: Conversation, options: MaskOptions
) -> list[Rendered]:
    render = functools.partial(template, tools=sample.tools)
    full = render(sample.messages)
    if not options.completion_only:
        return [Rendered(name=sample.name, text=full, spans=((0, len(full)),), templated=True)]
    turns: dict[int, Rendered] = {}
    for i in trained_turns(sample):
        turns[i] = _render_turn(render, sample, i, full)
        if options.turns == "history" and not full.startswith(turns[i].text):
            return [_render_history(template, sample, full)]
    if all(full.startswith(turn.text) for turn in turns.values()):
        spans = tuple(span for turn in turns.values() for span in turn.spans)
        notes = tuple(sorted({note for turn in turns.values() for note in turn.notes}))
        return [Rendered(name=sample.name, text=full, spans=spans, templated=True, notes=notes)]
    return [
        turn._replace(name=f"{sample.name} (message {i + 1})", notes=(*turn.notes, "split"))
        for i, turn in turns.items()
    ]


def _render_turn(render: _Render, sample: Conversation, turn: int, full: str) -> Rendered:
    """Returns the conversation up to and including one assistant turn, that turn trained.

    Args:
        render: the chat template.
        sample: the conversation.
        turn: the index of the turn's message.
        full: the whole conversation, rendered.
    """
    is_last = turn + 1 == len(sample.messages)
    text = full if is_last else render(sample.messages[: turn + 1])
    start, notes = _turn_start(render, sample.messages, turn, text)
    _check_shown(sample.messages[turn], text[start:], turn)
    return Rendered(
        name=sample.name, text=text, spans=((start, len(text)),), templated=True, notes=notes
    )


def _turn_start(
    render: _Render,
    messages: Sequence[Message],
    turn: int,
    text: str,
    after: Sequence[Message] = (),
) -> tuple[int, tuple[str, ...]]:
    """Returns the start of an assistant turn in a text, and the notes on it.

    Args:
        render: the chat template.
        messages: the conversation.
        turn: the index of the turn's message.
        text: the rendered conversation up to this turn or a later one.
        after: the text that the template writes after an answer in the turn's position.

    Raises:
        ValueError: if the text does not continue that of the messages before.
    """
    history = messages[:turn]
    message = messages[turn]
    prompt = render(history, add_generation_prompt=True)
    notes: tuple[str, ...] = ()
    start = len(prompt)
    if not text.startswith(prompt):
        # The turn does not begin with the generation prompt (some templates put "<think>" into the
        # generation prompt only). The text before every answer is found by rendering an answer
        # that no real one resembles: it is the prefix shared with the generation prompt.
        neutral = render([*history, Message(role="assistant", content="0"), *after])
        bare = render(history)
        start = _common_length(prompt, neutral)
        if start <= len(bare) or not text.startswith(prompt[:start]):
            shared = _common_length(prompt, text)
            raise ValueError(
                f"the chat template renders message {turn + 1} otherwise than as a continuation of "
                f"the messages before it: after {text[:shared][-40:]!r} stands "
                f"{text[shared:][:40]!r}, its generation prompt has {prompt[shared:][:40]!r}; use "
                "a template that only appends, or rows of plain prompt and completion"
            )
        notes = ("other_prompt",)
    added = EMPTY_THOUGHT.match(text, start)
    if added and not EMPTY_THOUGHT.match(message["content"]):
        start = added.end()
        notes = ("other_prompt",)
    return start, notes


def _render_history(template: ChatTemplate, sample: Conversation, full: str) -> Rendered:
    """Returns the conversation up to its last trained turn, in which all turns are trained.

    Args:
        template: the chat template.
        sample: the conversation.
        full: the whole conversation, rendered.

    Raises:
        ValueError: if the text does not show earlier turns unchanged.
    """
    render = functools.partial(template, tools=sample.tools)
    *earlier, last = trained_turns(sample)
    whole = _render_turn(render, sample, last, full)
    question = [Message(role="user", content="0")]
    spans = []
    notes = set(whole.notes)
    try:
        end = _turn_end(render, sample.messages[: earlier[0]], question) if earlier else ""
        if earlier and not template.control_tokens.named_in(end):
            raise ValueError("the chat template ends no turn with a special token")
        for turn in earlier:
            start, more = _turn_start(render, sample.messages, turn, whole.text, question)
            notes.update(more)
            span = start, whole.text.find(end, start) + len(end)
            _check_shown(sample.messages[turn], whole.text[slice(*span)], turn)
            spans.append(span)
    except ValueError as error:
        raise ValueError(f"{error} (with data.turns=history; data.turns=each may do)") from None
    return whole._replace(spans=(*spans, *whole.spans), notes=tuple(sorted(notes)))


def _turn_end(render: _Render, history: Sequence[Message], question: Sequence[Message]) -> str:
    """Returns the text that the template writes after an answer, last message or not."""
    ends = []
    for after in ([], question):
        with_zero, with_one = (
            render([*history, Message(role="assistant", content=content), *after])
            for content in "01"
        )
        ends.append(with_zero[_common_length(with_zero, with_one) + 1 :])
    return ends[0][: _common_length(*ends)]


def _check_shown(message: Message, text: str, turn: int) -> None:
    """Checks that the text of a turn shows its whole message; white space may differ.

    Raises:
        ValueError: if a part is missing; the message names it.
    """
    fields: Mapping[str, Any] = message
    if not message["content"].strip() and not fields.get("tool_calls"):
        raise ValueError(
            f"has nothing in message {turn + 1}, of the assistant, which would be trained to say "
            'nothing; remove it, or give it "weight": 0'
        )
    for name in ("content", "reasoning_content", "thinking"):
        if not _is_shown(str(fields.get(name) or ""), text):
            raise ValueError(
                f"the chat template leaves {name} of message {turn + 1} out, or a part of it: of "
                f"{str(fields[name])[:60]!r} it shows {text[:60]!r}"
            )
    for call in fields.get("tool_calls") or []:
        called = str(call.get("function", call).get("name", ""))
        if not _is_shown(called, text):
            raise ValueError(
                f"the chat template does not show that message {turn + 1} calls {called!r}; it has "
                "no place for tool calls"
            )


def _shows_context(sample: Conversation, text: str) -> bool:
    """Returns whether a text shows all context before its last trained turn."""
    last = max(trained_turns(sample))
    told = [m["content"] for m in sample.messages[:last] if m["role"] != "assistant"]
    functions = [tool.get("function", tool) for tool in sample.tools]
    named = [str(f.get("name", "")) for f in functions if isinstance(f, dict)]
    # Some templates write the results of tools as JSON.
    return all(_is_shown(t, text) or _is_shown(json.dumps(t)[1:-1], text) for t in told + named)


def _is_shown(part: str, text: str) -> bool:
    """Returns whether a text contains a part, apart from white space."""
    return part in text or _squeezed(part) in _squeezed(text)


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _common_length(a: str, b: str) -> int:
    pairs = zip(a, b, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _encode_chunk(
    template: ChatTemplate, chunk: list[Rendered], options: MaskOptions
) -> Iterator[Encoded]:
    texts = [part.text for part in chunk]
    encode = _encode_covered if chunk[0].covered else _encode_texts
    for part, encoding in zip(chunk, encode(template, texts, chunk[0].templated), strict=True):
        if part.text:
            yield _encode_one(part, encoding, options)
        else:
            yield Encoded(name=part.name, example=None, notes=part.notes, reason=part.reason)


def _encode_texts(template: ChatTemplate, texts: list[str], templated: bool) -> list[Encoding]:
    # Token lists of a whole chunk would be many Python objects, so arrays are made text by text.
    batch = template.tokenizer(
        texts, add_special_tokens=not templated, return_attention_mask=False, verbose=False
    )
    return list(batch.encodings or ())


def _encode_covered(template: ChatTemplate, texts: list[str], templated: bool) -> list[Encoding]:
    return [template.control_tokens.encode(text, not templated) for text in texts]


def _encode_one(part: Rendered, encoding: Encoding, options: MaskOptions) -> Encoded:
    tokens = np.asarray(encoding.ids, np.int32)
    added = np.asarray(encoding.special_tokens_mask, bool)
    is_stop = np.zeros(len(tokens), bool)
    for stop_id in options.stop_ids:
        is_stop |= tokens == stop_id
    # One flat iterator, because a list of pairs of a long text takes much memory.
    edges = itertools.chain.from_iterable(encoding.offsets)
    covered = token_spans(np.fromiter(edges, np.int64, 2 * len(tokens)).reshape(-1, 2))
    turns = [_turn_mask(covered, span, added) for span in part.spans]
    notes = list(part.notes)
    # Looked for before the cut, which may take the stop token of the last turn away.
    if not all((turn & is_stop).any() for turn in turns):
        notes.append("no_stop")
    if options.completion_only:
        mask = np.any([_until_stop(turn, is_stop) for turn in turns], axis=0)
    else:
        mask = np.ones(len(tokens), bool)
    mask[:1] = False  # no position predicts the first token
    tokens, mask, length = tokens[: options.max_length], mask[: options.max_length], len(tokens)
    if not mask.any():
        return Encoded(part.name, None, (*part.notes, "masked"))
    if len(tokens) < length:
        notes.append("truncated")
    return Encoded(part.name, Example(tokens, mask), tuple(notes))


def token_spans(offsets: np.ndarray) -> np.ndarray:
    """Returns the character span `[start, end)` of each token, at least one character long.

    Byte-level tokenizers report an empty span after the space for a token that is only a space; its
    span becomes that space. Another empty span becomes the character at its position.

    Args:
        offsets: the tokenizer's offsets, [T, 2] int64.
    """
    starts = offsets[:, 0]
    ends = offsets[:, 1]
    before = np.concatenate([[0], np.maximum.accumulate(ends)[:-1]])[: len(ends)]
    starts = np.where(starts == ends, np.minimum(starts, before), starts)
    return np.stack([starts, np.maximum(ends, starts + 1)], axis=1)


def _turn_mask(covered: np.ndarray, span: tuple[int, int], added: np.ndarray) -> np.ndarray:
    """Returns the mask of the tokens with a character of the span, without tokens that were added.

    A token across the end of a prompt counts, because it may hold the completion's first word.
    """
    start, end = span
    return (covered[:, 0] < end) & (covered[:, 1] > start) & ~added


def _until_stop(turn: np.ndarray, is_stop: np.ndarray) -> np.ndarray:
    """Returns the mask of a turn without the tokens after its last stop token."""
    stops = np.flatnonzero(turn & is_stop)
    return turn & (np.arange(len(turn)) <= stops[-1]) if stops.size else turn
