"""Records that pass between modules. Imports no JAX, so that host-side code can use them.

Dimension legend, used in every shape annotation and einsum of the package:

    B rows · T positions · S key positions · G group · N query heads · K key/value heads
    H head dim · D model · F hidden · V vocabulary · L layers

`axis` always means a mesh axis (`data`, `fsdp`, `tensor`), `dim` an array dimension.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, TypedDict, runtime_checkable

import numpy as np

Array: TypeAlias = Any
"""NumPy on the host, `jax.Array` on devices, and whatever a tree of the same structure holds."""

LossSum: TypeAlias = tuple[Array, Array]
"""Sum of a loss and its weight, both [] float32; the loss is their quotient."""


class DependencyError(RuntimeError):
    """A failure outside the run that leaves its training state sound and worth saving."""


class Address(NamedTuple):
    """The meeting point of a run's processes, and the number of this one; JAX finds the rest."""

    coordinator: str = ""
    """`HOST:PORT` of process 0."""
    num_processes: int = 0
    process_id: int = -1


class Given(NamedTuple):
    """Arguments of a caller from Python, which no config file can hold."""

    rewards: tuple[Any, ...] = ()
    """Functions that score, or names as in `reward.names`, in place of that option."""
    rows: tuple[Any, ...] | None = None
    """Dicts to train on in place of files; None reads `data`."""
    eval_rows: tuple[Any, ...] | None = None
    """Dicts to evaluate on in place of files; None reads `data`."""


ENVIRONMENT = "environment"
"""Part of a run's `config.json` that is no option: JAX, devices and variables of the process."""

FROM_CALLER = "given to train.run"
"""Value of the data options in a run whose rows are no files."""

NOTHING_GIVEN = Given()
"""Nothing from a caller: a command's run takes everything from its config."""


class Message(TypedDict):
    """One turn of a chat, as chat templates take it."""

    role: str
    content: str


class SessionRows(NamedTuple):
    """Rows that one session of the Atlas runtime holds, for SFT and for GRPO."""

    lessons: list[dict[str, str]]
    questions: list[dict[str, str]]


@runtime_checkable
class Service(Protocol):
    """One place that metrics are reported to."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Reports scalars of one step."""

    def write_text(self, step: int, name: str, text: str) -> None:
        """Reports Markdown, where the service shows it."""

    def close(self) -> None:
        """Ends the report."""


class Example(NamedTuple):
    """One tokenized training sequence, ready to be packed or padded.

    Example:
        # prompt "2+2?" -> P0 P1, completion "4<eos>" -> C0 EOS
        Example(tokens=[P0, P1, C0, EOS], loss_mask=[False, False, True, True])
    """

    tokens: np.ndarray  # [T] int32
    loss_mask: np.ndarray  # [T] bool, true where this very token is a trained target


class Batch(NamedTuple):
    """A rectangle of token sequences, several per row when packed.

    Example of one packed row with two sequences of lengths 3 and 2, padded to 6:
        tokens      = [a0, a1, a2, b0, b1, 0]
        positions   = [ 0,  1,  2,  0,  1, 0]
        segment_ids = [ 1,  1,  1,  2,  2, 0]
        loss_mask   = [ F,  F,  T,  F,  T, F]

    The logits that predict `tokens[:, t]` are computed at `t - 1` of the same segment; a segment's
    first token is therefore never a target.
    """

    tokens: Array  # [B, T] int32
    positions: Array  # [B, T] int32, restarting at 0 in each segment
    segment_ids: Array  # [B, T] int32, 0 is padding
    loss_mask: Array  # [B, T] bool, true where this token, as a target, is trained on


class RowBounds(NamedTuple):
    """Bounds of a program's rows, by which attention needs no mask; 0 where nothing is known.

    On flash kernels a row that does not keep to them gives NaN, which ends a run.
    """

    segments: int = 0
    """Most segments of a row; a prompt and each of its completions count."""
    longest: int = 0
    """Most tokens of a segment."""
    prompt: int = 0
    """Most tokens of a prompt that completions share."""


UNKNOWN = RowBounds()
"""Bounds of rows of which nothing is known."""


class PolicyBatch(NamedTuple):
    """A rectangle of prompts and the completions that were sampled from them.

    A row is one prompt followed by several of its completions. Each sees the prompt and itself.
    Example of a prompt of 2 tokens with completions of 2 and 1 tokens, padded to 6:
        tokens       = [p0, p1, a0, a1, b0, 0]
        positions    = [ 0,  1,  2,  3,  2, 0]
        segment_ids  = [ 1,  1,  1,  1,  1, 0]
        sequence_ids = [ 0,  0,  1,  1,  2, 0]
        loss_mask    = [ F,  F,  T,  T,  T, F]

    Every array of numbers is aligned with `tokens`, and 0 where `loss_mask` is false.
    """

    tokens: Array  # [B, T] int32
    positions: Array  # [B, T] int32
    segment_ids: Array  # [B, T] int32, 0 is padding
    sequence_ids: Array  # [B, T] int32, the completion of its row, from 1; 0 is the prompt
    loss_mask: Array  # [B, T] bool, true where this token was sampled and is trained on
    advantages: Array  # [B, T] float32, of the token's completion, and of its turns
    rollout_logprobs: Array  # [B, T] float32, as the engine reported
    old_logprobs: Array | None = None  # [B, T] float32; None: those of the update itself
    ref_logprobs: Array | None = None  # [B, T] float32; None: no reference
    version_lags: Array | None = None  # [B, T] int32, updates since the writer; None: no lag


class TopTokens(NamedTuple):
    """The most probable next tokens of a teacher at each position, as its server reports them."""

    ids: Array  # [..., K] int32, the most probable one first; -1 for none
    logprobs: Array  # [..., K + 1] float32, in nats, the last one of all other tokens together


class TeacherBatch(NamedTuple):
    """Rows of a policy, and the rows in which its teacher reads the same completions.

    Each row holds one prompt and one completion. The teacher's prompt may be another one, so the
    rows of both sides have lengths of their own. Example of the prompts `p0` and `q0 q1 q2`:
        tokens         = [p0, a0, a1]      loss_mask = [F, T, T]      sources = [2, 3, 0]
        teacher.tokens = [q0, q1, q2, a0, a1, 0]
    """

    tokens: Array  # [B, T] int32
    positions: Array  # [B, T] int32
    segment_ids: Array  # [B, T] int32, 1, or 0 for padding
    loss_mask: Array  # [B, T] bool, true for the tokens of the completion
    teacher: Batch | None = None
    """The teacher's rows [B, S]; None: it reads those of the policy."""
    sources: Array | None = None
    """[B, T] int32, the place in the teacher's row from which it predicts the token that the policy
    predicts from here; 0 where that token is none of the completion. None: the same place."""
    top: TopTokens | None = None
    """The teacher as its server describes it [B, T], in place of a teacher here."""


class Completion(NamedTuple):
    """The continuation of one prompt by a model.

    An episode is one completion too: the turns of the model, and between them what tools or an
    environment said.
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]  # up to and including the stop token
    logprobs: tuple[float, ...]  # under the distribution that was sampled from; () if not known
    untruncated_logprobs: tuple[float, ...]  # the same before top_p, top_k and min_p
    finish_reason: str  # "stop", "length", "skipped: why" or "error: why"
    text: str  # without the stop token
    weights_version: int  # the oldest step whose weights took part in it
    sampled: tuple[bool, ...] = ()
    """True for each token that the model sampled; () if it sampled all of them. The others have
    log-probability 0 and are never trained."""
    version_spans: tuple[tuple[int, int], ...] = ()
    """The step whose weights wrote each token, as pairs of a step and a number of tokens; () if
    `weights_version` wrote all of them. Tokens that were not sampled belong to the turn after."""
    turn_rewards: tuple[tuple[int, float], ...] = ()
    """The rewards that an episode gave to its turns, as pairs of the number of tokens up to the end
    of the turn and the reward; turns without one are left out."""

    @property
    def token_versions(self) -> tuple[int, ...]:
        """The step whose weights wrote each token."""
        spans = self.version_spans or ((self.weights_version, self.num_tokens),)
        return tuple(version for version, count in spans for _ in range(count))

    @property
    def num_tokens(self) -> int:
        """Tokens after the prompt, the stop token and what tools said included."""
        return len(self.token_ids)

    @property
    def num_sampled(self) -> int:
        """Tokens that were sampled, the stop token included."""
        return sum(self.sampled) if self.sampled else len(self.token_ids)

    @property
    def is_skipped(self) -> bool:
        """True if no engine was asked, because of the sample itself, such as one too long."""
        return self.finish_reason.startswith("skipped")

    @property
    def is_failed(self) -> bool:
        """True if it has no text: it was skipped, or the engine that was asked had an error."""
        return self.is_skipped or self.finish_reason.startswith("error")

    @classmethod
    def failed(cls, reason: str, prompt_ids: tuple[int, ...] = ()) -> Completion:
        """Returns the completion that stands for a text that does not exist.

        Args:
            reason: "skipped: why" or "error: why".
            prompt_ids: the prompt, if an engine was asked.
        """
        return cls(
            prompt_ids=prompt_ids,
            token_ids=(),
            logprobs=(),
            untruncated_logprobs=(),
            finish_reason=reason,
            text="",
            weights_version=-1,
        )


class Question(NamedTuple):
    """One problem to teach, and everything else that its row says about it."""

    id: str
    text: str
    ground_truth: str  # "" if there is none
    fields: dict[str, str]  # further template fields
    row: Mapping[str, Any] = {}
    """The row as it was read, with lists, objects and columns of any name. No model sees it."""


class Reward(NamedTuple):
    """The verdict of a reward on one sample."""

    value: float | None  # None: no score
    details: dict[str, Any]  # for the record
    is_retryable: bool = False  # no score for a reason that may pass: scoring again may help
    is_skipped: bool = False  # no score because of the sample itself, such as a missing lesson
    applies: bool = True  # False: this reward has nothing to say of the sample, others may

    @property
    def is_outage(self) -> bool:
        """True if the score is missing because something that the run needs has failed."""
        return self.value is None and not self.is_skipped


_NOT_SCORED = Reward(value=None, details={"unscored": "no reward has seen it"})


class Sample(NamedTuple):
    """One member of a question's group, from the question to the row that trains.

    Each stage of a GRPO step takes samples and gives them back with more of their fields set:
    `rollout.teaching` the texts, the rewards `reward`, `recipes.feed` `advantage` and `trains`. The
    members of one question stand together and in order. Under `protocol=direct` the policy answers
    the question itself, and no student takes part; nor does one in an episode of a user's own.
    """

    question: Question
    completion: Completion  # of the policy, which is the model that is trained
    teaching: str = ""  # the lesson as the student reads it; "" is no teaching
    baseline: Completion | None = None  # the student's answer alone
    probe: Completion | None = None  # the student's description of its approach
    guided: Completion | None = None  # the student's answer with the lesson
    place: int = 0  # number of the question in the run
    member: int = 0  # number in the group of its question
    reward: Reward = _NOT_SCORED
    advantage: float = 0.0
    turn_advantages: tuple[tuple[int, float], ...] = ()
    """Advantages of the turns with a reward, as pairs of the number of tokens up to the end of the
    turn and what is added to `advantage` there and before."""
    trains: bool = False
    """True if the loss counts the completion."""
    messages: tuple[Message, ...] = ()
    """The whole conversation of an episode; () without one."""
    facts: Mapping[str, Any] = {}
    """Notes of an episode's function for rewards, such as the outcome of a game."""
    further_baselines: tuple[Completion, ...] = ()
    """Answers of the student alone after `baseline`, with `rollout.num_baseline`."""
    further_guided: tuple[Completion, ...] = ()
    """Answers of the student with the lesson after `guided`, with `rollout.num_guided`."""

    @property
    def answer(self) -> Completion:
        """The answer that counts: the student's with the lesson, else the policy's own."""
        return self.guided or self.completion

    @property
    def baselines(self) -> tuple[Completion, ...]:
        """All answers of the student alone; () without a student."""
        return () if self.baseline is None else (self.baseline, *self.further_baselines)

    @property
    def guided_answers(self) -> tuple[Completion, ...]:
        """All answers of the student with the lesson; () without a student."""
        return () if self.guided is None else (self.guided, *self.further_guided)


def by_question(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Returns the group of each question, in order."""
    return [list(group) for _, group in itertools.groupby(samples, lambda s: s.place)]


RewardFn = Callable[[Sequence[Sample]], list[Reward]]
"""Scores samples, in their order. It sees texts and metadata, and knows no JAX."""

Params = dict[str, Any]
"""A pure nested dict of arrays: the whole model, or anything of the same structure."""

Metrics = dict[str, tuple[Any, Any]]
"""`area/name` -> `(sum, weight)` until written; the value is `sum / weight`. See `metrics`."""
