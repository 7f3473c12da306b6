"""A real vLLM server and the trainer, both in bfloat16 as on accelerators: how far they are apart.

The other tests run float32 servers, which show an error and hide rounding. How far apart the two
are depends on the text: the less a token was expected, the more. These are tables and programs,
which the model is fairly sure of; prose has twice the KL divergence, with either kind of head.
"""

import concurrent.futures
import dataclasses
import json
import os
import subprocess
import sys
import urllib.request

import jax
import numpy as np
import pytest

from atlas_jax.checkpoint import hf
from atlas_jax.rollout.engine import Request
from atlas_jax.rollout.vllm import payload
from atlas_jax.startup.compute import Compute
from atlas_jax.startup.model import open_frozen
from tests import vllm_servers
from tests.assets import smollm2_gguf
from tests.rollout import served

pytestmark = pytest.mark.long

QUESTIONS = (
    "Count from 1 to 60.",
    "Write the even numbers up to 80.",
    "Write the first twenty square numbers.",
    "Write the multiplication table of 7.",
    "List the months of the year and the number of days of each.",
    "Write a Python function that returns the factorial of a number.",
    "Write a Python program that prints the numbers from 1 to 10.",
    "Write a Python function that adds two numbers, and call it.",
    "Write an HTML page with a heading and a list of three items.",
)
SAMPLES = 2  # of each
SAMPLING = served.SAMPLING  # temperature 0.7 and top_p 0.95, as in the guide
TOKENS = 240  # of an answer, at most


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    target = tmp_path_factory.mktemp("smollm2") / "model"
    convert = [sys.executable, "tools/convert_checkpoint.py", str(smollm2_gguf()), str(target)]
    subprocess.run(convert, check=True, env=os.environ | {"PYTHONPATH": "."})
    return str(target)


@pytest.fixture(scope="module")
def trainer(smollm2):
    options = dataclasses.replace(served.CONFIG.model, compute_dtype="bfloat16")
    config = dataclasses.replace(served.CONFIG, model=options)
    model = open_frozen(Compute.of(config, jax.devices()[:1]), smollm2)
    return served.Trainer(model, hf.load(model.source, model.decoder))


@pytest.fixture(scope="module")
def server(smollm2, tmp_path_factory):
    flags = ("--dtype", "bfloat16", "--max-model-len", "512")
    with vllm_servers.running([smollm2], tmp_path_factory.mktemp("server"), *flags) as (found,):
        yield found


def ask(server, body):
    """Returns token ids and log-probabilities of a completion."""
    headers = {"Content-Type": "application/json"}
    url = server.url + "/inference/v1/generate"
    call = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(call, timeout=800) as reply:
        (choice,) = json.load(reply)["choices"]
    return np.asarray(choice["token_ids"]), choice["logprobs"]["content"]


def prompts(trainer):
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        tokenizer = trainer.model.files.tokenizer
        yield tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)


def test_a_bfloat16_server_agrees_with_a_bfloat16_trainer(trainer, server):
    """The limits are those of a float32 head, which `serve` asks for; a rounded one is above."""
    requests = [Request(tuple(p), TOKENS, seed=i) for i, p in enumerate(prompts(trainer))]
    asked = [(request, sample) for request in requests for sample in range(SAMPLES)]
    bodies = [payload(request, sample, SAMPLING, trainer.stop_ids) for request, sample in asked]
    with concurrent.futures.ThreadPoolExecutor(len(bodies)) as threads:
        answers = list(threads.map(lambda body: ask(server, body), bodies))
    found = np.concatenate([
        trainer.logprobs(request.prompt_ids, ids)
        - np.asarray([entry["logprob"] for entry in content])
        for (request, _), (ids, content) in zip(asked, answers, strict=True)
    ])  # fmt: skip
    assert len(found) >= 2000
    mismatch_kl = np.mean(np.expm1(found) - found)  # k3, as in rollout/mismatch_kl
    assert np.abs(found).mean() <= 0.023
    assert mismatch_kl <= 8.5e-4


def test_the_logits_of_a_bfloat16_server_are_not_rounded(trainer, server):
    """Rounded logits, of 2 and more, are multiples of 1/64, and so are differences of them."""
    for prompt in prompts(trainer):
        sampling = {"temperature": 1.0, "max_tokens": 1, "logprobs": 20}
        _, (entry,) = ask(server, {"token_ids": prompt, "sampling_params": sampling})
        best, *others = (token["logprob"] for token in entry["top_logprobs"])
        steps = 64 * (best - np.asarray(others))
        assert np.abs(steps - np.round(steps)).max() > 0.05
