"""Reward functions of a user's own module, as a run calls them."""

import contextlib
import os
import re
import subprocess
import sys
import textwrap
import threading
import time

import psutil
import pytest

from atlas_jax import config as config_lib
from atlas_jax import stopping
from atlas_jax.options import fields
from atlas_jax.recipes import scoring
from atlas_jax.rewards import custom, forms
from atlas_jax.rewards.combined import combine
from atlas_jax.types import Completion, Question, Sample

MODULE = """
import asyncio, os, pathlib, subprocess, sys, time

HERE = pathlib.Path(__file__).parent

def brevity(sample):
    return 1 - len(sample.completion.text) / 10

def passed(sample):
    tests = sample.question.row["tests"]
    return sum(eval(sample.completion.text, {"x": t["x"]}) == t["y"] for t in tests) / len(tests)

def faulty(sample):
    if sample.question.id == "q1":
        raise KeyError("no\\nsuch thing")
    return 2

def hanging(sample):
    if sample.question.id == "q1":
        child = subprocess.Popen(["sleep", "1000"])
        (HERE / "hanging").write_text(f"{os.getpid()} {child.pid}")
        while True:
            pass
    return 2

def dying(sample):
    return os._exit(7) if sample.question.id == "q1" else 2

def sometimes(sample):
    return None if sample.question.id == "q1" else 2

def noisy(sample):
    print("noise on standard output")
    return float("jax" in sys.modules)

def where(sample):
    return os.getpid()

def batched(samples):
    return [len(samples) + s.member for s in samples]

def short(samples):
    return [1.0]

def worded(samples):
    return ["good" for _ in samples]

def columns(prompts, completions, completion_ids, tests, missing=None, **kwargs):
    assert missing is None and "prompt" not in kwargs
    return [
        len(tests[i]) + 10 * len(completion_ids[i]) + 100 * len(tag) + 1000 * (prompts[i] == "2x?")
        for i, tag in enumerate(kwargs["tag"])
    ]

def chat(prompts, completions, **kwargs):
    return [float(p[-1]["content"] == "hi" and c[0]["content"] == "x + x")
            for p, c in zip(prompts, completions)]

def absent(completions, difficulty):
    return [1.0 for _ in completions]

async def patient(sample):
    await asyncio.sleep(0.3)
    return 3

BEGUN = []

async def together(sample):
    BEGUN.append(sample)
    while len(BEGUN) < 20:
        await asyncio.sleep(0.01)
    return 3

async def endless(sample):
    if sample.question.id == "q1":
        (HERE / "endless").touch()
        await asyncio.sleep(1000)
    return 3

async def blocking(sample):
    if sample.question.id == "q1":
        time.sleep(8)
    return 3

async def refused(samples):
    raise TimeoutError("no connection")

class Judge:
    def __call__(self, completions, **kwargs):
        return [len(text) for text in completions]

    async def ask(self, sample):
        return 4

judge = Judge()

def nothing(text):
    return 1

def extra(sample, prompt):
    return 1

def streamed(samples):
    yield 1.0
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The directory of a module `mine_N` that was not imported before."""
    name = f"mine_{time.monotonic_ns()}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.syspath_prepend(tmp_path)
    return name


def completion(text, finish_reason="stop"):
    return Completion((1,), (2, 3), (), (), finish_reason, text, 0)


ROW = {"tests": [{"x": 1, "y": 2}, {"x": 2, "y": 5}], "tag": "abc", "prompt": "?"}


def samples(count=3, row=ROW, text="x + x"):
    return [
        Sample(Question(f"q{i}", "2x?", "", {}, row), completion(text), member=i)
        for i in range(count)
    ]


def reward(module, name, timeout_secs=20.0, num_workers=2):
    stack = contextlib.ExitStack()
    return custom.by_reference(f"{module}:{name}", name, timeout_secs, num_workers, stack)


def values(rewards):
    return [r.value for r in rewards]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("brevity", [0.5, 0.5, 0.5]),
        ("passed", [0.5, 0.5, 0.5]),
        ("batched", [3.0, 4.0, 5.0]),
        ("columns", [1322.0, 1322.0, 1322.0]),
        ("patient", [3.0, 3.0, 3.0]),
        ("judge", [5.0, 5.0, 5.0]),
        ("judge.ask", [4.0, 4.0, 4.0]),
    ],
)
def test_each_form_gives_a_number_a_sample(module, name, expected):
    assert values(reward(module, name)(samples())) == expected


def test_messages_stay_messages_in_columns(module):
    row = {"prompt": [{"role": "user", "content": "hi"}]}
    assert values(reward(module, "chat")(samples(row=row))) == [1.0, 1.0, 1.0]


def test_async_calls_wait_at_the_same_time(module):
    """Each waits for all of them to have begun."""
    assert values(reward(module, "together", timeout_secs=300.0)(samples(20))) == [3.0] * 20


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("faulty", r"faulty: KeyError: 'no\\nsuch thing' \(mine_\d+.py:15\)"),
        ("hanging", "hanging: took longer than reward.timeout_secs=5"),
        ("dying", "dying: its process ended with code 7"),
        ("endless", "endless: took longer than reward.timeout_secs=5"),
    ],
)
def test_a_failure_is_that_of_its_sample(module, name, reason, tmp_path):
    function = reward(module, name, timeout_secs=5.0)  # with it all that it started would end
    scored = function(samples())
    value = 3.0 if name == "endless" else 2.0
    assert values(scored) == [value, None, value]
    failed = scored[1]
    assert failed.is_outage and failed.applies and failed.details["error"]
    assert re.fullmatch(reason, failed.details["unscored"])
    if name == "hanging":
        pids = [int(pid) for pid in (tmp_path / "hanging").read_text().split()]
        assert len(pids) == 2 and have_ended(pids)


def have_ended(pids, within_secs=300.0):
    """Waits: a process that was killed is still there for a moment."""
    deadline = time.monotonic() + within_secs
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(is_running, pids))


def is_running(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_an_async_function_that_blocks_its_loop_fails_and_the_next_call_works(module):
    scored = reward(module, "blocking", timeout_secs=1.0)
    first = scored(samples())
    assert first[1].value is None and "blocks its event loop" in first[1].details["unscored"]
    assert values(scored(samples(1))) == [3.0]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("short", "returned 1 values for 3 samples; return one for each"),
        ("worded", "returned a str; return a number or None"),
        ("absent", "ValueError: its parameter difficulty is a column of no row; there are prompts,"
         " completions, completion_ids, tests, tag"),
        ("refused", "TimeoutError: no connection"),
    ],
)  # fmt: skip
def test_a_failure_of_a_batch_is_that_of_all_its_samples(module, name, reason):
    scored = reward(module, name)(samples())
    assert values(scored) == [None] * 3
    assert all(reason in r.details["unscored"] and r.is_outage for r in scored)
    assert {r.is_retryable for r in scored} == {name == "refused"}  # a service may come back


def test_none_does_not_apply_and_the_others_count(module):
    one = {"sometimes": (reward(module, "sometimes"), 1.0)}
    alone, both = combine(one), combine(one | {"brevity": (reward(module, "brevity"), 2.0)})
    assert values(alone(samples())) == [2.0, None, 2.0]
    assert alone(samples())[1].is_skipped and not alone(samples())[1].is_outage
    assert values(both(samples())) == [3.0, 1.0, 3.0]


def test_texts_that_failed_are_not_shown_to_the_function(module):
    given = samples(2)
    given[0] = given[0]._replace(completion=completion("", "error: server gone"))
    given[1] = given[1]._replace(guided=completion("", "skipped: too long"))
    first, second = reward(module, "faulty")(given)
    assert first.details == {"unscored": "completion: error: server gone"} and first.is_outage
    assert second.details == {"unscored": "answer: skipped: too long"} and second.is_skipped


def test_a_process_imports_no_jax_and_its_prints_disturb_nothing(module):
    assert values(reward(module, "noisy")(samples())) == [0.0, 0.0, 0.0]


def test_processes_end_with_the_reward(module):
    scored = reward(module, "where")
    pids = {int(value) for value in values(scored(samples(8)))}
    assert all(map(is_running, pids)) and os.getpid() not in pids
    del scored
    assert have_ended(pids)


@pytest.mark.parametrize("name", ["hanging", "endless"])
def test_what_is_closed_ends_its_calls_at_once_and_takes_no_more(module, tmp_path, name):
    stack = contextlib.ExitStack()
    scored = custom.by_reference(f"{module}:{name}", name, 1000.0, 2, stack)
    found = []
    thread = threading.Thread(target=lambda: found.extend(scored(samples())))
    thread.start()
    while not (tmp_path / name).exists():
        time.sleep(0.05)
    stack.close()
    thread.join(60)
    (later,) = scored(samples(1))
    assert found[1].details["error"] == later.details["error"] == "the run has ended"
    pids = (tmp_path / name).read_text().split()
    assert len(pids) == 2 * (name == "hanging")
    assert have_ended(map(int, pids))


@pytest.mark.parametrize("ending", ["raise SystemExit", "os.kill(os.getpid(), 9)"])
def test_processes_do_not_outlive_a_run(module, tmp_path, ending):
    program = f"""
        import contextlib, os, threading, time
        from atlas_jax.rewards import custom
        from tests.rewards.test_custom import samples

        stack = contextlib.ExitStack()
        reward = custom.by_reference("{module}:hanging", "hanging", 1000.0, 2, stack)
        threading.Thread(target=reward, args=(samples(),), daemon=True).start()
        while not os.path.exists({str(tmp_path / "hanging")!r}):
            time.sleep(0.05)
        {ending}
    """
    path = os.pathsep.join((str(tmp_path), os.getcwd()))
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env=os.environ | {"PYTHONPATH": path}
    )
    assert have_ended([int(pid) for pid in (tmp_path / "hanging").read_text().split()])


@pytest.mark.parametrize("name", ["hanging", "endless", "object"])
def test_a_request_to_stop_ends_the_wait(module, name):
    end = threading.Event()
    if name == "object":
        scored = custom.by_object(
            lambda sample: end.wait(1000), "slow", 1000.0, contextlib.ExitStack()
        )
    else:
        scored = reward(module, name, timeout_secs=1000.0)
        scored(samples(1))  # has started what it needs
    start = time.monotonic()
    threading.Timer(0.5, stopping.request, ("test",)).start()
    try:
        with pytest.raises(stopping.StopRequestedError):
            scored(samples())
        assert time.monotonic() - start < 300, "a call may take 1000 s"
    finally:
        stopping.reset()
        end.set()


def test_an_object_runs_in_a_thread_and_a_late_call_fails(module, caplog):
    end = threading.Event()

    def late(sample):
        if sample.question.id == "q1":
            end.wait(300)
        return threading.current_thread() is not threading.main_thread()

    with caplog.at_level("INFO"):
        scored = custom.by_object(late, "late", 2.5, contextlib.ExitStack())
    assert "cannot be killed" in caplog.text
    rewards = scored(samples())
    end.set()
    assert values(rewards) == [1.0, None, 1.0]
    assert rewards[1].details["unscored"] == "late: took longer than reward.timeout_secs=2.5"


def test_a_row_that_cannot_be_sent_to_a_process_fails_alone(module):
    given = samples(2)
    row = ROW | {"code": lambda: 1}
    given[0] = given[0]._replace(question=given[0].question._replace(row=row))
    first, second = reward(module, "brevity")(given)
    assert "cannot be sent to a process" in first.details["unscored"]
    assert second.value == 0.5


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nothing", r"mine_\d+:nothing takes \(text\); the parameters of a reward must be sample"),
        ("extra", r"extra takes \(sample, prompt\); the parameters"),
        ("streamed", "streamed is no function that returns rewards"),
        ("Judge", "Judge is no function that returns rewards"),
        ("gone", r"mine_\d+ has no gone"),
    ],
)
def test_what_cannot_be_a_reward_is_told_at_the_start(module, name, told):
    with pytest.raises(ValueError, match=rf"^reward.names={module}:{name}|{told}") as error:
        forms.find(f"{module}:{name}")
    assert re.search(told, str(error.value)) and "\n" not in str(error.value)


def options(**changes):
    draft = config_lib.defaults(config_lib.GRPOConfig)
    plain = {
        "algorithm": "grpo", "model_name_or_path": "m", "output_dir": "o",
        "data.dataset_path": "d", "rollout.protocol": "direct", "reward.names": ("exact_match",),
    }  # fmt: skip
    draft.update_from_flattened_dict(plain | changes)
    return config_lib.freeze(draft)


def test_names_weights_and_labels(module):
    names = ("exact_match", f"{module}:brevity", f"{module}:sometimes")
    changed = options(**{"reward.names": names, "reward.weights": (0.0, 2.0, 1.0)})
    config_lib.validate(changed)
    assert changed.reward.labels == ("exact_match", "brevity", "sometimes")
    scored = scoring.make_reward(changed, contextlib.ExitStack())(samples())
    assert values(scored) == [3.0, 1.0, 3.0]
    assert scored[0].details["brevity"] == {"value": 0.5}


def test_labels_are_unique():
    assert fields.labels(["a:f", "b.c:f", "f2", "a:g"]) == ("a.f", "b.c.f", "f2", "g")


def test_given_functions_stand_in_place_of_names():
    given = (lambda sample: 1, lambda samples: [2 for _ in samples], "exact_match")
    changed = options(**{"reward.weights": (1.0, 2.0, 0.0)})
    assert scoring.labels(changed, given) == ("function", "function_2", "exact_match")
    assert (
        values(scoring.make_reward(changed, contextlib.ExitStack(), given)(samples())) == [5.0] * 3
    )
    with pytest.raises(ValueError, match=r"reward.weights=\(1.0, 2.0, 0.0\) for \('<lambda>',\)"):
        config_lib.validate(changed, given[:1])


@pytest.mark.parametrize(("names", "needs"), [(("m:f",), False), (("m:f", "exact_match"), True)])
def test_a_truth_is_needed_by_built_in_rewards_alone(names, needs):
    assert options(**{"reward.names": names}).reward.needs_truth() == needs
