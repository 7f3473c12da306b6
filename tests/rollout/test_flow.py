"""Questions that move alone ask what batches ask, and wait for nothing else."""

import asyncio
import threading
import time

import pytest

from atlas_jax.rollout import teaching
from atlas_jax.rollout.engine import Request
from atlas_jax.rollout.lines import Line, PhaseRequest
from atlas_jax.rollout.sampling import Sampling
from atlas_jax.rollout.servers import least_loaded
from atlas_jax.rollout.student_cache import StudentCache
from atlas_jax.rollout.teaching import Draws
from atlas_jax.rollout.timing import Phase, Trace
from atlas_jax.types import DependencyError, by_question
from tests.rollout.scripts import Script, completion, protocol, questions

DRAWS = Draws(Sampling(), 7)


class Served(Script):
    """A script that answers every sample by itself, after as long as `secs(prompt, member)`."""

    def __init__(self, say, secs=lambda prompt, member: 0.0):
        super().__init__(say)
        self._secs = secs
        self.sent = []
        self.ended = []

    @property
    def model(self):
        """The script as a model of servers."""
        return super().model._replace(complete=self._one)

    async def _one(self, request, sample, sampling):
        prompt = "".join(map(chr, request.prompt_ids))
        self.sent.append((prompt, request.seed, sample, request.max_tokens))
        await asyncio.sleep(self._secs(prompt, sample))
        self.ended.append((prompt, sample))
        return self._complete(request, sample)


def pupil(prompt, member):
    return f"approach of {prompt[-2:]}" if prompt.startswith("probe") else prompt[-6:]


def tutor(prompt, member):
    return "nothing" if member == 2 else f"<teaching>say {member}</teaching>"


@pytest.mark.parametrize("direct", [False, True])
def test_single_samples_have_the_prompts_seeds_and_results_of_batches(direct):
    found = []
    for kind in (Script, Served):
        policy, student = kind(tutor), kind(pupil)
        models = policy.model, None if direct else student.model
        samples = teaching.run(questions(3), [4, 5, 6], *models, protocol(), DRAWS)
        found.append((samples, policy, student))
    (batched, *scripts), (alone, *served) = found
    assert alone == batched
    for script, server in zip(scripts, served, strict=True):
        asked = [
            (prompt, request.seed, sample, request.max_tokens)
            for prompt, request in zip(script.prompts, script.requests, strict=True)
            for sample in range(request.num_samples)
        ]
        assert sorted(server.sent) == sorted(asked)
        assert not server.calls


def test_a_lesson_is_answered_while_others_are_written_and_needs_no_baseline():
    policy = Served(tutor, lambda prompt, member: 0.3 if "q1" in prompt or member else 0.0)
    student = Served(pupil, lambda prompt, member: 0.6 if prompt.startswith("alone") else 0.0)
    ends = []
    for server, name in ((policy, "policy"), (student, "student")):
        server._complete = lambda r, g, s=server, n=name: (
            ends.append((n, "".join(map(chr, r.prompt_ids)), g)),
            Script._complete(s, r, g),
        )[1]
    samples = teaching.run(questions(2), range(2), policy.model, student.model, protocol(), DRAWS)
    order = [(name, prompt.split()[0], "q0" in prompt, g) for name, prompt, g in ends]
    first = order.index(("student", "with", True, 0))
    assert first < order.index(("policy", "teach", True, 1))
    assert order.index(("student", "with", False, 0)) < order.index(("student", "alone", True, 0))
    assert [len(group) for group in by_question(samples)] == [3, 3]
    assert {s.baseline.text for s in samples if s.question.text == "q1"} == {"one q1"}


def test_an_error_of_one_question_is_that_of_all():
    async def lost(request, sample, sampling):
        raise DependencyError("no server is left")

    student = Served(pupil, lambda prompt, member: 1000.0 if "q1" in prompt else 0.0)
    policy = Served(tutor).model._replace(complete=lost)
    start = time.monotonic()
    with pytest.raises(DependencyError, match="no server is left"):
        teaching.run(questions(2), range(2), policy, student.model, protocol(), DRAWS)
    assert time.monotonic() - start < 300


def test_a_batch_begins_when_nothing_else_can_be_done():
    """All that the questions have to ask goes into one call, whichever was ready first."""
    policy, student = Script(tutor), Script(pupil)
    models = policy.model, student.model
    teaching.run(questions(5), range(5), *models, protocol(), DRAWS)
    assert [len(call) for call in student.calls] == [10, 10]
    assert [len(call) for call in policy.calls] == [5]


@pytest.mark.parametrize("waits", [[True, False], [False, True], [True, True]])
def test_processes_generate_as_often_as_any_of_them(waits):
    """A process without questions goes through the batches of one that has some."""
    flags, lock = [False, False], threading.Barrier(2)

    def goes_on(process):
        def ask(waiting):
            flags[process] = waiting
            lock.wait(20)
            any_waits = any(flags)
            lock.wait(20)
            return any_waits

        return ask

    scripts = [(Script(tutor), Script(pupil)) for _ in waits]
    found = [None, None]

    def generate(process):
        models = [script.model._replace(goes_on=goes_on(process)) for script in scripts[process]]
        count = 2 if waits[process] else 0
        found[process] = teaching.run(questions(count), range(count), *models, protocol(), DRAWS)

    threads = [threading.Thread(target=generate, args=(process,)) for process in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert [len(samples) for samples in found] == [6 * has for has in waits]
    calls = [[len(script.calls) for script in pair] for pair in scripts]
    assert calls == [[1, 2]] * 2


def test_the_least_loaded_server_is_chosen_and_of_equal_ones_the_next():
    assert least_loaded([2, 1, 3, 1], 0) == 1
    assert least_loaded([2, 1, 3, 1], 2) == 3
    assert least_loaded([0, None, 0], 1) == 2
    assert least_loaded([1, 1], 5) == 1


def test_what_is_kept_of_the_student_is_bounded_and_the_least_used_goes_first():
    cache = StudentCache("always", max_tokens=10)
    request = lambda number: Request((number, 1), 4, seed=number)  # noqa: E731
    for number in (1, 2):
        cache.put(request(number), Sampling(), completion("a", 2, prompt="pp"))
    assert cache.get(request(1), Sampling())
    cache.put(request(3), Sampling(), completion("c", 3, prompt="pp"))  # 4 + 4 + 5 tokens
    assert cache.get(request(2), Sampling()) is None
    assert cache.get(request(1), Sampling()).text == "a"
    assert cache.get(request(3), Sampling()).text == "c"
    assert cache.get(request(3), Sampling(0.5)) is None
    assert cache.get(request(3)._replace(max_tokens=5), Sampling()) is None
    assert cache.counts() == (3, 6)


def test_failed_texts_and_drawn_ones_are_not_kept():
    cache = StudentCache("greedy")
    cache.put(Request((1,), 4, 0), Sampling(0.0), completion("", 0, "error: lost"))
    cache.put(Request((1,), 4, 0), Sampling(1.0), completion("a"))
    assert cache.get(Request((1,), 4, 0), Sampling(0.0)) is None
    assert cache.get(Request((1,), 4, 0), Sampling(1.0)) is None


def test_a_request_that_does_not_fit_is_done_at_once():
    async def ask():
        line = Line(Served(pupil).model, Sampling(), Trace())
        request = Request((1, 2, 3), 4, 0, num_samples=2)
        written = line.ask(PhaseRequest(Phase.POLICY, 0, 0, request), 6)
        return [future.result().finish_reason for future in written]

    reason = "skipped: prompt of 3 tokens and 4 new ones exceed 6"
    assert asyncio.run(ask()) == [reason] * 2
