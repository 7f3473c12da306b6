"""How the processes of a run notice that one of them is gone, and what they say."""

import socket
import sys

import pytest

from atlas_jax.watch import Note, Seen, WatchLimits, judge, updated
from tests import processes

LIMITS = WatchLimits(heartbeat_secs=10, stall_secs=60)
HOST = socket.gethostname()


def seen(*notes, silent=0, still=0):
    return {i: Seen(note, silent, still) for i, note in enumerate(notes)}


def note(arrivals=5, **changes):
    return Note("a", 1, arrivals, "step 3")._replace(**changes)


def test_processes_that_live_and_move_are_left_alone():
    assert LIMITS.interval_secs == 2.5
    assert judge(seen(note(), note(), silent=4, still=24), LIMITS) == ""
    one_moves = {0: Seen(note(), 0, 100), 1: Seen(note(6), 0, 2)}
    assert judge(one_moves, LIMITS) == ""


def test_a_silent_process_is_named_unless_it_has_finished():
    quiet = {0: Seen(note()), 1: Seen(note(host="b"), silent=6)}
    assert judge(quiet, LIMITS).startswith("process 1 on b has given no sign of life for 15 s")
    quiet[1] = quiet[1]._replace(note=note(left=True))
    assert judge(quiet, LIMITS) == ""


def test_a_wait_within_its_own_limit_is_no_stall():
    waits = {0: Seen(note(6), 0, 25), 1: Seen(note(5, host="b", patience=30.0), 0, 25)}
    assert judge(waits, LIMITS) == ""
    longer = {p: s._replace(still=37) for p, s in waits.items()}
    assert "for 90 s (hosts.stall_timeout_secs, and 30 s that its wait may take)" in judge(
        longer, LIMITS
    )
    # An answer that comes counts as moving, like an arrival.
    before = {1: Seen(note(5, marks=3), 0, 36)}
    assert updated(before, {1: note(5, marks=3)})[1].still == 37
    assert updated(before, {1: note(5, marks=4)})[1].still == 0


def test_of_processes_that_wait_the_one_that_they_wait_for_is_named():
    found = seen(note(6), note(5, host="b", place="step 2"), note(6), still=25)
    verdict = judge(found, LIMITS)
    assert verdict.startswith("process 1 on b has not moved on from step 2 for 60 s")
    assert "the others wait" in verdict
    assert "so have all others" in judge(seen(note(), note(), still=25), LIMITS)


def test_what_one_process_found_is_what_all_say():
    assert judge(seen(note(), note(verdict="boom")), LIMITS) == "boom"


def test_looks_are_counted_from_the_last_change():
    before = seen(note(), note(), note(), silent=2, still=2)
    after = updated(before, {1: note(beat=2), 0: note(arrivals=6)})
    assert [(s.silent, s.still) for s in after.values()] == [(3, 0), (0, 3), (3, 3)]


WORKER = """
import os, signal, sys, time
from absl import logging
from atlas_jax import distributed
from atlas_jax.options.train import HostsConfig
from atlas_jax.hosts import joined
from atlas_jax.types import Address
logging.set_verbosity(logging.INFO)
actor, act, *address = sys.argv[1:]
host, number, index = (flag.partition("=")[2] for flag in address)
hosts = HostsConfig(start_timeout_secs=300, heartbeat_timeout_secs=12, stall_timeout_secs=9)
with joined(hosts, Address(host, int(number), int(index))):
    distributed.barrier("the first place")
    if index == actor:
        exec(act)
    distributed.barrier("the second place")
"""


def run(tmp_path, actor, act, last):
    flags = processes.address_flags(2)
    worker = [sys.executable, "-c", WORKER, str(actor), act]
    with processes.started([{"args": [*worker, *f]} for f in flags], tmp_path) as started:
        assert started.processes[last].wait(300) == 1
    return started.text(last)


@pytest.mark.parametrize("actor", [0, 1])
def test_an_error_of_one_process_ends_the_other_with_its_words(tmp_path, actor):
    log = run(tmp_path, actor, "raise RuntimeError('boom')", last=1 - actor)
    assert f"process {actor} on {HOST} failed: RuntimeError: boom" in log


def test_a_process_that_lives_but_does_not_come_is_named(tmp_path):
    log = run(tmp_path, 1, "time.sleep(1000)", last=0)
    assert f"process 1 on {HOST} has not moved on from the first place for 9 s" in log


def test_a_process_that_the_others_never_join_gives_up(tmp_path):
    text = WORKER.replace("start_timeout_secs=300", "start_timeout_secs=3")
    args = [sys.executable, "-c", text, "0", "pass", *processes.address_flags(2)[0]]
    with processes.started([{"args": args}], tmp_path) as started:
        assert started.wait(120) == [1]
    assert "process 0 of 2 waited 3 s (hosts.start_timeout_secs) for the others" in started.text(0)
