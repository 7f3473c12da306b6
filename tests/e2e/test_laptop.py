"""README's laptop command with real vLLM servers, its evaluation included, on one core and on two.

The 16 questions of the evaluation are 32 requests at once, of more prompt tokens than vLLM computes
in one pass on a CPU.
"""

import json
import os
import subprocess

import pytest

from tests import vllm_servers
from tests.e2e import test_servers

smollm2 = test_servers.smollm2


@pytest.mark.long
@pytest.mark.parametrize("cores", [1, 2])
def test_the_laptop_command_ends_well(smollm2, tmp_path, cores):
    values = {
        "model_name_or_path": smollm2, "student_model": smollm2, "output_dir": tmp_path / "grpo",
        # For the time of a test: less of everything but the requests of the evaluation.
        "max_steps": 1, "gradient_accumulation_steps": 1, "max_new_tokens": 8,
        "max_probe_tokens": 4, "rollout.max_answer_tokens": 4,
    }  # fmt: skip
    environment = os.environ | {"PORT": str(vllm_servers.free_port())}
    for name in ("XLA_FLAGS", "VLLM_API_KEY", "VLLM_FLAGS"):
        environment.pop(name, None)
    available = sorted(os.sched_getaffinity(0))
    done = subprocess.run(
        ["launch/launch_with_server.sh", "1", "1", "configs/run/quickstart_grpo.py",
         *(f"{name}={value}" for name, value in values.items())],
        env=environment, capture_output=True, text=True, check=False,
        preexec_fn=lambda: os.sched_setaffinity(0, available[:cores]),
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    lines = [json.loads(x) for x in (tmp_path / "grpo/metrics.jsonl").read_text().splitlines()]
    assert any("eval/student_accuracy" in line for line in lines)
    assert (tmp_path / "grpo/final/model.safetensors").exists()
