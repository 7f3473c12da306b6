"""Losses and gradients of TRL's own code on random batches, recorded with their inputs for a test.

`python tools/trl_cases tests/trl_cases.npz`, in an environment of its own with `trl==1.16.*` and
torch. `tests/test_trl_cases.py` compares the losses of this package with the file.

TRL's `_generate_and_score_completions`, `split_tensor_dict` and `_compute_loss` run unchanged, with
a real `GRPOConfig`. Given are what the model says of tokens, the completions and the rewards.
"""

import argparse
import collections
import itertools
import json
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import trl
from accelerate import Accelerator
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import split_tensor_dict

GROUPS, MEMBERS, LONGEST = 4, 4, 12
ROWS = GROUPS * MEMBERS
STOP, PAD, FIRST_PROMPT = 2, 0, 1000
ALIKE = {"cispo": {"epsilon_high": 1.28}}
"""TRL bounds cispo's ratio by the option itself, and the other losses by 1 + the option."""
LOSSES = {
    **{name: {"loss_type": name} for name in ("grpo", "dr_grpo", "bnpo", "dapo", "cispo")},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
}
CORRECTIONS = ("none", "token_truncate", "sequence_truncate", "token_mask", "sequence_mask")
KL = ({"beta": 0.0}, {"beta": 0.04, "use_bias_correction_kl": False}, {"beta": 0.04})
"""None, k3, and TRL's default."""


def inputs(seed: int) -> dict[str, np.ndarray]:
    """Returns a random batch; the log-probabilities differ by about `spread`."""
    rng = np.random.default_rng(seed)
    spread = 0.4
    shape = (ROWS, LONGEST)
    logprobs = -rng.exponential(1.5, shape)
    old = logprobs + rng.normal(0, spread, shape)
    made = {
        "lengths": rng.permutation(np.resize(np.arange(1, LONGEST + 1), ROWS)),
        "truncated": rng.permutation(np.arange(ROWS) < 4),
        "unscored": rng.permutation(np.arange(ROWS) < 4),
        "rewards": rng.normal(0, 1, ROWS),
        "logprobs": logprobs,
        "old": old,
        "rollout": old + rng.normal(0, spread, shape),
        "ref": logprobs + rng.normal(0, 2 * spread, shape),
        "entropy": rng.exponential(1.0, shape),
    }
    return {k: v.astype(np.float32) if v.dtype == np.float64 else v for k, v in made.items()}


def cases() -> Iterator[dict[str, Any]]:
    """Yields a dict of each case: TRL's options, and which inputs are left out or split."""
    for name, correction, on_policy, kl in itertools.product(LOSSES, CORRECTIONS, (1, 0), KL):
        # With one ratio for a completion TRL weighs the KL by it, against the paper.
        if not (name == "gspo" and kl is KL[2]):
            yield case(name, correction, on_policy, **kl)
    for name, correction, kl in itertools.product(LOSSES, CORRECTIONS, KL[:2]):
        yield case(name, correction, mask_truncated_completions=True, **kl)
    for name, correction, cut in itertools.product(LOSSES, CORRECTIONS[:3], (False, True)):
        yield case(name, correction, unscored=True, mask_truncated_completions=cut, beta=0.0)
    yield from further_cases()


def further_cases() -> Iterator[dict[str, Any]]:
    """Yields cases of options that act by themselves."""
    for name, correction in itertools.product(LOSSES, CORRECTIONS[:2]):
        if name != "cispo":
            yield case(name, correction, beta=0.0, delta=1.5)
    for name, on_policy, kl in itertools.product(("bnpo", "dapo", "cispo"), (1, 0), KL[:2]):
        yield case(name, "none", on_policy, entropy_coef=0.01, **kl)
    for name, scale in itertools.product(LOSSES, ("batch", "none")):
        yield case(name, "none", scale_rewards=scale, beta=0.0)
    for name, kl in itertools.product(LOSSES, KL[:2]):
        if name != "bnpo":  # TRL averages the means of microbatches
            yield case(name, "none", microbatches=4, **kl)


def case(
    name: str,
    correction: str,
    on_policy: int = 0,
    unscored: bool = False,
    microbatches: int = 1,
    **options: Any,
) -> dict[str, Any]:
    """Returns one case."""
    options = LOSSES[name] | {"epsilon": 0.2, "epsilon_high": 0.28} | ALIKE.get(name, {}) | options
    if correction != "none":
        options |= {"use_vllm": True, "vllm_importance_sampling_mode": correction,
                    "vllm_importance_sampling_clip_max": 1.25}  # fmt: skip
    return {"on_policy": bool(on_policy), "unscored": unscored, "microbatches": microbatches,
            "options": options}  # fmt: skip


class Canned(GRPOTrainer):
    """TRL's trainer with given completions, rewards and log-probabilities."""

    def __init__(self, config: GRPOConfig, given: dict[str, np.ndarray]) -> None:
        """Sets what `GRPOTrainer.__init__` takes of the options, and stand-ins for models."""
        self.args = config
        self.accelerator = Accelerator(cpu=True)
        self.given = given
        self.leaf = torch.tensor(given["logprobs"], requires_grad=True)
        self.entropy_leaf = torch.tensor(given["entropy"], requires_grad=True)
        for name in vars(config):
            if not hasattr(self, name):
                setattr(self, name, getattr(config, name))
        self.epsilon_low = config.epsilon
        self.entropy_coef = config.entropy_coef
        self._entropy_bonus_enabled = config.entropy_coef != 0.0
        self.num_generations_eval = self.num_generations
        self.model = types.SimpleNamespace(training=True, is_gradient_checkpointing=False)
        self.ref_model = types.SimpleNamespace()
        self.state = types.SimpleNamespace(global_step=0, num_input_tokens_seen=0)
        self._last_loaded_step = 0
        self.current_gradient_accumulation_steps = config.gradient_accumulation_steps
        self.processing_class = types.SimpleNamespace(
            batch_decode=lambda ids, **_: [""] * len(ids), pad_token_id=PAD
        )
        self._tokenizer = self.processing_class
        self.eos_token_ids = [STOP]
        self.rollout_func = lambda prompts, trainer: self._completions()
        self.reward_func_names = ["given"]
        self.reward_weights = torch.ones(1)
        self.environments = self.environment_factories = self.tools = None
        self.aux_loss_enabled = self._is_vlm = False
        self._metrics = collections.defaultdict(lambda: collections.defaultdict(list))
        self._logs = collections.defaultdict(list)
        self._logs["rewards"] = collections.defaultdict(list)
        self._logs["extra"] = collections.defaultdict(list)
        self._pending_extra_logs = collections.defaultdict(list)
        self._pending_metrics = collections.defaultdict(list)

    def _completions(self) -> dict[str, Any]:
        given = self.given
        ids = [[7] * (n - 1) + [7 if cut else STOP]
               for n, cut in zip(given["lengths"], given["truncated"], strict=True)]  # fmt: skip
        rollout = [
            row[:n].tolist() for row, n in zip(given["rollout"], given["lengths"], strict=True)
        ]
        prompts = [[FIRST_PROMPT + row] for row in range(ROWS)]
        return {"prompt_ids": prompts, "completion_ids": ids, "logprobs": rollout}

    def _calculate_rewards(self, *_: Any) -> torch.Tensor:
        return torch.tensor(self.given["rewards"])[:, None]

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: torch.Tensor, *_: Any, compute_entropy: bool = False, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        if model is self.ref_model:
            return torch.tensor(self.given["ref"]), None, None
        if not compute_entropy:
            return torch.tensor(self.given["old"]), None, None
        rows = input_ids[:, 0] - FIRST_PROMPT
        return self.leaf[rows], self.entropy_leaf[rows], None

    def result(self) -> tuple[float, np.ndarray, torch.Tensor | None]:
        """Returns the loss and its derivatives by the log-probabilities and the entropies."""
        scored = self._generate_and_score_completions([{"prompt": ""}] * ROWS)
        total = 0.0
        for part in split_tensor_dict(scored, self.args.steps_per_generation):
            loss = self._compute_loss(self.model, part)
            loss.backward()
            total += loss.item()
        return total, self.leaf.grad.numpy(), self.entropy_leaf.grad


def compute(
    case: dict[str, Any], given: dict[str, np.ndarray]
) -> tuple[float, np.ndarray, torch.Tensor | None]:
    """Returns the results of one case."""
    changed = dict(given)
    if case["on_policy"]:
        changed["old"] = given["logprobs"]
    if case["unscored"]:
        changed["rewards"] = np.where(given["unscored"], np.nan, given["rewards"])
    parts = case["microbatches"]
    config = GRPOConfig(
        output_dir="unused",
        report_to=[],
        use_cpu=True,
        bf16=False,
        num_generations=MEMBERS,
        max_completion_length=LONGEST,
        per_device_train_batch_size=ROWS // parts,
        gradient_accumulation_steps=parts,
        num_iterations=1 if case["on_policy"] else 2,
        **case["options"],
    )
    return Canned(config, changed).result()


def main() -> None:
    """Writes the cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output")
    options = parser.parse_args()
    given = [inputs(seed) for seed in range(3)]
    made, losses, gradients, by_entropy = [], [], [], []
    for number, each in enumerate(cases()):
        each["inputs"] = number % len(given)
        loss, gradient, entropy = compute(each, given[each["inputs"]])
        made.append(each)
        losses.append(loss)
        gradients.append(gradient)
        by_entropy.append(0.0 if entropy is None else entropy.min().item())
    np.savez_compressed(
        options.output,
        trl=trl.__version__,
        cases=json.dumps(made),
        loss=np.float32(losses),
        gradient=np.float32(gradients),
        by_entropy=np.float32(by_entropy),
        **{name: np.stack([batch[name] for batch in given]) for name in given[0]},
    )
    print(f"{len(made)} cases of TRL {trl.__version__} in {options.output}")


if __name__ == "__main__":
    main()
