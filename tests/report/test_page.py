"""The page of a run: what it says, how large it is, and what it does with any run."""

import base64
import gzip
import json
import math
import os
import re
import socket
import subprocess
import sys
import time

import pytest

from atlas_jax import ranges
from atlas_jax.report import curves, guide, page, reproduce, run_files, stored_samples
from atlas_jax.rollout import record
from atlas_jax.types import Reward
from tests.report import runs


def data_of(text):
    """The data of a page, as its script reads them."""
    (encoding, content) = re.search(r'data-encoding="(\w+)">(.*?)</script>', text).groups()
    if encoding == "plain":
        return json.loads(content)
    return json.loads(gzip.decompress(base64.b64decode(content)))


def made(*directories):
    return page.make([str(path) for path in directories])


def rows(text):
    """The success table: measure -> status."""
    body = re.search(r"<tbody>(.*?)</tbody>", text, re.DOTALL)[1]
    cells = r'class="status s-[\w-]+">. ([\w ]+)</span></td>\s*<th scope="row">([^<]+)</th>'
    return {measure: status for status, measure in re.findall(cells, body)}


def test_the_top_says_what_was_trained_on_what_and_what_came_of_it(tmp_path):
    run = runs.evaluated(runs.finished(runs.grpo(tmp_path / "run")))
    (run / "judges_spent_process_0.json").write_text('{"calls": 30, "tokens": 900, "cost": 1.25}')
    (run / "judges_spent_process_1.json").write_text('{"calls": 12, "tokens": 100, "cost": 0.5}')
    text = made(run)
    assert "<dd>outputs/sft/final</dd>" in text and "<dd>outputs/student</dd>" in text
    assert "finished, step 10 of 10" in text
    assert "2 min 35 s in steps, 9 min 53 s by the log" in text  # 11 + … + 20 s
    assert "42 calls, 1,000 tokens, 1.75 in the currency of the prices" in text
    assert "The lessons help: right answers taught 50.0 %, alone 25.0 % (+25.0 points" in text
    assert "95 % interval +10.0 to +40.0, McNemar p = 0.004" in text
    assert rows(text) == {
        "mean reward": "reached", "non-degradation": "reached",
        "KL from the reference": "reached", "right answers, taught less alone": "reached",
        "share of answer tokens saved": "reached", "answers that end": "reached",
    }  # fmt: skip


def test_a_gain_that_may_be_chance_is_not_called_reached(tmp_path):
    text = made(runs.evaluated(runs.finished(runs.grpo(tmp_path / "run")), p=0.2))
    assert "The lessons may help, but that is not proven" in text
    assert rows(text)["right answers, taught less alone"] == "near"


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("policy/kl", {0.1: "near", 0.5: "reached", 2.0: "reached", 3.0: "near", 5.1: "missed"}),
        ("teaching/non_degradation_rate", {0.96: "reached", 0.92: "near", 0.89: "missed"}),
        ("loss/total", {1.4: "reached", 1.6: "missed"}),
        ("optim/grad_norm", {4.9: "reached", 5.1: "missed", math.nan: "not measured"}),
    ],
)
def test_ranges_are_those_of_the_guide(name, values):
    for value, status in values.items():
        assert ranges.RANGES[name].status(value) == status


def test_a_reward_rises_only_if_its_trend_is_no_chance(tmp_path):
    run = run_files.read(str(runs.grpo(tmp_path / "run")))

    def status(values):
        lines = [{"step": i + 1, "reward/mean": v} for i, v in enumerate(values)]
        return guide.judge(run._replace(metrics=lines, evaluations=[])).criteria[0].status

    assert status([0.1 * i for i in range(10)]) == "reached"
    assert status([-0.1 * i for i in range(10)]) == "missed"
    assert status([0.5, 0.1, 0.4, 0.2, 0.5, 0.1, 0.4, 0.3]) == "near"
    assert status([0.5] * 10) == "missed"
    assert status([0.1, 0.2, 0.3]) == "not measured"


def test_a_run_of_sft_is_judged_by_its_loss(tmp_path):
    run = runs.sft(tmp_path / "sft")
    text = made(run)
    assert rows(text) == {"loss": "reached", "gradient norm": "reached"}
    assert "The loss went from 2.65 to" in text and "<dt>against</dt>" not in text
    assert "There are no samples" in text
    text = made(runs.evaluated(run))
    assert "The lessons help: right answers taught 50.0 %" in text
    assert rows(text)["right answers, taught less alone"] == "reached"


def test_a_step_keeps_its_leaks_changes_best_worst_and_largest_advantages():
    dull = [runs.sample("q", i, True, True) for i in range(200)]
    kinds = {
        20: runs.sample("q", 20, False, True),
        40: runs.sample("q", 40, True, False),
        60: runs.sample("q", 60, True, True, details={"gaming": [runs.LEAK]}),
        80: runs.sample("q", 80, True, True, reward=Reward(None, {"unscored": "no judge"})),
        100: runs.sample("q", 100, True, True, advantage=-3.0),
    }
    for place, sample in kinds.items():
        dull[place] = sample
    samples = [stored_samples.decode(record.as_record(1, sample)) for sample in dull]
    summary = stored_samples.summary(1, samples)
    assert len(summary.chosen) == stored_samples.KEPT == 24
    assert summary.num_samples == 200
    assert set(kinds) <= {sample.member for sample in summary.chosen[:9]}
    (group,) = summary.groups
    for member in group.members:
        here = member.place >= 0
        assert not here or summary.chosen[member.place].member == member.number


def test_a_question_that_is_asked_twice_in_a_step_has_two_groups():
    samples = [*runs.group("q"), *runs.group("q"), *runs.group("r")]
    stored = [stored_samples.decode(record.as_record(1, sample)) for sample in samples]
    groups = stored_samples.summary(1, stored).groups
    assert [(g.question_id, len(g.members)) for g in groups] == [("q", 4), ("q", 4), ("r", 4)]


def test_verdicts_are_those_of_the_reward_or_else_of_the_answers():
    values = record.as_record(1, runs.sample("q", 0, False, True))
    assert stored_samples.decode(values).change == 1
    del values["reward_details"]["teaching_gain"]
    sample = stored_samples.decode(values)
    assert (sample.before, sample.after) == (False, True)  # of "I count 5" and "I count 4"
    values["ground_truth"] = ""
    assert stored_samples.decode(values).before is None


def test_records_of_other_versions_are_read_by_the_names_of_their_fields():
    sample = stored_samples.decode({"question": "?", "completion": {"text": "a", "spans": [[1]]},
                                    "num_steps": 8, "versions": {"0": [1]}})  # fmt: skip
    assert (sample.question, sample.completion.text, sample.reward) == ("?", "a", None)
    assert sample.unscored == "no reason is given"


def test_further_answers_of_the_student_are_in_the_page(tmp_path):
    run = runs.grpo(tmp_path / "run", steps=1)
    (path,) = (run / "rollouts").iterdir()
    first, *rest = path.read_text().splitlines(keepends=True)
    more = json.loads(first) | {"further_guided": [{"text": "six"}, {"text": "seven"}]}
    path.write_text(json.dumps(more) + "\n" + "".join(rest))
    data = data_of(made(run))
    (further,) = (s["further"] for s in data["sources"][0]["samples"] if s["further"])
    assert [(who, data["texts"][text]) for who, text in further] == [
        ("taught", "six"), ("taught", "seven")
    ]  # fmt: skip


def test_the_page_says_how_many_samples_of_how_many_it_shows(tmp_path):
    def groups(step):
        return [s for i in range(8) for s in runs.group(f"q{i}", 8)]

    text = made(runs.grpo(tmp_path / "run", steps=2, groups=groups))
    assert "48 of 128 samples are in this page" in text
    data = data_of(text)
    assert [(len(s["samples"]), s["count"]) for s in data["sources"]] == [(24, 64), (24, 64)]
    assert [len(s["groups"]) for s in data["sources"]] == [8, 8]
    assert all(len(members) == 8 for s in data["sources"] for _, members in s["groups"])


def test_a_lesson_with_a_script_is_text_compressed_or_not(tmp_path):
    evil = "</script><script>alert(1)</script><!-- <img src=x onerror=alert(2)>"
    short = runs.grpo(tmp_path / "a", 1, lambda step: [runs.sample("q", 0, 0, 1, teaching=evil)])
    for run in (short, runs.grpo(tmp_path / "b", 5, lambda s: [
        runs.sample(f"q{i}", 0, False, True, teaching=f"{evil} {os.urandom(500).hex()}")
        for i in range(8)
    ])):  # fmt: skip
        config = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps(config | {"student_model": evil}))
        (run / "training.log").write_text(f"2026-11-28 07:02:07,942 WARNING {evil}\n")
        text = made(run)
        assert evil not in text and "<img" not in text and text.count("<script") == 2
        assert any(evil in t for t in data_of(text)["texts"])
        assert "&lt;img src=x" in text
    assert 'data-encoding="plain"' in made(short) and 'data-encoding="gzip"' in text
    assert "\\u003cimg" in made(short)


def test_a_page_holds_all_that_it_shows(tmp_path):
    text = made(runs.evaluated(runs.finished(runs.grpo(tmp_path / "run"))))
    assert not re.search(r"""(?:src|href)=["'](?!#|data:)""", text)
    assert not re.search(
        r"@import|url\(|fetch\(|XMLHttpRequest|https?://(?!www\.w3\.org/2000)", text
    )


def test_a_page_of_many_long_samples_stays_below_its_size(tmp_path):
    def groups(step):
        return [
            s._replace(guided=runs.said(os.urandom(3000).hex()))
            for i in range(8)
            for s in runs.group(f"q{step}-{i}", 8)
        ]

    run = runs.grpo(tmp_path / "run", steps=6, groups=groups)
    small = page.make([str(run)], max_bytes=500_000)
    assert len(small.encode()) <= 500_000 < len(made(run).encode())
    counts = [len(source["samples"]) for source in data_of(small)["sources"]]
    assert 0 < counts[0] < 24 and len(set(counts)) == 1
    assert f"{6 * counts[0]} of 384 samples are in this page" in small


def test_250_steps_of_64_samples_are_below_ten_megabytes(tmp_path):
    words = [f"{a}{b}" for a in "bcdfghklmnprst" for b in ("ane", "ilk", "ore", "ust", "ead")]

    def prose(count, seed):  # of random words, which compress less than a language
        state = seed
        chosen = []
        for _ in range(count):
            state = (state * 1103515245 + 12345) % 2**31
            chosen.append(words[state % len(words)])
        return " ".join(chosen)

    def groups(step):
        made = []
        for i in range(8):
            for s in runs.group(f"q{step}-{i}", 8):
                seed = step * 64 + i * 8 + s.member
                made.append(
                    s._replace(teaching=prose(80, seed), guided=runs.said(prose(150, ~seed)))
                )
        return made

    run = runs.grpo(tmp_path / "run", steps=250, groups=groups)
    start = time.process_time()
    text = made(run)
    assert time.process_time() - start < 60
    assert len(text.encode()) < 10_000_000
    assert "6,000 of 16,000 samples" in text


def test_secrets_are_in_no_page(tmp_path):
    run = runs.grpo(tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["data"]["db_url"] = "postgresql://me:hunter22@host/db"
    config["environment"]["XLA_FLAGS"] = "--token=hunter22"
    (run / "config.json").write_text(json.dumps(config))
    (run / "training.log").write_text(
        "2026-11-28 07:02:07,942 WARNING postgresql://me:hunter22@host/db is lost\n"
    )
    text = made(run)
    assert "hunter22" not in text and "***" in text


def test_options_that_differ_from_the_nearest_recipe_are_listed_with_the_command(tmp_path):
    run = runs.grpo(tmp_path / "run", **{"num_generations": 16})
    recipe = reproduce.describe(run_files.read(str(run)))
    assert recipe.nearest == "teacher_rcl"
    changed = {change.name: (change.shipped, change.here) for change in recipe.changes}
    assert changed["num_generations"] == ("32", "16")
    assert changed["learning_rate"] == ("5e-07", "2e-06")
    assert set(changed) <= {
        "num_generations", "learning_rate", "model_name_or_path", "student_model", "max_steps",
    }  # fmt: skip
    assert "--config=teacher_rcl" in recipe.commands[0]
    assert "--config.num_generations=16" in recipe.commands[0]
    assert ("digest of model_name_or_path", "abc123") in recipe.facts


def test_health_counts_warnings_failures_and_the_parts_of_the_slowest_step(tmp_path):
    def groups(step):
        lost = runs.sample("q1", 4, False, False, reward=Reward(None, {"unscored": "no judge"}))
        cut = lost._replace(member=5, guided=lost.guided.failed(f"error: server {step} is away"))
        return [*runs.group("q1"), lost, cut]

    text = made(runs.grpo(tmp_path / "run", groups=groups))
    assert "policy/kl=7 is outside" in text and "lower learning_rate, or raise beta" in text
    assert "error: server N is away" in text and "10 of 60" in text
    assert "The slowest step: 10, 20.0 s" in text
    assert text.index("6.5 s</b>") < text.index("6.0 s</b>") < text.index("1.5 s</b>")
    assert "least 2" in text


def test_curves_have_the_ranges_gaps_and_dots(tmp_path):
    run = runs.grpo(tmp_path / "run", steps=3)
    lines = [{"step": s, "policy/kl": v} for s, v in enumerate((1.0, math.nan, 3.0), 1)]
    read = run_files.read(str(run))._replace(metrics=lines)
    (kl,), rest = curves.draw([read], [[]])
    assert not rest and kl.goal == "0.5 to 2 (warning above 5)"
    (line,) = kl.lines
    assert line.path.count("M") == line.dots.count("h.01") == 2 and "nan" not in line.path
    assert line.values == [1.0, None, 3.0]
    (good,) = (band for band in kl.bands if band.kind == "good")
    low, high = kl.y_range
    share = (curves.BOTTOM - good.y - good.height) / (curves.BOTTOM - curves.TOP)
    assert math.isclose(low + share * (high - low), 0.5, abs_tol=0.01)


def test_every_metric_has_a_curve_and_runs_lie_over_each_other(tmp_path):
    first = runs.grpo(tmp_path / "one")
    second = runs.grpo(tmp_path / "two", steps=5)
    data = data_of(made(first, second))
    pair = {str(first), str(second)}
    assert {s["run"] for s in data["sources"]} == {0, 1}
    charts = {curve["title"]: {line[0] for line in curve["lines"]} for curve in data["curves"]}
    assert charts["Reward and its parts"] == charts["my/own_metric"] == pair
    assert charts["Right answers"] == {
        f"{run}: teaching/{who}_accuracy" for run in pair for who in ("student", "baseline")
    }
    alone = data_of(made(first))
    shown = {line[0] for curve in alone["curves"] for line in curve["lines"]}
    assert shown == set(runs.line(1, 10))


def test_a_long_series_is_shown_by_means_of_its_parts(tmp_path):
    xs, ys = curves._thinned([(i, float(i)) for i in range(1, 10_001)])
    assert len(xs) <= 500 and xs[-1] == 10_000
    assert ys[0] == sum(range(1, 21)) / 20


def test_intervals_count_a_question_once(tmp_path):
    stats = pytest.importorskip("scipy.stats")
    low, high = curves._jeffreys(3.0, 10)
    assert math.isclose(stats.beta.cdf(low, 3.5, 7.5), 0.025, abs_tol=1e-9)
    assert math.isclose(stats.beta.cdf(high, 3.5, 7.5), 0.975, abs_tol=1e-9)
    samples = [s for i in range(5) for s in runs.group(f"q{i}", 8)]
    stored = [stored_samples.decode(record.as_record(1, s)) for s in samples]
    found = curves._intervals([stored_samples.summary(1, stored)])
    # Of the members of each group 5 of 8 are right with the lesson.
    shares = found["teaching/student_accuracy"][1]
    assert shares == curves._jeffreys(5 * 5 / 8, 5)


def test_runs_without_a_step_cut_by_a_kill_or_with_nan_have_a_page(tmp_path):
    empty = runs.grpo(tmp_path / "empty", steps=0)
    assert "No step is done yet" in made(empty) and "No step has been logged yet" in made(empty)
    killed = runs.grpo(tmp_path / "killed", steps=4)
    for name in ("metrics.jsonl", "rollouts/step_000004_process_0.jsonl"):
        text = (killed / name).read_text()
        (killed / name).write_text(text[: -len(text.splitlines()[-1]) // 2])
    text = made(killed)
    assert "stopped, step 3 of 10" in text
    assert "metrics.jsonl: 1 lines are no records" in text
    assert "rollouts: 1 lines are no samples" in text
    nan = runs.grpo(tmp_path / "nan", steps=2)
    (nan / "metrics.jsonl").write_text(
        '{"step": 1, "reward/mean": null, "policy/kl": NaN}\n{"step": 2, "reward/mean": NaN, '
        '"policy/kl": Infinity, "loss/total": null}\n'
    )
    text = made(nan)
    assert (
        "Mean reward: 0 steps are too few" in text and rows(text)["mean reward"] == "not measured"
    )
    data = json.dumps(data_of(text), allow_nan=False)
    assert "null" in data


def test_a_run_is_running_while_its_process_lives(tmp_path):
    run = runs.grpo(tmp_path / "run", steps=2)
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "started": "now"}
    (run / ".run.json").write_text(json.dumps(holder))
    assert run_files.read(str(run)).state == "running"
    (run / ".run.json").write_text(json.dumps(holder | {"pid": 2**22 + 1}))
    assert run_files.read(str(run)).state == "stopped"
    assert run_files.read(str(runs.finished(run))).state == "finished"


def command(*words):
    return [sys.executable, "-m", "atlas_jax.report", *map(str, words)]


def test_the_command_writes_the_page_and_says_where(tmp_path):
    run = runs.grpo(tmp_path / "run")
    done = subprocess.run(command(run), capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{run}/report.html: 0.") and not done.stderr
    done = subprocess.run(
        command(run, run), capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert "<h1>2 runs</h1>" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["nothing"], 1, "nothing is no run: it has no config.json, metrics.jsonl or rollouts"),
        ([], 2, "the following arguments are required: RUN"),
        (["x", "--every=0"], 2, "--every=0 must be a time above 0 in seconds"),
    ],
)
def test_mistakes_are_one_line(tmp_path, words, code, line):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        command(*words), capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == code and done.stderr.startswith(f"error: {line}")
    assert "Traceback" not in done.stderr


def test_a_watched_page_is_written_again_until_the_run_ends(tmp_path):
    run = runs.grpo(tmp_path / "run", steps=2)
    sleeper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    holder = {"host": socket.gethostname(), "pid": sleeper.pid, "started": "now"}
    (run / ".run.json").write_text(json.dumps(holder))
    try:
        watch = subprocess.Popen(command(run, "--watch", "--every=0.2"), stdout=subprocess.PIPE)
        wait_for(lambda: "running, step 2 of 10" in read(run / "report.html"))
        runs.grpo(run, steps=3)
        wait_for(lambda: "running, step 3 of 10" in read(run / "report.html"))
    finally:
        sleeper.communicate(b"\n")
    (run / ".run.json").unlink()
    assert watch.wait(60) == 0
    watch.stdout.close()
    assert "stopped, step 3 of 10" in read(run / "report.html")


def read(path):
    return path.read_text() if path.exists() else ""


def wait_for(condition, secs=300):
    limit = time.monotonic() + secs
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.05)


def test_a_run_does_not_fail_for_its_page(tmp_path, caplog):
    run = runs.grpo(tmp_path / "run", steps=1)
    (run / "report.html").mkdir()
    page.at_end(str(run))
    (line,) = (r.getMessage() for r in caplog.records if r.levelname == "WARNING")
    assert line.startswith("no page of this run: IsADirectoryError")
    assert line.endswith(f"later: atlas-report {run}")
