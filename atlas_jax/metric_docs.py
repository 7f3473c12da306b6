"""Metrics of runs: the name, unit and meaning of each, and `docs/metrics.md` made from them.

Imports no JAX.
"""

from __future__ import annotations

from typing import NamedTuple


class Metric(NamedTuple):
    """Unit and meaning of a metric."""

    unit: str
    meaning: str


_NATS = "nats per token"
_SHARE = "share"
_SECS = "seconds"
_TOKENS = "tokens"

METRICS: dict[str, Metric] = {
    "loss/total": Metric(_NATS, "SFT: mean cross entropy of the trained tokens; the ATLAS guide's "
        "target is below 1.5. GRPO: `loss/policy` plus `beta` times `loss/kl`, less "
        "`entropy_coef` times the entropy, which is averaged as the loss is. GKD: mean divergence "
        "from the teacher over the tokens of completions."),
    "loss/policy": Metric("", "Policy term of the GRPO loss, with `kl_estimator=in_reward` the KL "
        "included."),
    "loss/kl": Metric(_NATS, "KL term of the GRPO loss, before `beta` weighs it. With "
        "`kl_estimator=unbiased` it is weighed by the ratio of probabilities; `in_reward` has "
        "none."),
    "eval/loss": Metric(_NATS, "SFT: mean cross entropy of the trained tokens of the held-out "
        "rows. GKD: mean divergence from the teacher over the completions of these rows."),
    "eval/agreement_frac": Metric(_SHARE, "The same as `distillation/agreement_frac` over the "
        "completions of the held-out rows."),
    "distillation/agreement_frac": Metric(_SHARE, "Tokens of completions of which the policy and "
        "the teacher hold the same for the most probable."),
    "distillation/teacher_entropy": Metric(_NATS, "Entropy of the teacher at the temperature of "
        "the divergence; `policy/entropy` is the policy's."),
    "distillation/tail_frac": Metric(_SHARE, "Probability that the teacher gives all tokens that "
        "its servers do not name, with `scoring.servers`; a higher `scoring.top_tokens` lowers "
        "it."),
    "distillation/failed_frac": Metric(_SHARE, "Texts of a step for which the teacher's servers "
        "gave no scores. They do not train, and above `scoring.max_failed_frac` the run stops."),
    "distillation/own_frac": Metric(_SHARE, "Completions of a step that the policy has written "
        "itself, the share that `lmbda` sets. The others are those of the rows."),
    "optim/grad_norm": Metric("", "Global norm of the gradient before clipping; the ATLAS guide's "
        "target is below 5."),
    "optim/learning_rate": Metric("", "Learning rate of the update."),
    "policy/kl": Metric(_NATS, "k3 estimate of the KL divergence from the policy to the reference "
        "model. The ATLAS guide wants 0.5 to 2 and warns above 5."),
    "policy/entropy": Metric(_NATS, "Entropy of the policy at the sampling temperature."),
    "policy/clip_frac": Metric(_SHARE, "Tokens whose probability ratio is clipped, by `delta` "
        "too."),
    "policy/ratio_mean": Metric("", "Mean ratio of a token's probability to its probability before "
        "the update."),
    "rollout/mismatch_kl": Metric(_NATS, "k3 estimate of the KL divergence between the "
        "probabilities that sampled and those that train. It is near 0 where both compute alike."),
    "rollout/fresh_mismatch_kl": Metric(_NATS, "The same over the tokens that the trained weights "
        "themselves wrote, with `rollout.max_staleness`. The rest of the mismatch comes of older "
        "weights. It has no value in a step without such tokens."),
    "rollout/importance_weight": Metric("", "Mean weight that corrects this mismatch."),
    "rollout/importance_capped_frac": Metric(_SHARE, "Weights above `importance_sampling_cap`."),
    "rollout/completion_tokens": Metric(_TOKENS, "Mean number of tokens that the policy sampled "
        "for a completion."),
    "rollout/turns": Metric("turns", "Mean number of the policy's turns in an episode, with "
        "`rollout.protocol=package.module:function`."),
    "rollout/observed_tokens": Metric(_TOKENS, "Mean number of tokens that others said between the "
        "turns of an episode. They are not trained."),
    "rollout/prompt_tokens": Metric(_TOKENS, "Mean length of the policy's prompts."),
    "rollout/truncated_frac": Metric(_SHARE, "Completions that ended at `max_new_tokens`."),
    "rollout/failed_frac": Metric(_SHARE, "Completions that are missing."),
    "rollout/text_repeat_frac": Metric(_SHARE, "Completions whose text another one of their group "
        "has too."),
    "rollout/refills": Metric("", "Further questions that a step asked in the place of those whose "
        "groups teach nothing, with `rollout.refill_rounds`."),
    "rollout/trained_frac": Metric(_SHARE, "Samples that the update counts. A step without any is "
        "logged, and the run goes on."),
    "rollout/version_lag": Metric("updates", "Mean number of updates between the weights that "
        "wrote a token and the weights that it trains. New weights may go on with a completion "
        "that others have begun."),
    "rollout/version_lag_max": Metric("updates", "Most updates between the weights that began a "
        "completion and the weights that it trains. It is 0 unless `rollout.max_staleness` allows "
        "more."),
    "rollout/version_lag_none_frac": Metric(_SHARE, "Completions by the weights that they train."),
    "rollout/version_lag_one_frac": Metric(_SHARE, "Completions by weights one update older."),
    "rollout/version_lag_two_frac": Metric(_SHARE, "Completions by weights two updates older."),
    "rollout/version_lag_more_frac": Metric(_SHARE, "Completions by weights that are still older."),
    "rollout/student_cached_frac": Metric(_SHARE, "Answers and approaches without a lesson that "
        "were kept from before (`rollout.cache_student`), evaluations since the last line "
        "included."),
    "rollout/teacher_running": Metric("requests", "With `rollout.backend=vllm`, requests that a "
        "server of the trained model computes at one time; with `scoring.servers` a server of the "
        "teacher that is learnt from. This and the next ones are means over "
        "the servers, read every two seconds while one of them has a request."),
    "rollout/teacher_waiting": Metric("requests", "Requests that wait in the queue of a server of "
        "the trained model."),
    "rollout/teacher_kv_use": Metric(_SHARE, "Memory for keys and values that is in use, of a "
        "server of the trained model."),
    "rollout/teacher_preemptions": Metric("requests", "Requests that had to make room for others "
        "during the step, of all servers of the trained model together. They are computed again: "
        "with many of them lower `rollout.max_in_flight`."),
    "rollout/student_running": Metric("requests", "The same as `rollout/teacher_running` of the "
        "student's servers."),
    "rollout/student_waiting": Metric("requests", "The same as `rollout/teacher_waiting` of the "
        "student's servers."),
    "rollout/student_kv_use": Metric(_SHARE, "The same as `rollout/teacher_kv_use` of the "
        "student's servers."),
    "rollout/student_preemptions": Metric("requests", "The same as `rollout/teacher_preemptions` "
        "of the student's servers."),
    "reward/mean": Metric("", "Mean reward of the samples that have one."),
    "reward/std": Metric("", "Mean standard deviation of the reward within groups."),
    "reward/NAME": Metric("", "Mean of the part of the reward that is called NAME, where the "
        "reward is a sum of several."),
    "reward/turn_mean": Metric("", "Mean reward that an episode gave to a turn."),
    "reward/overlong_penalty": Metric("", "Mean reward that completions lost by "
        "`reward.overlong_tokens`."),
    "reward/failed_frac": Metric(_SHARE, "Samples without a score."),
    "reward/skipped_frac": Metric(_SHARE, "Samples without a score because of what they are: the "
        "prompt is too long, or there is no lesson. `reward.max_failed_frac` is about the other "
        "samples without a score."),
    "reward/error_frac": Metric(_SHARE, "Samples that a reward function of your own did not score: "
        "it raised an error, took longer than `reward.timeout_secs`, or returned no number."),
    "reward/zero_std_group_frac": Metric(_SHARE, "Groups whose rewards are all equal, among the "
        "groups with two scores or more."),
    "rim_rewards/NAME": Metric("0 to 1", "Mean score of the judge NAME: `accuracy`, "
        "`helpfulness`, `process`, `diagnostic`, or one of your own."),
    "reward/judge_missing_frac": Metric(_SHARE, "Scores of judges that are missing, so that their "
        "samples have no reward."),
    "reward/opinions_missing_frac": Metric(_SHARE, "Opinions that did not come, of those that were "
        "asked for."),
    "reward/escalated_frac": Metric(_SHARE, "Verdicts for which the large model was asked."),
    "reward/disagreement": Metric("", "Mean standard deviation of a judge's opinions."),
    "reward/no_honest_group_frac": Metric(_SHARE, "Groups that train nothing, because every lesson "
        "with a score gives the answer away or aims at the judge."),
    "reward/gamed_frac": Metric(_SHARE, "Judged lessons that state the answer, speak to the judge "
        "or fill space."),
    "reward/calls": Metric("requests per sample", "Requests to judges."),
    "reward/tokens": Metric("tokens per sample", "Tokens of requests to judges and of their "
        "replies."),
    "reward/cost": Metric("money per sample", "Price of the requests to judges, in the currency of "
        "the prices; null where a price is not known. The account of the whole run is in "
        "`judges_spent_process_*.json`."),
    "reward/cache_hit_frac": Metric(_SHARE, "Replies of judges that came from the cache."),
    "teaching/student_accuracy": Metric(_SHARE, "Right answers of the student with a lesson."),
    "teaching/baseline_accuracy": Metric(_SHARE, "Right answers of the student without a lesson."),
    "teaching/accuracy_delta": Metric("", "Accuracy with a lesson, less accuracy without one."),
    "teaching/improvement_rate": Metric(_SHARE, "Wrong answers that a lesson made right."),
    "teaching/degradation_rate": Metric(_SHARE, "Right answers that a lesson made wrong."),
    "teaching/non_degradation_rate": Metric(_SHARE, "1 minus `teaching/degradation_rate`; the "
        "ATLAS guide wants it above 0.95."),
    "teaching/completion_rate": Metric(_SHARE, "Answers with a lesson that end by themselves and "
        "hold a result."),
    "teaching/response_token_reduction": Metric(_SHARE, "Tokens that a lesson saves in the "
        "student's answer: 1 minus tokens with a lesson over tokens without one."),
    "teaching/token_efficiency": Metric("reward per 100 tokens", "Reward for the length of the "
        "teacher's text."),
    "teaching/missing_frac": Metric(_SHARE, "Texts of the teacher without a lesson."),
    "teaching/malformed_frac": Metric(_SHARE, "Texts of the teacher with a tag of a lesson and no "
        "lesson: it is not closed, or it has no letter and no digit."),
    "teaching/answer_leak_frac": Metric(_SHARE, "Lessons that state the answer."),
    "teaching/probe_tokens": Metric(_TOKENS, "Mean length of the approach that the student "
        "writes."),
    "eval/accuracy": Metric(_SHARE, "Right answers to held-out questions under "
        "`rollout.protocol=direct`, decoded greedily."),
    "eval/student_accuracy": Metric(_SHARE, "Right answers with a lesson on held-out questions, "
        "decoded greedily."),
    "eval/baseline_accuracy": Metric(_SHARE, "Right answers without a lesson on held-out "
        "questions, decoded greedily."),
    "perf/step_secs": Metric(_SECS, "Wall time of a step."),
    "perf/tokens_per_sec_per_device": Metric("tokens per second", "Tokens that the updates read, "
        "without padding. GRPO counts a prompt as often as rows hold it, and all for each of "
        "`num_iterations` passes."),
    "perf/real_token_frac": Metric(_SHARE, "Positions of the rows that hold a token; the rest is "
        "padding, which costs as much as a token does."),
    "perf/mfu": Metric(_SHARE, "Share of the device's bfloat16 peak that the model's own "
        "arithmetic uses. Recomputation is not counted, the output head is counted for all tokens. "
        "It is written only where the peak is known."),
    "perf/memory_peak_bytes": Metric("bytes", "Most memory in use on the first device since the "
        "process began. It is written only where JAX knows it, as on GPUs and TPUs."),
    "perf/generate_secs": Metric(_SECS, "Time from the beginning of a step's questions until their "
        "last text. With `rollout.max_staleness` above 0 it overlaps with other steps."),
    "perf/score_secs": Metric(_SECS, "Time from the last text of a step until its last reward. "
        "GKD: time that a step waits for the scores of the teacher's servers."),
    "perf/baseline_secs": Metric(_SECS, "Time in which a question waited for the student's answer "
        "without a lesson."),
    "perf/probe_secs": Metric(_SECS, "Time in which a question waited for the student's approach."),
    "perf/policy_secs": Metric(_SECS, "Time in which the trained model wrote the group of a "
        "question, from the first to the last completion."),
    "perf/guided_secs": Metric(_SECS, "Time in which the student answered the lessons of a "
        "question, from the first to the last answer."),
    "perf/rollout_tokens_per_sec": Metric("tokens per second", "Tokens that all models wrote, for "
        "the wall time since the samples of the step before were complete."),
    "perf/teacher_seats": Metric("requests", "Completions of the trained model in progress, mean "
        "over that time."),
    "perf/student_seats": Metric("requests", "Completions of the student in progress, mean over "
        "that time."),
    "perf/teacher_busy_frac": Metric(_SHARE, "Part of that time with at least one completion of "
        "the trained model in progress, mean over processes."),
    "perf/student_busy_frac": Metric(_SHARE, "Part of that time with at least one completion of "
        "the student in progress, mean over processes."),
    "perf/logprobs_secs": Metric(_SECS, "Part of a step spent on reference log-probabilities."),
    "perf/wait_secs": Metric(_SECS, "Time that a step waited for its completions and rewards."),
    "sync/bytes": Metric("bytes", "Size of the weights that the servers got."),
    "sync/blocked_secs": Metric(_SECS, "Time for which training waited for the transfer "
        "of weights; the rest of it ran beside the training."),
    "sync/export_secs": Metric(_SECS, "Time to write the weights for the servers."),
    "sync/pause_secs": Metric(_SECS, "Time to pause the servers."),
    "sync/load_secs": Metric(_SECS, "Time in which the servers loaded the weights."),
    "sync/probe_secs": Metric(_SECS, "Time until the servers have answered with the new weights."),
    "sync/score_secs": Metric(_SECS, "Time in which the trainer computed the "
        "log-probabilities with which it compares these answers."),
    "sync/total_secs": Metric(_SECS, "Time of the whole transfer of weights."),
    "sync/probe_diff": Metric("nats", "Mean absolute difference of log-probabilities between "
        "server and trainer on the probe, of the server where it is largest."),
    "sync/servers": Metric("servers", "Servers that have the weights."),
    "sync/uncleared_caches": Metric("servers", "Servers that could not clear their prefix cache "
        "because requests were in flight. No later request reads that cache."),
}  # fmt: skip
"""Name -> unit and meaning; NAME stands for a name that the run's options give."""

TEXTS = {
    "lessons": "Some questions of the step: the student's answer alone, its plan, the lesson, its "
    "answer with the lesson, and what the reward says of it.",
}
"""Name of a text that is reported -> its meaning."""

_HEAD = """\
# Metrics

Made by `tools/make_docs.py`; do not edit.

Metrics are in `metrics.jsonl` of a run's `output_dir`, one JSON object per line, and in TensorBoard
event files. A value is the mean over the steps since the last line, over all processes; a name that
ends in `_max` is the largest value instead. A value is null where there was nothing to count. Every
`teaching/…` metric is also written as `eval/…`, on held-out questions.

| name | unit | meaning |
|---|---|---|
"""


def markdown() -> str:
    """Returns `docs/metrics.md`."""
    lines = [f"| `{name}` | {m.unit} | {m.meaning} |\n" for name, m in METRICS.items()]
    return _HEAD + "".join(lines)


def describe(name: str) -> str:
    """Returns the meaning of a metric with its unit, in Markdown; empty for one of a user's own."""
    metric = METRICS.get(name) or METRICS.get(name.replace("eval/", "teaching/", 1))
    area, _, own = name.partition("/")
    if metric is None and (pattern := METRICS.get(f"{area}/NAME")):
        metric = pattern._replace(meaning=pattern.meaning.replace("NAME", own))
    if metric is None:
        return ""
    held_out = name.startswith("eval/") and name not in METRICS
    unit = f" Unit: {metric.unit}." if metric.unit else ""
    return metric.meaning + unit + (" On held-out questions, decoded greedily." if held_out else "")
