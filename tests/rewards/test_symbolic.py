"""math-verify as a second opinion, in a process that is killed when it stalls."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from atlas_jax.rewards import symbolic
from atlas_jax.rewards.answers import is_correct

RIGHT = [("x(x+1)", "x^2+x"), (r"\frac{x^2-1}{x-1}", "x+1"), (r"(\sqrt{2}+1)^2", r"3+2\sqrt{2}")]
WRONG = [
    ("52_8", "52_9"), ("0.30000000000000004", "0.3"), ("48 + 24", "72"), (r"48 \times 2", "96"),
    ("20 - s", "20 - g"), (r"\Delta", r"\delta"), ("x(x+1)", "x^2-x"), ("2x = 10", "x = 5"),
]  # fmt: skip
HOSTILE = [
    "9^{9^{9^9}} + x",
    "+".join(f"x_{{{i}}}" for i in range(300)),
    "(" * 2000 + "x",
    "x^" * 900,
]


@pytest.mark.parametrize(("answer", "truth"), RIGHT)
def test_right_expression_is_right(answer, truth):
    assert is_correct(rf"\boxed{{{answer}}}", truth)


@pytest.mark.parametrize(("answer", "truth"), WRONG)
def test_wrong_expression_is_wrong(answer, truth):
    assert not is_correct(rf"\boxed{{{answer}}}", truth)


def test_hostile_answers_are_given_up_and_counted_in_any_thread():
    found = []

    def ask():
        found.extend(symbolic.same(answer, "x + 1") for answer in HOSTILE)
        found.append(symbolic.same("x(x+1)", "x^2+x"))

    before = symbolic.num_given_up()
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join(120)
    assert found == [False] * len(HOSTILE) + [True]
    assert symbolic.num_given_up() >= before + 2


def test_prose_and_plain_numbers_are_not_asked():
    for answer, truth in [("the capital", "x^2"), ("1/3", "0.333"), ("Paris", "Rome")]:
        assert not symbolic._is_asked(answer, truth)


def test_process_that_died_is_started_again():
    assert symbolic.same("x(x+1)", "x^2+x")
    server = symbolic._checker()._server
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()
    assert symbolic.same("x(x+1)", "x^2+x")


def test_process_ends_with_the_run_that_is_killed():
    program = (
        "import time\n"
        "from atlas_jax.rewards import symbolic\n"
        "symbolic.same('x(x+1)', 'x^2+x')\n"
        "print(symbolic._checker()._server.pid, flush=True)\n"
        "time.sleep(60)"
    )
    run = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    pid = int(run.stdout.readline())
    assert is_running(pid)
    run.kill()
    run.wait()
    deadline = time.monotonic() + 60
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_running(pid)


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_without_the_extra_nothing_is_asked_and_nothing_imported():
    program = (
        "import sys\n"
        "sys.modules['math_verify'] = sys.modules['pebble'] = None\n"
        "from atlas_jax.rewards.answers import is_correct\n"
        "assert not is_correct(r'\\boxed{x(x+1)}', 'x^2+x')\n"
        "assert is_correct(r'\\boxed{1+2x}', '2x+1')\n"
        "assert 'sympy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
