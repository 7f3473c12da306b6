"""GRPO runs whose servers fail while they train; the servers are stand-ins."""

import signal

from tests import processes, stand_in
from tests.e2e import test_grpo

inputs = test_grpo.inputs


def test_a_run_goes_on_when_a_server_hangs_and_uses_it_again_when_it_is_back(inputs, tmp_path):
    """Two of each role; one teacher hangs from the first step to the third."""
    model = str(inputs / "model")
    output = tmp_path / "run"
    with stand_in.started(model, tmp_path, 4, "--secs-per-token", "0.02") as servers:
        urls = [url for url, _ in servers]
        command = test_grpo.command(inputs, output, "teaching", devices=1)
        command["args"] += [
            "--config.rollout.backend=vllm",
            f"--config.rollout.teacher_servers={','.join(urls[:2])}",
            f"--config.rollout.student_servers={','.join(urls[2:])}",
            "--config.rollout.max_staleness=1",
            "--config.rollout.sync_dtype=float32",
            "--config.rollout.probe_tolerance=1e-4",
            "--config.save_steps=1",
        ]
        with processes.started([command], tmp_path / "logs") as run:
            run.wait_until(lambda: "step 1/" in run.text(0))
            servers[0][1].send_signal(signal.SIGSTOP)
            run.wait_until(lambda: "step 3/" in run.text(0))
            servers[0][1].send_signal(signal.SIGCONT)
            assert run.wait(600) == [0], run.text(0)[-5000:]
    lines = [line for line in test_grpo.metrics(output) if "loss/total" in line]
    assert [line["step"] for line in lines] == list(range(1, test_grpo.STEPS + 1))
    # A transfer beside the training is reported with the next one, so the second step has none.
    transfers = [line for line in lines if "sync/servers" in line]
    counts = [line["sync/servers"] for line in transfers]
    assert len(counts) == test_grpo.STEPS - 1
    assert counts[0] == 2
    assert 1 in counts
    assert counts[-1] == 2
    assert all(line["sync/probe_diff"] < 1e-4 for line in transfers)
    assert all(line["rollout/failed_frac"] == 0 for line in lines)
    for step in range(1, test_grpo.STEPS + 1):
        written = [s["completion"] for s in test_grpo.samples(output, step) if s["completion"]]
        lag = {step - 1 - completion["weights_version"] for completion in written}
        assert lag <= {0, 1}
