"""The cache of replies and the account of calls: full, locked, broken, killed, of others."""

import contextlib
import json
import os
import pathlib
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from atlas_jax.rewards import RIMReward
from atlas_jax.rewards.replies import Ledger, Reply, ReplyCache, key_of
from tests import judge_server
from tests.rewards.test_rim import cases, kept, options


@pytest.fixture(scope="module")
def server():
    with judge_server.running() as server:
        yield server


def fill(cache, numbers, length=2000):
    for i in numbers:
        cache.write(key_of([str(i)], []), Reply(f"{i} " + "x" * length, 1, 2))
    cache.flush()


def have(cache, numbers):
    return [i for i in numbers if cache.read(key_of([str(i)], []))]


def test_the_oldest_replies_go_above_the_limit(tmp_path):
    limit = 400_000
    cache = ReplyCache(str(tmp_path), limit)
    for start in range(0, 600, 20):
        fill(cache, range(start, start + 20))
        assert (tmp_path / "replies.sqlite").stat().st_size <= limit
    left = have(cache, range(600))
    assert 60 < len(left) < 200
    assert left == list(range(600 - len(left), 600))
    smaller = ReplyCache(str(tmp_path), limit // 4)
    fill(smaller, [600])
    assert (tmp_path / "replies.sqlite").stat().st_size <= limit // 4
    assert have(smaller, range(601))[-20:] == list(range(581, 601))


def test_a_reply_may_hold_anything(tmp_path):
    given = Reply("\ud800 \x00 'é\n", 3, 4, is_cut=True)
    cache = ReplyCache(str(tmp_path))
    cache.write(key_of(["a"], []), given)
    cache.flush()
    assert ReplyCache(str(tmp_path), is_read_only=True).read(key_of(["a"], [])) == given


def test_files_of_an_earlier_cache_are_left_alone(tmp_path):
    (tmp_path / "ab").mkdir()
    (tmp_path / "ab" / "cd.json").write_text("mine")
    fill(ReplyCache(str(tmp_path), 10), range(50))
    assert (tmp_path / "ab" / "cd.json").read_text() == "mine"


@contextlib.contextmanager
def locked(path):
    fill(ReplyCache(str(path.parent)), [1])
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as file:
        file.execute("BEGIN EXCLUSIVE")
        yield


@contextlib.contextmanager
def broken(path):
    path.parent.mkdir()
    path.write_bytes(b"no database" * 1000)
    yield


@contextlib.contextmanager
def torn(path):
    fill(ReplyCache(str(path.parent)), range(200))
    content = path.read_bytes()
    path.write_bytes(content[:4096] + b"\xff" * 20_000 + content[24_096:])
    yield


@contextlib.contextmanager
def foreign(path):
    path.parent.mkdir()
    with contextlib.closing(sqlite3.connect(path)) as file, file:
        file.execute("CREATE TABLE replies (mine TEXT)")
    yield


@contextlib.contextmanager
def a_directory(path):
    path.mkdir(parents=True)
    yield


@contextlib.contextmanager
def below_a_file(path):
    path.parent.write_text("mine")
    yield


@pytest.mark.parametrize("fault", [locked, broken, torn, foreign, a_directory, below_a_file])
def test_a_cache_that_cannot_be_used_is_warned_of_once(server, tmp_path, caplog, fault):
    config = options(server, tmp_path)
    with fault(kept(config)):
        reward = RIMReward(config)
        for name in ("one", "two"):
            assert all(r.value is not None for r in reward.judge(cases(5, f"{name} {fault}")))
    warnings = [r.getMessage() for r in caplog.records if "cache of judges' replies" in r.message]
    assert len(warnings) == 1
    assert str(kept(config)) in warnings[0]


_FULL = """
import pathlib, resource, signal, sys
from tests.rewards.test_rim import RIMReward, cases, options
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
server = type("Server", (), {"url": sys.argv[1]})
reward = RIMReward(options(server, pathlib.Path(sys.argv[2])))
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
print(sum(r.value is not None for i in range(2) for r in reward.judge(cases(30, str(i)))))
"""


def test_a_full_disk_is_a_run_without_a_cache(server, tmp_path):
    command = [sys.executable, "-c", _FULL, server.url, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "60"
    assert run.stderr.count("the cache of judges' replies is not used from here on") == 1


def account(directory, process):
    return directory / f"judges_spent_process_{process}.json"


_KILLED = """
import pathlib, sys
from tests.rewards.test_rim import RIMReward, cases, options
server = type("Server", (), {"url": sys.argv[1]})
config = options(server, pathlib.Path(sys.argv[2]), cache_dir="")
RIMReward(config, ledger_path=sys.argv[3]).judge(cases(300))
"""


def test_the_account_survives_a_kill(tmp_path):
    with judge_server.running(latency=0.1) as server:
        command = [sys.executable, "-c", _KILLED, server.url, str(tmp_path)]
        for _ in range(2):
            before = server.stats()["calls"]
            process = subprocess.Popen([*command, str(account(tmp_path, 0))])
            while server.stats()["calls"] < before + 200:
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.wait()
        time.sleep(0.2)  # what was under way arrives
        seen = server.stats()["calls"]
    spent = json.loads(account(tmp_path, 0).read_text())
    assert seen <= spent["calls"] <= seen + 2 * 64  # those in flight, at each kill
    assert spent["tokens"] > 0


def test_another_number_of_processes_knows_what_was_spent(server, tmp_path):
    """Of 30 calls four processes have made 18; two may make 6 each, and then none."""
    for process, calls in enumerate([2, 4, 5, 7]):
        account(tmp_path, process).write_text(json.dumps({"calls": calls, "tokens": 1, "cost": 0}))
    account(tmp_path, 9).with_name("judges_spent_process_x.json").write_text("no account")
    config = options(server, tmp_path, limits={"max_calls": 30}, cache_dir="")
    before = server.stats()["calls"]
    both = [RIMReward(config, "", 2, str(account(tmp_path, process))) for process in range(2)]
    for reward in both:
        reward.judge(cases(4, "several"))
    assert server.stats()["calls"] - before == 12
    assert json.loads(account(tmp_path, 0).read_text())["calls"] == 2 + 6
    (result,) = RIMReward(config, ledger_path=str(account(tmp_path, 7))).judge(cases(1, "more"))
    assert server.stats()["calls"] - before == 12
    assert "max_calls" in result.details["unscored"]


@pytest.mark.parametrize("text", ["", "{", '{"calls": -1}', '{"calls": "2"}', '{"cost": NaN}'])
def test_an_account_of_another_process_that_cannot_be_read_is_named(tmp_path, text):
    account(tmp_path, 3).write_text(text)
    with pytest.raises(
        ValueError, match=r"judges_spent_process_3.json is not the account"
    ) as error:
        Ledger(str(account(tmp_path, 0)))
    assert "\n" not in str(error.value)


def test_an_account_that_cannot_be_written_is_warned_of_once(tmp_path, caplog):
    ledger = Ledger(str(tmp_path / "file" / "account.json"))
    (tmp_path / "file").write_text("mine")
    for _ in range(3):
        ledger.begin()
    assert ledger.spent.calls == 3
    assert len([r for r in caplog.records if "what judges have cost" in r.message]) == 1


def test_a_call_that_was_not_taken_up_is_taken_back(tmp_path):
    ledger = Ledger(str(tmp_path / "account.json"))
    ledger.begin()
    ledger.add(10, 0.5)
    ledger.begin()
    ledger.refund()
    again = Ledger(str(tmp_path / "account.json"))
    assert again.spent == ledger.spent == (1, 10, 0.5)
    assert os.listdir(tmp_path) == ["account.json"]
    assert pathlib.Path(tmp_path / "account.json").read_text().endswith("\n")
