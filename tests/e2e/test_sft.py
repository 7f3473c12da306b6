"""Whole runs of `python -m atlas_jax.train`, in processes of their own."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors

from atlas_jax.checkpoint import exports
from tests import processes, tiny
from tests.tokenizers import CHATML, chatml_tokenizer

STEPS = 8
TEMPLATES = {"default": CHATML, "tool_use": CHATML + "{# tools #}"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tiny model with a tokenizer, and rows of one simple task."""
    directory = tmp_path_factory.mktemp("inputs")
    tiny.save("smollm2", directory / "model")
    (directory / "model" / "generation_config.json").unlink()
    chatml_tokenizer(TEMPLATES).save_pretrained(directory / "model")
    rows = [
        {"messages": [
            {"role": "user", "content": f"say {word} {i}"},
            {"role": "assistant", "content": word},
        ]}
        for i in range(16) for word in ("one", "two", "three")
    ]  # fmt: skip
    for name, part in (("train", rows[6:]), ("eval", rows[:6])):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (directory / f"{name}.jsonl").write_text(lines)
    return directory


def command(inputs, output, *extra, devices=2):
    values = {
        "model_name_or_path": inputs / "model", "output_dir": output,
        "data.dataset_path": inputs / "train.jsonl", "data.eval_path": inputs / "eval.jsonl",
        "data.format": "messages", "data.system_prompt": "", "max_seq_length": 128,
        "max_steps": STEPS, "save_steps": 2, "learning_rate": 1e-2,
        # Named, and not to be used: two CPU devices that ran its programs would wait for ever.
        "compilation_cache_dir": inputs / "xla",
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
    }  # fmt: skip
    flags = [f"--config.{k}={v}" for k, v in values.items()]
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "ATLAS_TRACEBACK": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip
    run = [sys.executable, "-m", "atlas_jax.train", "--config=configs/run/quickstart_sft.py"]
    return {"args": [*run, *flags, *extra], "env": environment}


def train(inputs, output, *extra, **options):
    return processes.succeeded(**command(inputs, output, *extra, **options))


def metrics(output):
    lines = (output / "metrics.jsonl").read_text().splitlines()
    keep = ("step", "loss/total", "optim/grad_norm", "optim/learning_rate", "eval/loss")
    return [{k: v for k, v in json.loads(line).items() if k in keep} for line in lines]


def parameters(output):
    path = output.absolute() / "checkpoints" / str(STEPS) / "params"
    return jax.tree.leaves(ocp.StandardCheckpointer().restore(path))


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """An uninterrupted run."""
    output = tmp_path_factory.mktemp("whole")
    result = train(inputs, output)
    return output, result


def test_a_run_learns_and_leaves_what_it_promises(inputs, whole):
    output, result = whole
    found = metrics(output)
    losses = [line["loss/total"] for line in found if "loss/total" in line]
    assert len(losses) == STEPS
    assert losses[-1] < 0.7 * losses[0]
    assert found[-1]["eval/loss"] < losses[0]
    for name in ("config.json", "training.log", "metrics.jsonl"):
        assert (output / name).stat().st_size
    assert list(output.glob("events.out.tfevents*"))
    assert sorted(int(p.name) for p in (output / "checkpoints").iterdir()) == [STEPS]
    assert "loss/total" in result.stderr
    assert "PyTorch" not in result.stderr  # no advice to install what training does not need
    assert str(output / "final") in result.stderr
    assert (
        "⟦one" in (output / "training.log").read_text()
        or "⟦t" in (output / "training.log").read_text()
    )


def test_a_run_says_how_large_it_is_and_ends_with_a_verdict(inputs, whole):
    """The parameters are those of the model's file, and the checkpoint is what lies on the disk."""
    output, result = whole
    with safetensors.safe_open(inputs / "model/model.safetensors", "np") as file:
        count = sum(file.get_tensor(name).size for name in file.keys())  # noqa: SIM118
    text = result.stderr
    assert f"  model       {count:,} parameters, 3 layers; float32 kept, float32 computed\n" in text
    assert "  step        8 rows, at most 1,024 tokens (2 x 2 on 2)\n" in text
    assert f"  run         steps 1 to {STEPS}, a checkpoint every 2, evaluated at the end\n" in text
    assert "  mesh        2 x cpu: data 1 x fsdp 2 x tensor 1, fsdp\n" in text
    # Parameters and two moments of 4 bytes each.
    assert f"  checkpoint  {12 * count / 1e6:.3g} MB, at most 1 kept\n" in text
    final = metrics(output)[-6:-1]
    mean = sum(line["loss/total"] for line in final) / 5
    verdict = "ok     " if mean < 1.5 else "missed "
    assert f"\n{verdict} loss: {mean:.3g}\n        goal: below 1.5; mean of the last 5" in text
    assert "compiling …" in text and "\x1b" not in text


def test_quiet_shows_the_result_alone_and_json_goes_to_standard_output(inputs, tmp_path):
    extra = ("--config.max_steps=2", "--config.data.eval_path=", "--quiet", "--json")
    result = train(inputs, tmp_path / "run", *extra, devices=1)
    first, second, last = map(json.loads, result.stdout.splitlines())
    stored = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [first, second] == [json.loads(line) for line in stored]
    assert last["model"] == f"{tmp_path}/run/final" and last["step"] == 2
    head, *lines = result.stderr.splitlines()
    assert head.endswith("] finished") and lines[-1] == f"model: {tmp_path}/run/final"
    assert "step 1/2" not in result.stderr and "parameters" not in result.stderr
    log = (tmp_path / "run/training.log").read_text()
    assert "step 1/2 loss/total=" in log and "parameters" in log and " INFO finished\n" in log


def test_the_export_is_a_transformers_model(whole):
    import torch
    import transformers

    directory = whole[0] / "final"
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "say two 3"}], add_generation_prompt=True,
        return_tensors="pt", return_dict=True,
    )  # fmt: skip
    with torch.no_grad():
        assert torch.isfinite(model(**ids).logits).all()
    assert tokenizer.chat_template == TEMPLATES
    assert not (directory / "generation_config.json").exists()
    assert model.generation_config.eos_token_id == model.config.eos_token_id


def test_final_is_replaced_but_nothing_of_the_users(inputs, whole, tmp_path):
    run = shutil.copytree(whole[0], tmp_path / "run")
    final, model = run / "final", run / "model"
    for directory in (final, model):  # as versions before markers left them
        (directory / exports.MARKER).unlink()
        (directory / "generation_config.json").write_text("{}\n")
    train(inputs, run)
    for directory in (final, model):
        assert (directory / exports.MARKER).exists()
        assert not (directory / "generation_config.json").exists()
    (final / "README.md").write_text("mine")
    train(inputs, run)
    assert (final / "README.md").read_text() == "mine"
    (final / "config.json").write_text("mine")
    line = refused(inputs, run)
    assert f"{final} holds config.json, changed since it was exported" in line
    assert (final / "config.json").read_text() == "mine"


def test_a_final_of_the_users_where_no_run_has_been_is_refused(inputs, tmp_path):
    shutil.copytree(inputs / "model", tmp_path / "final")
    before = {p.name: p.read_bytes() for p in (tmp_path / "final").glob("*.*")}
    assert f"{tmp_path / 'final'} is not empty" in refused(inputs, tmp_path)
    assert {p.name: p.read_bytes() for p in (tmp_path / "final").glob("*.*")} == before


def test_a_model_of_the_users_in_the_place_of_a_runs_files_is_refused(inputs, tmp_path):
    shutil.copytree(inputs / "model", tmp_path / "model")
    before = {p.name: p.read_bytes() for p in (tmp_path / "model").glob("*.*")}
    line = refused(inputs, tmp_path)
    assert f"{tmp_path / 'model'} is not empty" in line
    assert "it holds model.safetensors; name another" in line
    assert {p.name: p.read_bytes() for p in (tmp_path / "model").glob("*.*")} == before


def refused(inputs, output, *extra):
    """Returns the line with which a run ends before it trains."""
    options = command(inputs, output, *extra)
    options["env"].pop("ATLAS_TRACEBACK")
    result = subprocess.run(**options, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return line


def test_the_run_is_readable_in_tensorboard(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole[0]))
    events.Reload()
    shown = [event.value for event in events.Scalars("loss/total")]
    written = [line["loss/total"] for line in metrics(whole[0]) if "loss/total" in line]
    np.testing.assert_allclose(shown, written, rtol=1e-6)


def _kill_at(inputs, output, step, number, *extra):
    """Starts a run and sends a signal as soon as the log shows `step`."""
    process = subprocess.Popen(
        **command(inputs, output, *extra), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    log = output / "training.log"
    for _ in range(1200):
        if log.exists() and f"step {step}/" in log.read_text():
            break
        time.sleep(0.05)
    process.send_signal(number)
    return process.wait()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "term"])
def test_a_stopped_run_continues_bitwise(inputs, whole, tmp_path, number):
    code = _kill_at(inputs, tmp_path, 3, number)
    assert code == (-signal.SIGKILL if number == signal.SIGKILL else 75)
    assert not (tmp_path / "final").exists()
    train(inputs, tmp_path)
    assert metrics(tmp_path) == metrics(whole[0])
    for ours, theirs in zip(parameters(tmp_path), parameters(whole[0]), strict=True):
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


KEPT = (
    "--config.optim=muon", "--config.ema_decay=0.9", "--config.lr_scheduler_type=wsd",
    "--config.eval_on_start=true", "--config.eval_steps=2", "--config.save_only_model=true",
    "--config.metric_for_best_model=eval/loss", "--config.save_total_limit=0",
)  # fmt: skip


def weights(directory):
    from safetensors.numpy import load_file

    return load_file(directory / "model.safetensors")


def test_a_run_keeps_its_best_model_an_average_and_one_whole_checkpoint(inputs, tmp_path):
    """Killed in the middle or not; the average lags, so the last evaluation is the best one."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(inputs, whole, *KEPT)
    assert _kill_at(inputs, killed, 5, signal.SIGKILL, *KEPT) == -signal.SIGKILL
    train(inputs, killed, *KEPT)
    assert metrics(killed) == metrics(whole)
    evaluated = {line["step"]: line["eval/loss"] for line in metrics(whole) if "eval/loss" in line}
    assert [*evaluated] == [0, 2, 4, 6, 8]
    best = min(evaluated, key=evaluated.get)
    state = json.loads((whole / "final" / "trainer_state.json").read_text())
    assert state["best_metric"] == evaluated[best]
    assert state["best_global_step"] == best == STEPS
    assert state["best_model_checkpoint"] == str(whole / "best")
    for name in ("best", "final"):
        for ours, theirs in zip(weights(whole / name).items(), weights(killed / name).items(),
                                strict=True):  # fmt: skip
            assert ours[0] == theirs[0]
            assert ours[1].tobytes() == theirs[1].tobytes()
    for ours, theirs in zip(weights(whole / "best").values(), weights(whole / "final").values(),
                            strict=True):  # fmt: skip
        np.testing.assert_array_equal(ours, theirs)
    # What is exported is the average, not the weights that trained.
    trained = ocp.StandardCheckpointer().restore(
        whole.absolute() / "checkpoints" / str(STEPS) / "params"
    )
    average = weights(whole / "final")["model.norm.weight"]
    assert not np.allclose(average, trained["norm"], rtol=1e-6)
    items = {int(p.name): {q.name for q in p.iterdir()} for p in (whole / "checkpoints").iterdir()}
    assert [step for step, names in items.items() if "train" in names] == [STEPS]
    assert all("params" in names for names in items.values())
    shutil.rmtree(whole / "checkpoints" / str(STEPS))
    line = refused(inputs, whole, *KEPT)
    assert "holds parameters only (save_only_model=true)" in line
    train(
        inputs,
        tmp_path / "next",
        f"--config.resume_from={whole}/checkpoints/4",
        "--config.max_steps=1",
    )


def test_the_best_model_needs_rows_to_evaluate_on(inputs, tmp_path):
    extra = "--config.data.eval_path=", "--config.metric_for_best_model=eval/loss"
    assert "needs rows to evaluate on; set data.eval_path" in refused(inputs, tmp_path, *extra)
    assert "such as eval/loss" in refused(inputs, tmp_path, "--config.metric_for_best_model=loss")


def test_the_state_that_a_run_leaves_is_one_of_transformers(whole):
    from transformers.trainer_callback import TrainerState

    output = whole[0]
    state = TrainerState.load_from_json(str(output / "final" / "trainer_state.json"))
    assert (state.global_step, state.max_steps) == (STEPS, STEPS)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    for ours, line in zip(state.log_history, lines, strict=True):
        assert ours.items() >= line.items()
        if "loss/total" in line:
            assert ours["loss"] == line["loss/total"]
    assert state.log_history[-1]["eval_loss"] == lines[-1]["eval/loss"]
    epochs = [line["epoch"] for line in state.log_history]
    assert epochs == [pytest.approx(state.epoch * line["step"] / STEPS) for line in lines]


def test_the_config_of_a_run_starts_it_again_and_its_steps_can_be_traced(inputs, whole, tmp_path):
    flags = command(inputs, tmp_path / "again")
    rest = [f"--config={whole[0] / 'config.json'}", f"--config.output_dir={tmp_path / 'again'}"]
    words = [*flags["args"][:3], *rest, "--config.profile_steps=[2, 3]"]
    result = subprocess.run(words, env=flags["env"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert metrics(tmp_path / "again") == metrics(whole[0])
    (trace,) = (tmp_path / "again" / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 1000
    assert "profile of steps 2 to 3: " in (tmp_path / "again" / "training.log").read_text()
    assert not (whole[0] / "profile").exists()


def test_a_finished_run_changes_nothing_when_started_again(inputs, whole):
    before, kept = metrics(whole[0]), tokens(whole[0])
    assert len(kept) == 2  # of the rows to train on, and of those held out
    result = train(inputs, whole[0])
    assert metrics(whole[0]) == before
    assert tokens(whole[0]) == kept
    assert result.stderr.count("examples read from") == 2


def tokens(output):
    return {path.name: path.read_bytes() for path in output.glob("data/tokens-*.npz")}


def test_tokens_of_other_rows_go_when_a_run_with_new_ones_begins(inputs, tmp_path):
    train(inputs, tmp_path, "--config.max_steps=1", devices=1)
    before = tokens(tmp_path)
    other = ("--config.max_seq_length=64", "--config.max_steps=2")
    refused = subprocess.run(
        **command(inputs, tmp_path, *other, devices=1),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "holds a run on other data" in refused.stderr
    assert before.items() <= tokens(tmp_path).items()
    shutil.rmtree(tmp_path / "checkpoints")
    train(inputs, tmp_path, "--config.max_seq_length=64", "--config.max_steps=1", devices=1)
    assert len(tokens(tmp_path)) == 2
    assert not before.keys() & tokens(tmp_path).keys()


def test_other_data_is_refused_on_resume(inputs, whole):
    options = command(inputs, whole[0], "--config.seed=7", "--config.max_steps=9")
    options["env"].pop("ATLAS_TRACEBACK")
    result = subprocess.run(**options, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "seed" in result.stderr.splitlines()[-2]


def test_rows_with_a_token_that_the_model_lacks_are_refused(inputs, tmp_path):
    """A tokenizer may have more tokens than the model: Gemma 3's has one for images."""
    model = tmp_path / "model"
    shutil.copytree(inputs / "model", model)
    tokenizer = chatml_tokenizer()
    tokenizer.add_tokens([f"<extra_{i}>" for i in range(200)])
    tokenizer.save_pretrained(model)
    rows = (inputs / "train.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(rows.replace("say one 3", "say <extra_150>"))
    change = [f"--config.model_name_or_path={model}",
              f"--config.data.dataset_path={tmp_path / 'rows.jsonl'}"]  # fmt: skip
    options = command(inputs, tmp_path / "run", *change)
    options["env"].pop("ATLAS_TRACEBACK")
    result = subprocess.run(**options, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "the rows contain '<extra_150>', whose id" in result.stderr
    assert "its vocab_size is 400" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_loss_that_is_not_finite_stops_the_run(inputs, tmp_path):
    options = command(inputs, tmp_path, "--config.learning_rate=1e30", "--config.max_grad_norm=0.0")
    result = subprocess.run(**options, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "Lower learning_rate" in result.stderr
    saved = [int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
    assert STEPS not in saved


def test_checkpoints_convert_both_ways(inputs, whole, tmp_path):
    import safetensors.numpy

    tool = [sys.executable, "tools/convert_checkpoint.py"]
    for src, dst in (
        (whole[0], tmp_path / "hf"),
        (whole[0] / "final", tmp_path / "orbax"),
        (tmp_path / "orbax", tmp_path / "hf2"),
    ):
        subprocess.run([*tool, str(src), str(dst)], check=True, capture_output=True)
    files = [
        p / "model.safetensors" for p in (whole[0] / "final", tmp_path / "hf", tmp_path / "hf2")
    ]
    first, *others = [safetensors.numpy.load_file(file) for file in files]
    for other in others:
        assert {k: v.tobytes() for k, v in other.items()} == {
            k: v.tobytes() for k, v in first.items()
        }


def test_launch_passes_keys_on(inputs, tmp_path):
    values = [a.removeprefix("--config.") for a in command(inputs, tmp_path)["args"][4:]]
    launch = ["bash", "launch/launch.sh", "2", "configs/run/quickstart_sft.py", *values]
    python = pathlib.Path(sys.executable).parent
    environment = os.environ | {"XLA_FLAGS": "", "PATH": f"{python}:{os.environ['PATH']}"}
    result = subprocess.run(
        [*launch, "max_steps=1", "+offload"], env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["max_steps"], written["offload"]) == (1, "optimizer")
    wrong = subprocess.run(
        [*launch, "deepspeed=zero2.json"], capture_output=True, text=True, check=False
    )
    assert "sharding=zero1" in wrong.stderr


def test_python_can_train_without_flags(inputs, tmp_path):
    code = (
        "import sys\n"
        "from atlas_jax import config, train\n"
        "model, rows, output = sys.argv[1:]\n"
        "data = config.DataConfig(dataset_path=rows)\n"
        "run = config.SFTConfig(model_name_or_path=model, output_dir=output, max_steps=1,\n"
        "    max_seq_length=64, compilation_cache_dir='', data=data)\n"
        "assert train.run(run) is True\n"
    )
    words = [inputs / "model", inputs / "train.jsonl", tmp_path / "run"]
    result = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True, text=True, check=False, env=command(inputs, tmp_path)["env"],
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()
