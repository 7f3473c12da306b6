r"""Extraction of answers from texts, and their comparison with the ground truth.

`extract_answer` finds the span of the answer, and `normalise` converts it to a canonical form:

    "… **Final Answer:** $\frac{6}{4}$ cups."  ->  "\frac{6}{4} cups"  ->  "3/2"

`is_correct` tells whether a text gives the ground truth; `equality` defines which answers are
equal. Every function takes time linear in the length of the text, for any text of a model.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Iterator

from atlas_jax.rewards import choices, conclusions, equality, numbers, statements, symbolic
from atlas_jax.rewards.plain import TAIL, clean, plain

_TAG = re.compile(r"< ?(/?) ?(solution|answer) ?>", re.IGNORECASE)
_BRACE = re.compile(r"(\\(?:boxed|fbox) ?)?\{|\}|\\[{}]")
_BOXED_TOKEN = re.compile(r"\\(?:boxed|fbox) {1,4}(-?[\d.,]*\d|[A-Za-z](?![A-Za-z]))")
_HASHES = re.compile(r"(?<!#)####[ \t]*([^\n#]*)")
_JSON = re.compile(
    r'"(?:final_?|correct_?)?answer"\s{0,8}:\s{0,8}(?:("(?:[^"\\\n]|\\.)*+")|(\[[^\[\]{}\n]{0,200}\]|[^\s,{}\[\]"]++))',
    re.IGNORECASE,
)
_MARKER = re.compile(
    r"(?<!\w)(?:the\s{1,4}|my\s{1,4})?(?:final[\s_]{1,4}|correct\s{1,4}|right\s{1,4})?"
    r"(?:answer(?:[\s*_]{1,8}(?:is|was|would be|should be|will be|must be|comes to|equals)\b(?!n't)"
    r"|[\s*_\"]{0,8}(?:[:=→⇒]|->)|\s{1,4}[-–—](?=\s))"
    r"|ans\.?\s{0,4}[:=]|(?:respuesta|réponse|resposta|risposta)(?:\s{1,4}\w{1,12})?\s{1,4}(?:es|est|é|è)\b"
    r"|antwort\s{1,4}(?:ist|lautet)\b|答案\s{0,4}(?:是|为|为|：|:))"
    r"|^[#*_ ]{1,8}(?:final )?answer[*_: ]{0,8}$",
    re.IGNORECASE | re.MULTILINE,
)
_CLAUSE_END = re.compile(
    r"(?<!times)(?<!many)(?<!much),?\s(?:because|since|so|which|as)\b|\s\(|,\s(?:not|rather|instead)\b"
    r"|\s(?:not|rather\sthan|instead\sof)\s(?=[$€£]?\d)",
    re.IGNORECASE,
)
_CONTRAST = re.compile(
    r"not (?!only\b|just\b|merely\b)[^,;]{1,60}?"
    r"(?:,? but (?:rather )?|[,;.] (?:it|the answer)(?: is|'s) )(?!not\b)",
    re.IGNORECASE,
)
_PREDICATE = re.compile(r".{1,80} (?:is|are|equals) (?=\S)(?!.* (?:is|are|equals) )")
_RESTATED = re.compile(r"(.{1,80}?),? or (?:about |approximately |roughly )?(.{1,80})")
_MAX_SAID = 400  # longest statement, in characters, whose predicate is read
_LISTED = re.compile(r"[,;]\s|\b(?:and|or)\b", re.IGNORECASE)
_EQUALS = re.compile(r"(?<![=<>!:])=(?![=>])")
_ALGEBRA = re.compile(
    r"\d ?[a-z](?![a-z])|[a-z] ?(?:\^|\*\*)|[+*/-] ?[a-z](?![a-z])", re.IGNORECASE
)
_DENIAL = re.compile(
    r"\b(?:no|not|never|none|cannot|neither|wrong|incorrect)\b|n't\b", re.IGNORECASE
)
_ANNOUNCED = re.compile(r"(?:output|result|answer|prints?)\b[^\n]{0,40}:\s*$", re.IGNORECASE)


def extract_answer(text: str) -> str | None:
    r"""Returns the span of the answer that a text gives; None if it gives none.

    Only the text after the last `</think>` is read. The answer is the first of these that exists:
    the last complete `<solution>`, or else `<answer>`; the last closed `\boxed` or `\fbox`; GSM8K's
    `####`; the value of "answer" in JSON; the text after the last "Final Answer:", "Answer:", "the
    answer is" or "answer ="; the whole text if it is one option of multiple choice; the option that
    the text chooses; the output that it shows; yes or no; the number that its last sentence gives.
    """
    written = _behind_thinking(text)
    return _unmarked_or(marked_answer(written), written)


def normalise(answer: str) -> str:
    """Returns the canonical form of an answer, which all spellings of it share.

    Numbers become exact fractions in lowest terms, without currency, percent sign and unit; units
    are not compared. Everything else becomes lower-case text without articles, spaces around marks
    and LaTeX spacing.
    """
    return str(equality.read(answer))


# Cached: the reward, the metrics of a step and the search for leaks compare the same texts.
@functools.lru_cache(maxsize=2048)
def is_correct(text: str, ground_truth: str, is_cut: bool = False) -> bool:
    """Returns whether the answer that a text gives is the ground truth.

    Options of multiple choice are compared by their letters if both have one, yes and no by the
    first words of a sentence. The ground truth may be a whole solution that marks its answer. If
    our comparison does not find the two equal, math-verify is asked too, if it is installed.

    Args:
        text: the text of a model.
        ground_truth: the known answer.
        is_cut: whether the limit of length cut the text. Such a text must mark its answer, and the
            mark must be complete.
    """
    truth = marked_answer(ground_truth) or ground_truth
    if not clean(truth):
        return False
    written = _behind_thinking(text)
    marked = _whole_mark(written) if is_cut else marked_answer(written)
    if (wanted := choices.verdict(truth)) is not None:
        sentences = [marked] if marked else [] if is_cut else _edges(written)
        said = (choices.said_verdict(s) for s in sentences)
        return next((s for s in said if s is not None), None) == wanted
    answer = marked if is_cut else _unmarked_or(marked, written)
    return answer is not None and _is_answer(answer, truth)


def marked_answer(text: str) -> str | None:
    """Returns the answer in tags, in a box, or announced; None without such a mark."""
    return _enclosed(text) or _announced(text)


def _behind_thinking(text: str) -> str:
    """Returns the text after the thoughts, or the whole text if nothing follows them."""
    said = text.rpartition("</think>")[2]
    return said if said.strip() else text


def _whole_mark(text: str) -> str | None:
    """Returns the marked answer of a text that was cut, if its mark is closed or ends before."""
    whole = re.match(r"(?s).*(?:\n|[.!?;](?=\s))", text)
    return _enclosed(text) or (_announced(whole[0]) if whole else None)


def _enclosed(text: str) -> str | None:
    """Returns the answer in tags or in a box."""
    tags = list(_TAG.finditer(text))
    for name in ("solution", "answer"):
        own = itertools.pairwise(tag for tag in tags if tag[2].lower() == name)
        spans = [(a.end(), b.start()) for a, b in own if not a[1] and b[1]]
        for start, end in reversed(spans):
            if clean(text[start:end]):
                return _inside_tag(text[start:end])
    return _boxed(text)


def _announced(text: str) -> str | None:
    """Returns the answer that follows marks or words which announce it."""
    return _behind_hashes(text) or _in_json(text) or _behind_marker(text)


def _inside_tag(text: str) -> str:
    """Returns the answer in the content of a tag; several lines are read as a text."""
    content = clean(text)
    answer = _boxed(text) or _announced(text)
    if answer is None and "\n" in content and "\\begin" not in content:
        answer = _conclusion(content)
    return answer or content


def _boxed(text: str) -> str | None:
    r"""Returns the content of the last `\boxed` that is closed and not empty."""
    open_braces: list[re.Match[str]] = []
    spans = [match.span(1) for match in _BOXED_TOKEN.finditer(text)]
    for brace in _BRACE.finditer(text):
        if brace[0].endswith("{") and len(brace[0]) != 2:
            open_braces.append(brace)
        elif brace[0] == "}" and open_braces and (opened := open_braces.pop())[1]:
            spans.append((opened.end(), brace.start()))
    contents = (clean(text[start:end]) for start, end in sorted(spans, reverse=True))
    return next(filter(None, contents), None)


def _behind_hashes(text: str) -> str | None:
    """Returns the number after the last `####`, or any text after it that ends the text."""
    end = len(text.rstrip())
    for hashes in reversed(list(_HASHES.finditer(text))):
        answer = _behind_marker(hashes[1]) or _statement(hashes[1])
        if answer and (hashes.end() >= end or equality.is_plain_number(answer)):
            return answer
    return None


def _in_json(text: str) -> str | None:
    """Returns the value of the last "answer" in JSON."""
    for match in reversed(list(_JSON.finditer(text))):
        try:
            value = json.loads(match[1], strict=False) if match[1] else match[2]
        except ValueError:  # LaTeX whose backslashes are not escaped
            value = match[1][1:-1]
        if clean(value):
            return clean(value)
    return None


def _behind_marker(text: str) -> str | None:
    """Returns the statement in the first line with words after the last such marker."""
    for part in reversed(_MARKER.split(text)[1:]):
        lines = filter(str.strip, part.splitlines())
        if answer := next(filter(None, map(_statement, lines)), None):
            return answer
    return None


def _statement(line: str) -> str:
    """Returns the answer in a line: a leading number, the value of the last "=", or a sentence."""
    text = _CONTRAST.sub("", clean(line).rstrip(TAIL), count=1)
    if not text:
        return ""
    sentence = clean(conclusions.SENTENCE_END.split(text, maxsplit=1)[0])
    clause = clean(_CLAUSE_END.split(sentence, maxsplit=1)[0])
    number = next(filter(equality.is_plain_number, (text, sentence, clause)), None)
    result = _result(text) if number is None else None
    return number or (result and _statement(result)) or sentence


def _result(text: str) -> str | None:
    """Returns the result of a chain of equations; None for algebra and for other texts."""
    parts = _EQUALS.split(text)
    if len(parts) < 2 or any(map(_LISTED.search, parts[1:-1])) or _DENIAL.search(parts[0]):
        return None
    if len(parts) == 2 and equality.is_plain_number(parts[0]):
        return parts[0]
    if re.match(r"\\(?:int|sum|prod|lim)", parts[0].strip()) or (
        len(parts) > 2 and not re.search("[A-Za-z]", parts[-2])
    ):
        return parts[-1]
    return None if any(map(_ALGEBRA.search, parts[:-1])) else parts[-1]


def _unmarked_or(marked: str | None, text: str) -> str | None:
    return (
        marked
        or choices.bare_option(text)
        or choices.chosen(text)
        or _output(text)
        or _conclusion(text)
        or _bare_verdict(text)
    )


def _bare_verdict(text: str) -> str | None:
    return next((s for s in _edges(text) if choices.said_verdict(s) is not None), None)


def _edges(text: str) -> list[str]:
    """Returns the last and the first sentence of a text."""
    sentences = [s for s in conclusions.SENTENCE_END.split(text.strip()) if s.strip()]
    return [sentences[-1].strip(), sentences[0].strip()] if sentences else []


def _output(text: str) -> str | None:
    """Returns the only line of a code block that ends a text and is announced as output."""
    text = text.rstrip()
    if not text.endswith("```"):
        return None
    before, fence, block = text[:-3].rpartition("```")
    lines = block.partition("\n")[2].strip().splitlines()
    return lines[0] if fence and len(lines) == 1 and _ANNOUNCED.search(before[-80:]) else None


def _conclusion(text: str) -> str | None:
    """Returns the conclusion of a text."""
    value = conclusions.conclusion(text)
    if value is None or value.endswith("!"):  # a factorial
        return value
    return _statement(value)


def _is_answer(answer: str, truth: str) -> bool:
    """Returns whether an extracted answer, or a statement in it, is the ground truth."""
    wanted = choices.option(truth)
    given = choices.option(answer)
    if wanted and given:
        return given.agrees(wanted)
    if wanted and (led := choices.led_by(answer) or (choices.chosen(answer) or "").lower()):
        return led == wanted.letter
    target = wanted.text if wanted and wanted.text else truth
    readings = list(_readings(answer))
    if any(equality.same(reading, target) for reading in readings):
        return True
    number = numbers.quantity(plain(clean(target)))
    if number is not None:
        stated = statements.stated(plain(clean(answer)))
        return any(quantity.agrees(number) for quantity in stated)
    return symbolic.same(answer, target)


def _readings(answer: str) -> Iterator[str]:
    """Yields an answer and its other readings: an option's text, a result, a subject."""
    option = choices.option(answer)
    text = (option and option.text) or answer
    yield answer
    yield text
    if result := _result(text):
        yield result
    if (restated := _RESTATED.fullmatch(text)) and _are_one(*restated.groups()):
        yield restated[1]
    exact = text.replace("≈", "\\approx").partition("\\approx")[0]
    if exact != text and exact.strip():
        yield exact
    if len(text) < _MAX_SAID and (said := _PREDICATE.match(text)) and not _DENIAL.search(text):
        predicate = text[said.end() :]
        if not re.search("[A-Za-z]{3}", predicate) and not equality.is_plain_number(predicate):
            yield predicate
    subject = re.match(r"(.{1,80}?) (?:is|was|are|were|because|since)\b(.*)", text)
    if subject and not _DENIAL.search(subject[2]) and not subject[1][-1].isdigit():
        yield subject[1]


def _are_one(first: str, second: str) -> bool:
    """Returns whether two numbers are equal, the second possibly in percent."""
    one, other = (numbers.quantity(plain(clean(part))) for part in (first, second))
    if one is None or other is None:
        return False
    return one.value == other.value or ("%" in second and 100 * one.value == other.value)
