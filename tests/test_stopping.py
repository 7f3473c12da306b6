"""What a process does about signals; each in a process of its own."""

import signal
import subprocess
import sys
import time

import pytest

BEGIN = """
import sys, threading, time
from atlas_jax import stopping
stopping.GRACE_SECS = 1.0
stopping.listen()
say = lambda text: print(text, flush=True)
"""
WAIT = "say('ready'); time.sleep(600)"
TRAIN = f"""
with stopping.training():
    {WAIT}
"""


class Process:
    """A process that runs a piece of code, and what it says line by line."""

    def __init__(self, code):
        self._process = subprocess.Popen(
            [sys.executable, "-c", BEGIN + code],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.wait_for("ready")

    def wait_for(self, text):
        """Reads lines until one has the text, and returns it."""
        for line in self._process.stdout:
            if text in line:
                return line
        raise AssertionError(f"it ended without {text!r}")

    def send(self, number):
        """Sends a signal."""
        self._process.send_signal(number)

    def go_on(self):
        """Ends the process's wait for a line."""
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def end(self):
        """Returns the exit code and the rest of what was said."""
        try:
            return self._process.wait(250), self._process.stdout.read()
        finally:
            self._process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_before_training_a_signal_ends_the_process(number):
    process = Process(WAIT)
    process.send(number)
    process.wait_for(f"{number.name}: stopped; the same command")
    code, rest = process.end()
    assert code == 75
    assert "Traceback" not in rest


def test_while_it_trains_a_signal_is_a_request_and_a_second_ctrl_c_the_end():
    process = Process(TRAIN)
    process.send(signal.SIGTERM)
    process.wait_for("SIGTERM: stops as soon as")
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        process.send(number)
    process.send(signal.SIGINT)  # the same wish: a terminal and a script may both pass it on
    time.sleep(1.5)
    process.send(signal.SIGTERM)  # a scheduler repeats itself
    time.sleep(0.5)
    process.send(signal.SIGINT)
    process.wait_for("SIGINT again: ends without saving")
    assert process.end()[0] == 128 + signal.SIGINT


def test_no_signal_cuts_the_save_short():
    process = Process("""
with stopping.training(), stopping.saving():
    say('ready')
    sys.stdin.readline()
say('saved')
say(f'stops: {stopping.requested()}')
""")
    for _ in range(3):
        process.send(signal.SIGINT)
        process.wait_for("SIGINT: stops when the state is saved")
    process.go_on()
    code, rest = process.end()
    assert code == 0
    assert "saved\nstops: True" in rest


def test_what_waits_gives_up_within_a_second():
    process = Process("""
import concurrent.futures
future = concurrent.futures.Future()
with stopping.training():
    say('ready')
    for wait in (lambda: stopping.result(future), lambda: stopping.sleep(60), stopping.check):
        try:
            wait()
        except stopping.StopRequestedError as error:
            say(f"gave up: {error}")
say(future.cancelled())
""")
    process.send(signal.SIGTERM)
    code, rest = process.end()
    assert code == 0
    assert rest.count("gave up: SIGTERM\n") == 3
    assert rest.endswith("True\n"), "the future is cancelled"


def test_whatever_hangs_after_the_end_has_some_time_and_no_more():
    process = Process("""
threading.Thread(target=time.sleep, args=(300,)).start()
say("ready")
stopping.end_soon(75)
sys.exit(75)
""")
    code, rest = process.end()  # before the thread does
    assert code == 75
    assert "not everything ended within" in rest


def test_a_request_does_not_reach_the_next_run():
    from atlas_jax import stopping

    stopping.request("SIGTERM")
    assert stopping.reason() == "SIGTERM"
    with stopping.training():
        assert not stopping.requested()
        stopping.check()
    stopping.reset()


def test_signals_are_given_back_where_the_process_is_not_its_own():
    """As in a notebook."""
    from atlas_jax import stopping

    before = signal.getsignal(signal.SIGINT)
    with stopping.training():
        assert signal.getsignal(signal.SIGINT) is not before
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(stopping.StopRequestedError):
            stopping.sleep(30.0)
    assert signal.getsignal(signal.SIGINT) is before
    stopping.reset()
