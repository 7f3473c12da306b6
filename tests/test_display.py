"""The log, the summaries and the status line of a command, in terminals and elsewhere."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from atlas_jax import display, progress
from atlas_jax.display import LinePart
from tests import terminal

PARTS = [
    LinePart("reward 0.12", 2),
    LinePart("KL 0.01", 3),
    LinePart("9:10 min left", 1),
    LinePart("writing", 99),
]
HEAD = LinePart("grpo 12/100", 0)


@pytest.mark.parametrize("columns", range(1, 121))
def test_a_status_line_fits_its_columns_and_drops_the_least_important_part_first(columns):
    line = display.status_line(columns, HEAD, 0.12, PARTS)
    assert len(line) <= columns
    assert line.startswith(HEAD.text[:columns])
    kept = [part.rank for part in PARTS if part.text in line]
    assert kept == sorted(kept) or 1 in kept
    # In the order of importance a part is missing only if it does not fit beside those before it.
    used = len(HEAD.text)
    for part in sorted(PARTS, key=lambda part: part.rank):
        fits = used + 2 + len(part.text) <= columns
        assert (part.text in line) == fits
        used += fits * (2 + len(part.text))


def test_the_bar_shows_the_share_that_is_done():
    assert display.status_line(21, LinePart("x", 0), 0.5, []) == "x " + "━" * 10 + "─" * 9
    assert display.status_line(80, LinePart("x", 0), 2.0, []) == "x " + "━" * 24
    assert display.status_line(7, LinePart("x", 0), 0.5, []) == "x"


def shown(caplog):
    return [record.getMessage() for record in caplog.records]


def test_a_summary_has_the_means_since_the_last_one_with_arrows_against_it(caplog):
    run = display.RunDisplay("grpo", 100, 0, every=2, mode="auto")
    rewards, alone = [0.1, 0.3, 0.4, 0.6, 0.5, 0.5], [0.2, 0.2, 0.2, 0.2, 0.1, 0.1]
    with caplog.at_level("INFO", logger="absl"):
        for i, (reward, right) in enumerate(zip(rewards, alone, strict=True)):
            values = {"loss/total": 9.0, "reward/mean": reward, "perf/step_secs": 4.0 + i,
                      "teaching/baseline_accuracy": right}  # fmt: skip
            run.write(i + 1, values)
    summaries = [line for line in shown(caplog) if "mean of" in line]
    assert summaries == [
        "step 2/100, mean of 2: reward 0.2, alone 0.2, 4.5 s a step",
        "step 4/100, mean of 2: reward 0.5 ↑, alone 0.2 =, 6.5 s a step",
        "step 6/100, mean of 2: reward 0.5 =, alone 0.1 ↓, 8.5 s a step",
    ]
    assert shown(caplog)[0].startswith("step 1/100 loss/total=9 reward/mean=0.1 perf/step_secs=4")


def test_a_summary_is_due_where_metrics_are_written_seldom_and_at_the_last_step(caplog):
    run = display.RunDisplay("sft", 11, 0, every=4, mode="lines")
    with caplog.at_level("INFO", logger="absl"):
        for step in (3, 6, 9, 11):
            run.write(step, {"loss/total": 1.0, "perf/step_secs": 1.0})
        run.write(11, {"eval/loss": 2.0})
    summaries = [line.split(":")[0] for line in shown(caplog) if "," in line]
    assert summaries == [
        "step 6/11, mean of 6", "step 9/11, mean of 3", "step 11/11, mean of 2",
        "step 11/11, evaluation",
    ]  # fmt: skip


def test_a_run_that_learns_nothing_is_warned_once_while_it_lasts(caplog):
    run = display.RunDisplay("grpo", 100, 0, every=1, mode="auto")
    for step, share in enumerate((1.0, 1.0, 0.5, 1.0), 1):
        run.write(step, {"reward/zero_std_group_frac": share, "perf/step_secs": 1.0})
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warned) == 2
    assert warned[0].startswith("nothing is learned: the rewards of every group are equal")
    assert "raise num_generations" in warned[0]


def test_values_that_the_guide_warns_of_are_warned_of_with_what_to_do(caplog):
    run = display.RunDisplay("grpo", 100, 0, every=10, mode="auto")
    run.write(1, {"policy/kl": 5.5, "teaching/non_degradation_rate": 0.85})
    run.write(2, {"policy/kl": 4.9, "teaching/non_degradation_rate": 0.91, "loss/total": 9.0})
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert [line.split(";")[0] for line in warned] == [
        "policy/kl=5.5 is above 5", "teaching/non_degradation_rate=0.85 is below 0.9"
    ]  # fmt: skip


def test_a_compilation_of_jax_is_noticed_while_it_lasts(monkeypatch):
    monkeypatch.setattr(display, "_COMPILE_SECS", -1.0)
    activity = display.Activity()
    activity.begin("training")
    during = []

    def look(event, value, **_):
        if event.endswith("backend_compile_duration"):
            during.append(activity.part().text)

    with activity.watched():
        jax.monitoring.register_scalar_listener(look)
        try:
            jax.jit(lambda x: x * 3 + 17)(jnp.arange(7)).block_until_ready()
        finally:
            jax.monitoring.unregister_scalar_listener(look)
        assert activity.part().text == "training"
    assert during and all(text.startswith("compiling …") for text in during)
    progress.mark()
    assert activity.part().text == "training: 1 texts"


PROGRAM = """
import sys, time
from absl import logging
from atlas_jax import display, progress, terminal
logging.set_verbosity(logging.INFO)
mode = sys.argv[1]
with terminal.opened(mode):
    run = display.RunDisplay("grpo", 40, 0, every=10, mode=mode)
    with run.shown():
        for step in range(1, 41):
            run.begin("writing")
            time.sleep(0.05)
            values = {"reward/mean": step / 40, "policy/kl": 0.01, "perf/step_secs": 0.05,
                      "teaching/baseline_accuracy": 0.25, "teaching/student_accuracy": 0.5,
                      "rollout/importance_weight": 1.0}
            run.write(step, values)
            run.advance(step)
            if step == 20:
                logging.warning("a warning of some words that is longer than this window is wide")
    with display.texts("teacher 1/2", 30, mode):
        for _ in range(30):
            time.sleep(0.05)
            progress.mark()
    terminal.result("finished\\nok      a measure\\nmissed  another one")
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def in_terminal(program, columns=44, mode="auto", **environment):
    """What a terminal gets from the program."""
    with terminal.opened(program.parent, os.environ | environment, columns, "xterm") as window:
        window.type(f"{sys.executable} {program} {mode}\n")
        assert window.code() == 0, window.text
        return window.raw


def test_in_a_terminal_a_line_shows_the_run_and_log_lines_stand_above_it(program):
    raw = in_terminal(program)
    frames = re.findall(r"\x1b\[2K\r?((?:grpo|teacher)[^\x1b\r\n]*)", raw)
    assert max(map(len, frames)) <= 43
    assert any(re.match(r"grpo \d+/40 ?[━─]*  reward 0\.\d+  KL 0\.01", f) for f in frames), frames
    assert any(re.match(r"teacher 1/2 \d+/30 texts ━+─+", f) for f in frames), frames
    lines = [line.rstrip() for line in terminal.screen(raw)]
    text = "\n".join(lines)
    assert "grpo 1" not in text and "texts" not in text, "the line is gone in the end"
    clock = r"\d\d:\d\d:\d\d "
    for step in (10, 20, 30, 40):
        assert re.search(rf"^{clock}step {step}/40, mean of 10: reward", text, re.MULTILINE)
    assert "rollout/importance_weight" not in text, "it is in the files"
    joined = " ".join(text.split())
    assert "warning: a warning of some words that is longer than this window is wide" in joined
    assert re.search(rf"^{clock}finished\nok      a measure\nmissed  another one$", text,
                     re.MULTILINE)  # fmt: skip
    assert "\x1b[33mwarning\x1b[0m" in raw and "\x1b[32mok\x1b[0m" in raw


def test_colours_are_left_out_where_they_are_not_wanted(program):
    raw = in_terminal(program, NO_COLOR="1")
    assert not re.search(r"\x1b\[[\d;]+m", raw)
    assert "warning: a warning" in raw


def test_lines_and_quiet_have_no_status_line(program):
    text = "\n".join(terminal.screen(in_terminal(program, 200, "lines")))
    assert "━" not in text and "rollout/importance_weight=1" in text
    text = "\n".join(terminal.screen(in_terminal(program, 200, "quiet")))
    assert "━" not in text and "reward" not in text and "compiling" not in text
    assert "a warning of some words" in text and "missed  another one" in text


def test_a_file_gets_whole_lines_without_codes(program):
    done = subprocess.run(
        [sys.executable, program, "auto"], capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    assert "\x1b" not in done.stderr and "\r" not in done.stderr and "━" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if "reward/mean=" in line]
    assert len(lines) == 40 and "rollout/importance_weight=1" in lines[-1]
    assert sum("mean of 10" in line for line in done.stderr.splitlines()) == 4
