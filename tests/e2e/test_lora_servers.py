"""GRPO with LoRA and real vLLM servers: both ways of the weights, a kill, and what it leaves.

The matrices with the factors added go to the tests' own server, the adapter alone to a second one,
which is started with the `final/` of a run as one more adapter.
"""

import json
import os
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import numpy as np
import pytest

from atlas_jax.options.train import LoraOptions
from atlas_jax.rollout.engine import Request
from atlas_jax.rollout.sampling import Sampling
from tests import processes, vllm_servers
from tests.conftest import VLLM_WORDS
from tests.rollout import served

pytestmark = pytest.mark.long

LORA = LoraOptions(rank=2, alpha=4.0)
STEPS = 3
GREEDY = Sampling(0.0)
REQUESTS = [Request((5, 6, 7), 12, seed=3), Request((9, 4), 12, seed=4)]
FLAGS = ("--enable-lora", "--max-loras", "2", "--max-lora-rank", "8")
COMMON = {
    "max_steps": STEPS, "save_steps": 1, "learning_rate": 1e-2, "lr_scheduler_type": "constant",
    "warmup_ratio": 0.0, "per_device_train_batch_size": 4, "compilation_cache_dir": "",
    "model.lora.rank": LORA.rank, "model.lora.alpha": LORA.alpha, "data.eval_path": "",
    "data.system_prompt": "", "data.length_buckets": "(32,)", "max_seq_length": 32,
    "max_prompt_length": 12, "max_new_tokens": 6, "num_generations": 4, "temperature": 1.0,
    "top_p": 1.0, "beta": 0.0, "gradient_accumulation_steps": 1, "train_batch_size": 0,
    "rollout.direct_template": "{question} answer", "rollout.sync_dtype": "float32",
    "rollout.probe_tolerance": 1e-3,
}  # fmt: skip


class Inputs(NamedTuple):
    """What both ways share: the questions, the servers, and a run without servers."""

    questions: str
    merged: vllm_servers.Server
    adapted: vllm_servers.Server
    final: str


def command(model, questions, output, **values):
    """Returns the command of a run of GRPO without a student."""
    options = COMMON | {
        "model_name_or_path": model, "output_dir": output, "data.dataset_path": questions, **values,
    }  # fmt: skip
    flags = [f"--config.{name}={value}" for name, value in options.items()]
    run = [sys.executable, "-m", "atlas_jax.train", "--config=configs/run/rlvr_gsm8k.py", *flags]
    return {"args": run, "env": os.environ | {"XLA_FLAGS": processes.xla_flags(1)}}


@pytest.fixture(scope="module")
def inputs(vllm_server, tmp_path_factory):
    place = tmp_path_factory.mktemp("lora")
    questions = place / "questions.jsonl"
    rows = [{"question": q, "answer": str(i % 3)} for i, q in enumerate(VLLM_WORDS[:8])]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    alone = command(vllm_server.root, questions, place / "alone", max_steps=1)
    result = subprocess.run(**alone, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    final = str(place / "alone" / "final")
    more = ("--lora-modules", f"final={final}")
    with vllm_servers.running([vllm_server.root], place, *FLAGS, *more) as (adapted,):
        yield Inputs(str(questions), vllm_server, adapted, final)
    # As the other tests expect it.
    how = {"method": "load_version", "kwargs": {"weights_path": vllm_server.root}}
    vllm_server.post("/collective_rpc", how)


def server_of(inputs, way):
    return inputs.adapted if way == "adapter" else inputs.merged


@pytest.fixture(scope="module", params=["reload", "adapter"])
def run(request, inputs, tmp_path_factory):
    """The way of the weights and the directory of a run that was killed after its first step."""
    way = request.param
    output = tmp_path_factory.mktemp(way) / "run"
    server = server_of(inputs, way)
    values = {
        "rollout.backend": "vllm", "rollout.teacher_servers": server.url,
        "rollout.weight_sync": way,
    }  # fmt: skip
    start = command(server.root, inputs.questions, output, **values)
    with (output.parent / "printed.log").open("wb") as log:
        process = subprocess.Popen(**start, stdout=log, stderr=log)
        while process.poll() is None and not (output / "checkpoints" / "1").exists():
            time.sleep(0.05)
        assert process.poll() is None, (output.parent / "printed.log").read_text()[-3000:]
        process.send_signal(signal.SIGKILL)
        process.wait()
    again = subprocess.run(**start, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr[-3000:]
    return way, output


def test_three_steps_with_a_kill_between_are_written_by_the_weights_that_were_trained(run):
    way, output = run
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line for line in lines if "loss/total" in line}
    assert sorted(found) == list(range(1, STEPS + 1))
    assert "at step" in (output / "training.log").read_text()
    for step, line in found.items():
        assert line["sync/servers"] == 1
        assert line["sync/probe_diff"] <= 1e-4
        assert 0 <= line["rollout/mismatch_kl"] <= 1e-7
        (path,) = (output / "rollouts").glob(f"step_{step:06d}*")
        samples = [json.loads(row) for row in path.read_text().splitlines()]
        assert {s["completion"]["weights_version"] for s in samples} == {step - 1}
    tensors = (output / "final" / "adapter_model.safetensors").stat().st_size
    assert (found[STEPS]["sync/bytes"] < tensors) == (way == "adapter")


@pytest.mark.parametrize("way", ["reload", "adapter"])
def test_a_server_writes_what_the_trainer_writes_with_the_factors(inputs, way, tmp_path):
    server = server_of(inputs, way)
    base = served.trainer(server.root)
    lora = LORA if way == "adapter" else None
    # Two versions, so that the second one must take the place of the first.
    versions = [served.adapted(base, LORA, seed) for seed in (1, 2)]
    texts = set()
    with served.connected(versions[0], [server.url], tmp_path, dtype="float32", lora=lora) as found:
        for version, ours in enumerate(versions, start=51):
            values = found.sync.push(ours.params, version)
            assert values["sync/probe_diff"][0] < 1e-4
            written = found.engine.generate(REQUESTS, GREEDY)
            expected = ours.generate(REQUESTS, GREEDY)
            for (completion,), (wanted,) in zip(written, expected, strict=True):
                assert completion.token_ids == wanted.token_ids
                assert completion.weights_version == version
                np.testing.assert_allclose(
                    completion.untruncated_logprobs, wanted.untruncated_logprobs, atol=1e-3
                )
                texts.add(completion.token_ids)
    assert len(texts) > len(REQUESTS), "versions that write the same show nothing"


def test_the_adapter_that_a_run_leaves_loads_in_vllm_as_it_is(inputs, tmp_path):
    reply = {}
    for prompt in REQUESTS:
        body = {"prompt": list(prompt.prompt_ids), "max_tokens": 12, "temperature": 0,
                "return_token_ids": True}  # fmt: skip
        answer = inputs.adapted.post("/v1/completions", body | {"model": "final"})
        reply[prompt.prompt_ids] = tuple(answer["choices"][0]["token_ids"])
    ours = served.trainer(inputs.final)  # the base with the factors added
    for (wanted,), prompt in zip(ours.generate(REQUESTS, GREEDY), REQUESTS, strict=True):
        assert reply[prompt.prompt_ids] == wanted.token_ids
