"""Rewards of one's own: sync with the row's unit tests, async, and as TRL calls them.

    atlas-train --config rlvr_gsm8k --config.data.dataset_path=code.jsonl
      --config.reward.names="('examples.custom_reward:passes_tests',
        'examples.custom_reward:compiles', 'examples.custom_reward:brevity')"
      --config.reward.weights="(1.0, 0.2, 0.1)"

A row of `code.jsonl` has `question` and `tests`, a list of assertions. The functions run programs
that the model wrote: train in a container that may do no harm.
"""

import asyncio
import subprocess
import sys


def passes_tests(sample):
    """Returns the share of the row's tests that the completion passes; None without tests.

    It runs in a process that is killed after `reward.timeout_secs`, with all that it has started.
    """
    tests = sample.question.row.get("tests")
    if not tests:
        return None
    return sum(_runs(f"{sample.completion.text}\n{test}") for test in tests) / len(tests)


def _runs(program):
    command = [sys.executable, "-I", "-c", program]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


async def compiles(sample):
    """Returns 1 if the completion is Python, else 0; many completions are looked at in parallel."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-c", "import sys; compile(sys.stdin.read(), 'text', 'exec')"),
        stdin=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    await process.communicate(sample.completion.text.encode())
    return float(process.returncode == 0)


def brevity(prompts, completions, **kwargs):
    """Returns a number for each completion, higher for shorter ones, from TRL's columns."""
    return [1 / (1 + len(completion)) for completion in completions]
