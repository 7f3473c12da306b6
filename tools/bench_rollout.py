"""`tools/bench.py rollout`: how busy servers are while questions of several steps are in flight.

With --simulate stand-ins for servers write texts of random lengths in virtual time: a token takes a
millisecond, and an update 7 % of a step that goes through three barriers. Lengths are log-normal up
to a limit. At 4 questions of 32 they are such that three barriers a step would keep the teacher's
servers busy for 36 % of the time, the student's for the rest, and 17 of 128 seats taken.
"""

from __future__ import annotations

import argparse
import asyncio
import selectors
from collections.abc import Awaitable, Sequence
from typing import Any, NamedTuple

import _checkout  # noqa: F401  (comes first: see there)
import numpy as np

from atlas_jax import addresses
from atlas_jax.recipes import chat_models
from atlas_jax.recipes.rollouts import Window
from atlas_jax.rollout import teaching
from atlas_jax.rollout.engine import ChatModel, Request
from atlas_jax.rollout.sampling import Sampling
from atlas_jax.rollout.servers import PoolOptions, ServerPool, least_loaded
from atlas_jax.rollout.timing import Meter, Trace, Workload
from atlas_jax.rollout.vllm import VllmEngine
from atlas_jax.startup import model as models
from atlas_jax.types import Completion, Question

_SEATS = 128  # of each server
_SECS_PER_TOKEN = 0.001
_MEDIANS = {"baseline": 200.0, "probe": 380.0, "policy": 164.0, "guided": 218.0}  # tokens
_SPREAD = 1.2  # standard deviation of the logarithm of a length
_LONGEST = 2000  # tokens
_UPDATE = 0.07  # of a step that goes through three barriers
_TEMPLATES = teaching.Templates(
    baseline="baseline {question}",
    diagnostic="probe {question}",
    teacher="policy {question} {approach}",
    with_teaching="guided {question} {teaching}",
    direct="policy {question}",
)


class _Models(NamedTuple):
    policy: ChatModel
    student: ChatModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of this recipe."""
    parser.add_argument("--simulate", action="store_true", help="random lengths in virtual time")
    parser.add_argument("--servers", type=int, default=4, help="simulated servers of each role")
    parser.add_argument("--processes", type=int, default=1, help="simulated, which share a step")
    parser.add_argument("--questions", type=int, default=4, help="of a step, over all processes")
    parser.add_argument("--generations", type=int, default=32)
    parser.add_argument("--staleness", type=int, default=0)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="", help="directory of the servers' tokenizer")
    parser.add_argument("--teacher-servers", default="", metavar="URLS")
    parser.add_argument("--student-servers", default="", metavar="URLS")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--update-secs", type=float, default=0.0, help="time of an update")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the steps and returns the figures."""
    if args.simulate:
        return _simulate(args)
    if not (args.model and args.teacher_servers and args.student_servers):
        raise ValueError(
            "--model, --teacher-servers and --student-servers are needed; --simulate needs none"
        )
    return _ask_servers(args)


def _simulate(args: argparse.Namespace) -> dict[str, Any]:
    barriers = _Barriers(args)
    loop = _VirtualLoop()
    roles = [_Servers(args.servers, args.seed, loop) for _ in _Models._fields]
    processes = [
        _Models(*(servers.seen_by(number, args.processes) for servers in roles))
        for number in range(args.processes)
    ]
    limits = teaching.Limits(policy=10**6, probe=10**6, answer=10**6, prompt=10**6)
    try:
        work = _drive(args, processes, limits, Meter(loop.time), barriers.update_secs)
        usage = loop.run_until_complete(work)
    finally:
        loop.close()
    figures = _figures(args, usage)
    return figures | {
        "barriers_teacher_frac": round(barriers.teacher_frac, 3),
        "barriers_wall_secs": round(barriers.wall_secs, 3),
        "wall_frac": round(figures["wall_secs"] / barriers.wall_secs, 3),
        "servers": args.servers,
        "processes": args.processes,
        "uneven_frac": round(max(servers.uneven_frac for servers in roles), 3),
    }


def _ask_servers(args: argparse.Namespace) -> dict[str, Any]:
    tokenizer = models.load_tokenizer(args.model)
    options = PoolOptions(256, 1800.0, 600.0)
    urls = {"teacher": args.teacher_servers, "student": args.student_servers}
    pools = {r: ServerPool(r, addresses.split(text), options) for r, text in urls.items()}
    try:
        for pool in pools.values():
            pool.open()
        pair = _Models(*(_served(pool, tokenizer) for pool in pools.values()))
        limits = teaching.Limits(*(args.max_new_tokens,) * 3, prompt=10**6)
        work = _drive(args, [pair], limits, Meter(), args.update_secs)
        return _figures(args, asyncio.run(work))
    finally:
        for pool in pools.values():
            pool.close()


def _served(pool: ServerPool, tokenizer: Any) -> ChatModel:
    engine = VllmEngine(pool, tokenizer, (tokenizer.eos_token_id,), len(tokenizer))
    encode_turn = chat_models.turn_encoder(models.ChatTemplate(tokenizer), "")
    context = min(start.max_model_len for start in pool.starts)
    return ChatModel(
        encode=chat_models.asking(encode_turn),
        generate=engine.generate,
        context=context,
        vocab_size=len(tokenizer),
        encode_turn=encode_turn,
        complete=engine.complete,
    )


async def _drive(
    args: argparse.Namespace,
    processes: Sequence[_Models],
    limits: teaching.Limits,
    meter: Meter,
    update_secs: float,
) -> Workload:
    """Takes the steps one after another, with an update after each, as a run does.

    The questions of a step are dealt to the processes, each with its own view of the servers.
    """
    protocol = teaching.TeachingProtocol(_TEMPLATES, limits, args.generations, "whole")
    draws = teaching.Draws(Sampling(1.0), args.seed)

    async def step(position: int) -> None:
        trace = Trace(meter)
        asking = [teaching.open_lines(*pair, protocol, draws, trace) for pair in processes]
        end = min(position + args.questions, args.steps * args.questions)
        places = range(position, end)
        await asyncio.gather(
            *(teaching.ask(_question(p), p, asking[p % len(asking)]) for p in places)
        )

    def begin(_: ChatModel, position: int) -> Awaitable[None]:
        return asyncio.ensure_future(step(position))

    window = Window(begin, args.staleness, args.questions)
    for number in range(args.steps):
        await window.next(processes[0].policy, number * args.questions)
        await asyncio.sleep(update_secs)
    return meter.read()


def _question(place: int) -> Question:
    return Question(str(place), f"{place}: explain why 7 + {place} is what it is.", "", {})


def _figures(args: argparse.Namespace, usage: Workload) -> dict[str, Any]:
    return {
        "system": "atlas_jax",
        "simulated": args.simulate,
        "questions": args.questions,
        "generations": args.generations,
        "staleness": args.staleness,
        "teacher_busy_frac": round(usage.busy_secs["teacher"] / usage.secs, 3),
        "student_busy_frac": round(usage.busy_secs["student"] / usage.secs, 3),
        "seats_mean": round(sum(usage.seat_secs.values()) / usage.secs, 1),
        "tok_s": round(usage.tokens / usage.secs, 1),
        "wall_secs": round(usage.secs, 3),
    }


def _length(phase: str, place: int, member: int, seed: int) -> int:
    """Returns the number of tokens of one text."""
    key = (seed, place, list(_MEDIANS).index(phase), member)
    size = _MEDIANS[phase] * np.exp(_SPREAD * np.random.default_rng(key).normal())
    return int(np.clip(round(size), 1, _LONGEST))


class _Barriers:
    """Steps in which each phase waits for the slowest text of the phase before it.

    The student answers alone and tells its approach, then the teacher writes all lessons, then the
    student answers them. Of the steps ahead one is in work at a time.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        alone = self._longest(args, ("baseline", "probe"), 1)
        lessons = self._longest(args, ("policy",), args.generations)
        secs = alone + lessons + self._longest(args, ("guided",), args.generations)
        self.update_secs = float(secs.mean()) * _UPDATE / (1 - _UPDATE)
        waits = np.maximum(secs, self.update_secs) if args.staleness else secs + self.update_secs
        self.wall_secs = float(waits.sum()) + bool(args.staleness) * self.update_secs
        self.teacher_frac = float(lessons.sum() / secs.sum())

    def _longest(self, args: argparse.Namespace, phases: Sequence[str], members: int) -> np.ndarray:
        """Returns the seconds of the longest of several texts, by step."""
        texts = [
            [
                _length(phase, place, member, args.seed)
                for phase in phases
                for member in range(members)
            ]
            for place in range(args.steps * args.questions)
        ]
        longest = np.asarray(texts).max(axis=1).reshape(args.steps, args.questions).max(axis=1)
        return longest * _SECS_PER_TOKEN


class _Servers:
    """Servers of one role: each takes so many seconds for a token, whatever else it writes."""

    def __init__(self, count: int, seed: int, loop: _VirtualLoop) -> None:
        self._seed = seed
        self._loop = loop
        self._seats = [asyncio.Semaphore(_SEATS) for _ in range(count)]
        self._busy_secs = [0.0] * count
        """Sum over requests of their time at each server."""

    @property
    def uneven_frac(self) -> float:
        """Largest difference of a server's load from the mean load, as a share of the mean."""
        loads = np.asarray(self._busy_secs)
        return float(np.abs(loads / loads.mean() - 1).max())

    def seen_by(self, process: int, processes: int) -> ChatModel:
        """Returns the servers as the questions of one process see them.

        As with `ServerPool`, it counts its own requests alone.
        """
        count = len(self._seats)
        loads = [0] * count
        following = process * count // processes

        async def complete(request: Request, sample: int, _: Sampling) -> Completion:
            nonlocal following
            number = least_loaded(loads, following)
            following = number + 1
            loads[number] += 1
            begun = self._loop.time()
            async with self._seats[number]:
                completion = await self._complete(request, sample)
            loads[number] -= 1
            self._busy_secs[number] += self._loop.time() - begun
            return completion

        return ChatModel(
            encode=lambda text: tuple(map(ord, text)),
            generate=lambda requests, sampling: [],
            context=10**9,
            vocab_size=0x110000,
            encode_turn=lambda messages, ended_by=None: (),
            complete=complete,
        )

    async def _complete(self, request: Request, sample: int) -> Completion:
        phase, question, *more = "".join(map(chr, request.prompt_ids)).split()
        # A guided answer is a request of its own, whose prompt ends with the lesson's text.
        member = int(more[-1]) if phase == "guided" else sample
        size = _length(phase, int(question.strip(":")), member, self._seed)
        await asyncio.sleep(size * _SECS_PER_TOKEN)
        return Completion(
            prompt_ids=request.prompt_ids,
            token_ids=(1,) * size,
            logprobs=(),
            untruncated_logprobs=(0.0,) * size,
            finish_reason="stop",
            text=f"{phase} {sample}",
            weights_version=0,
        )


class _VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose waits pass at once."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_Jumping(self))

    def time(self) -> float:
        """Returns the virtual time in seconds."""
        return self.now


class _Jumping(selectors.SelectSelector):
    def __init__(self, loop: _VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: Any = None) -> Any:
        self._loop.now += timeout or 0.0
        return super().select(0)


if __name__ == "__main__":
    raise SystemExit("error: this is a part of tools/bench.py rollout and no command; run that")
