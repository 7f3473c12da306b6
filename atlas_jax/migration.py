"""Names of other trainers, and what to write here: the table of `docs/migration.md`.

`python -m atlas_jax.migration` prints that document; `python -m atlas_jax.migration WORD` prints what
to write for a word. Imports nothing of the package.
"""

from __future__ import annotations

import re
import sys
from typing import NamedTuple

_OFF = ("false", "no", "off", "0", "null", "none", "")


class Foreign(NamedTuple):
    """Names that mean the same elsewhere, and their counterpart here."""

    names: str
    """Separated by blanks; what a Markdown table shows. A name that ends in `*` is a prefix."""
    here: str
    """A sentence, in Markdown."""
    changes_nothing: bool = False
    """The option is accepted, whatever its value."""
    absent: bool = False
    """There is no such thing here; values that turn it off are accepted."""
    same_as: str = ""
    """The option with the same values, which is set in its place."""

    @property
    def answer(self) -> str:
        """The sentence for a terminal."""
        return self.here.replace("`", "")

    def accepts(self, value: str) -> bool:
        """Returns true if the option with this value is taken."""
        off = self.absent and value.lower() in _OFF
        return self.changes_nothing or bool(self.same_as) or off

    def matches(self, word: str) -> bool:
        """Returns true for one of the names."""
        return any(
            word.startswith(name[:-1]) if name.endswith("*") else word == name
            for name in self.names.split()
        )


OPTIONS: tuple[Foreign, ...] = (
    # Models and numbers.
    Foreign("bf16 fp16 bf16_full_eval fp16_full_eval half_precision_backend",
            "write `model.compute_dtype=bfloat16` (`auto` takes it on accelerators); parameters stay float32, or are `model.param_dtype`"),
    Foreign("tf32", "write `model.compute_dtype=bfloat16`, or `float32`, which computes full float32 products"),
    Foreign("dtype torch_dtype", "write `model.compute_dtype` for the computation and `model.param_dtype` for the parameters"),
    Foreign("model_revision", "download that revision, and write `model_name_or_path=DIRECTORY`"),
    Foreign("tokenizer_name tokenizer", "write `tokenizer_name_or_path`"),
    Foreign("chat_template_path", "put the template into the tokenizer's directory, and write `tokenizer_name_or_path`"),
    Foreign("student_model_init_kwargs teacher_model_init_kwargs model_init_kwargs ref_model_init_kwargs",
            "write the options of `model`, such as `model.compute_dtype`; the student has the same"),
    Foreign("use_cache cache_implementation use_transformers_paged", "nothing to set: generation keeps its cache, training has none", changes_nothing=True),
    # Memory and devices.
    Foreign("deepspeed zero2", "there is no DeepSpeed here; write `sharding=zero1` (stages 1 and 2), `sharding=fsdp` (stage 3) or `offload=optimizer`"),
    Foreign("fsdp fsdp_config", "write `sharding=fsdp`, the default, and `mesh.fsdp` for its size"),
    Foreign("parallelism_config accelerator_config tensor_parallel_size",
            "write `mesh.data`, `mesh.fsdp` and `mesh.tensor`; servers take `--tensor-parallel-size`"),
    Foreign("offload_untrained_models disable_student_offloading",
            "write `offload=reference` for the reference model; the student stays on the devices, or on servers of its own"),
    Foreign("gradient_checkpointing_kwargs", "nothing to set: `gradient_checkpointing` takes `none`, `dots`, `mlp` or `full`", changes_nothing=True),
    Foreign("activation_offloading", "write `offload=activations`"),
    Foreign("auto_find_batch_size", "there is no search for a batch size here; `atlas-plan` computes what fits", absent=True),
    Foreign("ddp_timeout", "write `hosts.stall_timeout_secs`"),
    Foreign("ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_backend ds3_gather_for_generation "
            "local_rank average_tokens_across_devices", "nothing to set: the mesh divides the work, and losses are divided by the weight of the whole batch", changes_nothing=True),
    Foreign("backprop_accumulation_steps backprop_accumulation_micro_batch_size",
            "write `per_device_train_batch_size` for the rows of one forward pass"),
    # Speed.
    Foreign("torch_compile torch_compile_backend torch_compile_mode jit_mode_eval",
            "nothing to set: each step is one compiled program", changes_nothing=True),
    Foreign("use_liger_kernel use_liger_loss liger_kernel_config", "nothing to set: the logits of a batch never exist as a whole; `loss_chunk_size` bounds them", changes_nothing=True),
    Foreign("torch_empty_cache_steps dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor remove_unused_columns",
            "nothing to set here", changes_nothing=True),
    Foreign("dataloader_num_workers", "it is `data.num_workers` here", same_as="data.num_workers"),
    Foreign("group_by_length train_sampling_strategy", "nothing to set: rows are packed (`packing`), or sorted by length within a step and padded to `data.length_buckets`", changes_nothing=True),
    Foreign("packing_strategy padding_free pad_to_multiple_of eval_packing", "write `packing=true`, which fits whole examples and keeps them apart"),
    # Optimizer and length of the run.
    Foreign("optim_args optim_target_modules", "write `optim=adamw` or `optim=muon`, with `adam_beta1`, `adam_beta2`, `adam_epsilon` and `muon_momentum`"),
    Foreign("warmup_steps", "write `warmup_ratio`, the share of all steps"),
    Foreign("lr_scheduler_kwargs", "write `warmup_ratio`, `min_lr_ratio` (min_lr_rate in transformers) and, with `lr_scheduler_type=wsd`, `lr_decay_ratio`; TRL's `constant` has no warm-up"),
    Foreign("label_smoothing_factor neftune_noise_alpha assistant_loss_weight", "there is none here", absent=True),
    Foreign("disable_dropout", "nothing to set: models have no dropout; adapters have `model.lora.dropout`, 0 by default", changes_nothing=True),
    Foreign("per_device_eval_batch_size eval_accumulation_steps per_gpu_train_batch_size", "write `per_device_train_batch_size`, which evaluation uses too"),
    Foreign("do_train", "nothing to set: a run trains", changes_nothing=True),
    Foreign("do_eval do_predict", "write `eval_steps`, and `data.eval_path` or `data.eval_split_ratio`"),
    # Lengths and data.
    Foreign("max_length model_max_length max_seq_len", "write `max_seq_length`"),
    Foreign("max_completion_length", "write `max_new_tokens`; `teaching.max_answer_tokens` is the student's"),
    Foreign("dataset_name dataset_id_or_path export_path train_file", "write `data.dataset_path`: files, a hub id, or `db_url` for the database"),
    Foreign("make_dataset_fn", "write `--config RECIPE:data=NAME`, such as `teacher_sft:data=runtime_traces`, and `data.dataset_path`"),
    Foreign("dataset_config_name dataset_subset", "write `data.dataset_config`"),
    Foreign("dataset_train_split train_split", "write `data.dataset_split`"),
    Foreign("dataset_test_split", "write `data.eval_split`, with `data.eval_path` for the data set"),
    Foreign("train_ratio", "write `data.eval_split_ratio`, the share that is held out"),
    Foreign("dataset_text_field", "write `data.columns.completion`, or name the conversation with `data.columns.messages`"),
    Foreign("dataset_max_sessions limit", "write `data.max_sessions`"),
    Foreign("offset", "there is none here; write `data.created_after` and `data.created_before`", absent=True),
    Foreign("include_learning_data include_raw", "nothing to set: sessions are read whole", changes_nothing=True),
    Foreign("dataset_kwargs dataset_num_proc dataset_batch_size preprocessing_num_workers", "nothing to set: rows are encoded by several processes where they are many", changes_nothing=True),
    Foreign("completion_only_loss assistant_only_loss completion_only_training", "write `data.completion_only`, true by default: what the assistant writes is trained"),
    Foreign("shuffle_dataset shuffle_generation_inputs", "write `data.shuffle`"),
    Foreign("eval_dataset", "write `data.eval_path`"),
    Foreign("streaming", "there is no streaming of data sets here", absent=True),
    # What a run writes.
    Foreign("logging_dir run_dir results_dir exp_name", "write `output_dir`, in which everything lies"),
    Foreign("run_name wandb_project wandb_group wandb_run_name wandb_entity",
            "set `WANDB_PROJECT`, `WANDB_NAME` or `WANDB_RUN_GROUP` in the environment, with `report_to=wandb`"),
    Foreign("project trackio_space_id", "set `TRACKIO_PROJECT` or `TRACKIO_SPACE_ID` in the environment, with `report_to=trackio`"),
    Foreign("logging_strategy logging_first_step logging_nan_inf_filter log_level log_level_replica log_on_each_node", "write `logging_steps`; the first process logs"),
    Foreign("log_completions save_completions_probability num_completions_to_print reward_log_name activate_debugging_logs log_unique_prompts",
            "nothing to set: `rollouts/` has every sample, TensorBoard's text tab some", changes_nothing=True),
    Foreign("disable_tqdm", "write `terminal=lines`: no status line"),
    Foreign("include_tokens_per_second include_num_input_tokens_seen skip_memory_metrics", "nothing to set here", changes_nothing=True),
    Foreign("save_strategy", "write `save_steps`; the end is saved in any case"),
    Foreign("eval_strategy evaluation_strategy eval_delay", "write `eval_steps`; 0 evaluates at the end only"),
    Foreign("save_safetensors", "nothing to set: `final/` is the model in safetensors, `checkpoints/` has what a run needs to continue", changes_nothing=True),
    Foreign("load_best_model_at_end", "write `metric_for_best_model=eval/…`: the directory best/ is that model, and `final/` stays the last one", absent=True),
    Foreign("use_ema ema_model", "write `ema_decay`", absent=True),
    Foreign("resume_from_checkpoint ignore_data_skip restore_callback_states_from_checkpoint",
            "nothing to set: the same command continues; `resume_from=DIRECTORY` takes the weights of another run"),
    Foreign("overwrite_output_dir", "there is no overwriting here: name another `output_dir`, or remove the directory", absent=True),
    Foreign("push_to_hub* hub_* call_post_training tags", "there is no upload here; `hf upload NAME OUTPUT_DIR/final` does it", absent=True),
    Foreign("profile torch_profiler use_profiler", "write `profile_steps=(10, 12)`"),
    # Generation.
    Foreign("use_vllm use_vllm_server vllm_mode", "write `rollout.backend=vllm`, or `local` to generate with the training devices; `launch_with_server.sh` sets it"),
    Foreign("vllm_server_base_url vllm_server_host vllm_server_port vllm_host vllm_port num_vllm_clients",
            "write `rollout.teacher_servers=http://HOST:PORT,…` and `rollout.student_servers=…`; `launch_with_server.sh` sets them"),
    Foreign("vllm_group_port vllm_device", "nothing to set: weights reach the servers through `rollout.sync_dir`", changes_nothing=True),
    Foreign("vllm_gpu_memory_utilization vllm_max_model_len vllm_max_model_length vllm_dtype vllm_tensor_parallel_size vllm_enable_sleep_mode "
            "vllm_sleep_level vllm_model_impl enforce_eager enable_prefix_caching",
            "it is a flag of `atlas-serve`, such as `--gpu-memory-utilization 0.9`; `VLLM_FLAGS` gives flags to `launch_with_server.sh`"),
    Foreign("vllm_server_timeout", "write `rollout.request_timeout_secs` and `rollout.sync_timeout_secs`"),
    Foreign("vllm_guided_decoding_regex vllm_structured_outputs_regex", "there is no guided decoding here", absent=True),
    Foreign("use_ray ray_*", "there is no Ray here; write `rollout.backend=vllm`, and one server for each `rollout.teacher_servers`", absent=True),
    Foreign("vllm_importance_sampling_correction vllm_importance_sampling_mode",
            "write `importance_sampling`: `none`, `token` or `sequence`, with `importance_sampling_mode=truncate` or `importance_sampling_mode=mask`"),
    Foreign("vllm_importance_sampling_cap vllm_importance_sampling_clip_max", "write `importance_sampling_cap`"),
    Foreign("vllm_importance_sampling_clip_min off_policy_mask_threshold", "there is none here: weights have an upper bound alone", absent=True),
    Foreign("generation_batch_size generation_aggregation_steps artificial_epochs",
            "write `train_batch_size`: the completions of a step are generated together; `num_iterations` passes of `steps_per_generation` updates are made over them"),
    Foreign("generation_kwargs", "write `temperature`, `top_p`, `top_k` and `min_p`"),
    Foreign("repetition_penalty", "there is none here: log-probabilities are those of the softmax at `temperature`", absent=True),
    Foreign("unbias_log_probabilities", "nothing to set: log-probabilities are at the sampling temperature", changes_nothing=True),
    Foreign("num_generations_eval", "nothing to set: evaluation answers each question once, greedily", changes_nothing=True),
    # Losses and rewards.
    Foreign("epsilon", "write `epsilon_low` and `epsilon_high`"),
    Foreign("use_bias_correction_kl", "write `kl_estimator=unbiased` for true, TRL's default, and `kl_estimator=k3` for false"),
    Foreign("top_entropy_quantile use_adaptive_entropy entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target",
            "there is none here; `entropy_coef` is a constant, and a loss of your own is `loss_type=package.module:function`", absent=True),
    Foreign("multi_objective_aggregation", "there is one way here: rewards are added up with `reward.weights` and then compared"),
    Foreign("importance_sampling_level", "write `loss_type=gspo` for ratios of whole completions, `loss_type=gspo_token` for gradients by token"),
    Foreign("reward_weights", "write `reward.weights`"),
    Foreign("reward_funcs reward_model_name_or_path reward_processing_classes", "write `reward.kind` and `reward.names`"),
    Foreign("teacher_reward config_path", "write `reward.kind=rim`, and `--config teacher_rcl:rim=rim_offline_config` for the judges"),
    Foreign("active_judges temperatures variance_threshold", "it stands under `reward.rim`, as `reward.rim.active_judges`, `reward.rim.temperatures` and `reward.rim.variance_threshold`"),
    Foreign("models model_configs", "write `reward.rim.small_model.model=gemini/gemini-2.5-flash`, `reward.rim.large_model.model` and `reward.rim.large_model.max_tokens`"),
    Foreign("parallel_execution max_workers", "write `reward.rim.limits.max_in_flight`"),
    Foreign("student_diagnostic_template student_with_teaching_template student_baseline_template", "it stands under `teaching`: `teaching.student_diagnostic_template` and so on"),
    Foreign("teacher_adaptive_template", "write `teaching.teacher_template`, which SFT uses too"),
    Foreign("use_reference_teacher_model logging_prob", "there is none here; `beta` above 0 keeps the policy that the run began with as the reference", absent=True),
    # LoRA.
    Foreign("lora_r", "it is `model.lora.rank` here", same_as="model.lora.rank"),
    Foreign("lora_alpha", "it is `model.lora.alpha` here", same_as="model.lora.alpha"),
    Foreign("lora_dropout", "it is `model.lora.dropout` here", same_as="model.lora.dropout"),
    Foreign("lora_target_modules target_modules", "it is `model.lora.targets` here", same_as="model.lora.targets"),
    Foreign("use_rslora", "it is `model.lora.rslora` here", same_as="model.lora.rslora"),
    Foreign("use_peft peft_config lora_task_type", "write `model.lora.rank=16`: a rank above 0 trains an adapter"),
    Foreign("load_in_4bit load_in_8bit use_bnb_nested_quant bnb_4bit_quant_type bnb_4bit_compute_dtype",
            "there is no quantised base here: with `model.lora.rank` the model rests in `model.compute_dtype`, and `sharding=fsdp` or `offload=params` makes room", absent=True),
    Foreign("use_dora lora_modules_to_save modules_to_save", "there is none here: LoRA trains factors of the matrices in `model.lora.targets` alone", absent=True),
    # Distillation.
    Foreign("seq_kd", "there are no completions of the teacher here: let it write the rows, and set `lmbda` to 0", absent=True),
    Foreign("teacher_tokenizer_name_or_path align_teacher_template", "there is none here: both models have one vocabulary and read the same tokens", absent=True),
    Foreign("baseline_success baseline_tokens", "there is none here; `eval_steps` measures during a run, the command for evaluations after it", absent=True),
)  # fmt: skip
"""Options of TRL, transformers, the original ATLAS and its guide."""

WORDS: tuple[Foreign, ...] = (
    Foreign("+override override defaults data@_global_ /data@_global_: model@_global_ reward@_global_ trainer@_global_ trainer",
            "parts are swapped with `--config RECIPE:data=NAME,model=NAME`, such as `teacher_rcl:data=runtime_pg`; options follow as `data.db_url=…`"),
    Foreign("--config-name --config-path config-name config-path", "write `--config NAME`, a shipped recipe or a `FILE.py`"),
    Foreign("+zero1", "write `sharding=zero1`"),
)  # fmt: skip
"""Words of a command line that are no options."""

ITEMS: tuple[tuple[str, str], ...] = (
    ("`scripts/launch.sh 8 configs/run/teacher_sft.yaml`", "`launch/launch.sh 8 configs/run/teacher_sft.py`: a config is a Python file, or the name of a shipped one (`teacher_sft`)"),
    ("`+offload`", "the same, or `offload=optimizer`; also `params`, `activations`, `reference`, with commas"),
    ("`gradient_checkpointing=true`", "the same (`full`); also `mlp`, `dots` and `none`"),
    ("`attn_implementation=flash_attention_2`", "the same; it means `auto`: cuDNN on NVIDIA, splash on TPU"),
    ("`python trainers/vllm_server.py --model … --port 8765`", "`atlas-serve --model … --port 8765`, with vLLM's own flags"),
    ("`scripts/launch_with_server.sh 4 4 configs/run/teacher_rcl.yaml`", "`launch/launch_with_server.sh 4 4 configs/run/teacher_rcl.py`. The guide gives both orders of the two numbers; the first is servers, and the script says which device does what"),
    ("`curl http://localhost:8000/v1/models`", "`curl http://127.0.0.1:8765/v1/models`: the port is the one that `--port` names (the guide starts its server on 8765 and asks 8000). With a token, `-H \"Authorization: Bearer …\"`; `/health` needs none"),
    ("`lsof -i :8000`, `ps aux \\| grep vllm`", "the trainer names the server that does not answer; logs are in `output_dir/logs`"),
    ("`torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=10.0.0.1 train.py …`", "on each host `atlas-train --config … --coordinator 10.0.0.1:8476 --num_processes 2 --process_id 0`, one process a host; `launch/multihost.sh`, SLURM and Kubernetes files are in `launch/`"),
    ("`arc-atlas --database-url … --output traces.jsonl`", "`python tools/export_traces.py --database-url … --output traces.jsonl`"),
    ("`from atlas.training_data import get_training_sessions`", "`from atlas_jax.training_data import get_training_sessions`, with the same arguments"),
    ("`custom_data.runtime_trace_data.get_runtime_trace_dataset`", "`--config teacher_sft:data=runtime_traces` with `data.dataset_path=traces.jsonl`; `data=runtime_pg` reads the database"),
    ("`RIM.reward_adapter.RIMReward`", "`from atlas_jax.rewards import RIMReward`; `config_path` names a Python file such as `configs/rim_offline_config.py`"),
    ("triage dossier, adaptive summary, learning history of a session", "`session.triage_dossier`, `session.adaptive_summary`, `session.learning_history`"),
    ("persona usage and updates of a session", "not here: the runtime writes none; whatever a session's metadata holds is in `session.session_metadata`"),
    ("validation labels of a session", "`session.steps[i].validation` for each step, `session.session_metadata[\"review_status\"]` for the whole"),
    ("`results/sft_checkpoint/`, `results/rl_checkpoint/`", "`checkpoints/sft/final/`, `checkpoints/grpo/final/`: `final/` in the run's `output_dir`"),
    ("`pytorch_model.bin`", "`model.safetensors`, in shards with an index above `model.max_shard_size`; transformers and vLLM load both"),
    ("`trainer_state.json`", "`final/trainer_state.json`, with `log_history` as transformers writes it"),
    ("`results/logs/train.log`", "`output_dir/training.log`; numbers are in `output_dir/metrics.jsonl`"),
    ("`results/logs/tensorboard_events`", "event files in `output_dir`: `tensorboard --logdir OUTPUT_DIR`"),
    ("`AutoModelForCausalLM.from_pretrained(\"results/rl_checkpoint\")`", "`from_pretrained(\"checkpoints/grpo/final\")`, with torch and accelerate, which `pip install -e \".[hf]\"` brings"),
    ("\"get teaching (atlas-sdk runtime loop)\"", "`atlas-evaluate --teacher checkpoints/grpo/final --student … --data …`"),
    ("reward mean, non-degradation rate, KL", "`reward/mean`, `teaching/non_degradation_rate`, `policy/kl`"),
    ("\"monitor `rim_rewards`\"", "`rim_rewards/helpfulness`, `rim_rewards/process`, and the other active judges"),
    ("`GKDConfig` of TRL: `lmbda`, `beta`, `temperature`, `max_new_tokens`, `teacher_model_name_or_path`", "the same names and defaults with `--config teacher_gkd` (`algorithm=gkd`). `lmbda` is a share of the rows of each step, where TRL draws whole batches. `temperature` is also that of the compared distributions, which TRL's GKD has at 1 and its `DistillationTrainer` alike. `beta` is TRL's: 0 forward, 1 reverse KL. Both divide by the completion tokens of the whole batch"),
    ("`configs/run/teacher_gkd.yaml`, which never ran", "`--config teacher_gkd`. Its TRL 0.14 had the mixture of `beta` the other way round; here it is the paper's. On the policy's own completions both models read the same tokens"),
    ("teaching efficiency, token efficiency, completion rate", "`accuracy_delta`, `response_token_reduction` and `completion_rate` of `atlas-evaluate`, each with its interval"),
)  # fmt: skip
"""Commands, files and fields of the guide, and what they are here; both in Markdown."""

OTHERWISE: tuple[tuple[str, str, str], ...] = (
    ("`beta`, with `use_bias_correction_kl=True` by default (the KL times the ratio)",
     "`kl_estimator=k3` by default, GRPO's paper: the same value, another gradient",
     "`kl_estimator=unbiased`. At 0.05 nats the two gradients agree (cosine 0.98), at 0.5 less (0.8), at 2.8 little (0.6): TRL descends KL(policy to reference), `k3` KL(reference to policy). With `importance_sampling_level=sequence` TRL weighs by the ratio of the completion, and this package by that of the token"),
    ("`epsilon_high=x` of `loss_type=cispo` is the bound itself; no lower bound", "the bound is `1 + epsilon_high`, and `1 - epsilon_low` below, as in MiniMax-M1's paper",
     "`epsilon_high` of x - 1, and `epsilon_low=1`"),
    ("`epsilon` bounds both sides where `epsilon_high` is not set", "`epsilon_low` and `epsilon_high` are 0.2 each", "set both"),
    ("`delta=None`", "`delta=0`", "the same number; it must be above 1 + `epsilon_high`"),
    ("masked completions (`mask_truncated_completions`) and those without a score count in the divisor of grpo, gspo and dr_grpo", "they do not count: if 4 of 16 are cut, the others weigh 16/12 as much",
     "`loss_divisor=all`, the papers' 1/G"),
    ("tokens of completions without a score count in the divisor of bnpo, dapo and cispo; those of masked ones do not", "neither counts", "nothing: a sample that cannot be scored trains nothing"),
    ("a completion without a score trains the KL term", "it trains nothing", "nothing to set"),
    ("None of one of several rewards counts as 0; a completion is without a score where all are None", "the same; one that raises or takes too long leaves the sample without a score, whatever the others say, and counts in `reward.max_failed_frac`", "nothing to set"),
    ("`entropy_coef` weighs the mean over tokens", "it weighs the mean that the loss takes: over completions for grpo and gspo, over tokens for dapo, over `max_new_tokens` for dr_grpo", "the same number for bnpo, dapo and cispo"),
    ("`steps_per_generation` counts microbatches, `gradient_accumulation_steps` of them an update", "`steps_per_generation` counts updates; `train_batch_size` is the whole generation batch", "TRL's number divided by its `gradient_accumulation_steps`"),
    ("dapo and cispo divide each of these updates by the mean tokens of all of them", "each update divides by its own tokens", "nothing to set"),
    ("bnpo averages the means of microbatches", "it divides by the tokens of the step, as dapo", "nothing to set"),
    ("`max_steps` counts updates", "it counts steps, each of which generates a batch and makes `num_iterations` x `steps_per_generation` updates", "TRL's number divided by the updates of a step"),
    ("`lr_scheduler_type=constant` ignores the warm-up", "it warms up over `warmup_ratio`, as `constant_with_warmup`", "`warmup_ratio=0`"),
    ("a share of warm-up steps is rounded up", "it is rounded to the nearest", "nothing to set"),
    ("importance sampling with vLLM only: `sequence_mask` above 3", "always: `importance_sampling=token`, cut at 2", "`importance_sampling=sequence importance_sampling_mode=mask importance_sampling_cap=3`; `importance_sampling=none` without vLLM"),
    ("`importance_sampling_level=sequence` with dapo weighs completions by their length", "`loss_type=gspo` is the paper's mean over completions, TRL's `loss_type=grpo` with `importance_sampling_level=sequence`", "`loss_type=gspo`, with the paper's `epsilon_low=3e-4 epsilon_high=4e-4`"),
    ("`get_soft_overlong_punishment(max_completion_len, soft_punish_cache)` as a reward function", "an option", "`reward.overlong_tokens`, with `reward.overlong_penalty` for its weight"),
    ("messages train all tokens (SFT)", "what the assistant writes", "`data.completion_only=false` for all"),
)  # fmt: skip
"""TRL 1.16 with the same names and another meaning: there, here, and what to write; in Markdown."""

DEFAULTS: tuple[tuple[str, str, str], ...] = (
    ("`beta`", "0", "0.04"),
    ("`loss_type`", "dapo", "grpo"),
    ("`temperature`, `top_p`", "1, 1", "0.7, 0.95"),
    ("`learning_rate` of GRPO", "1e-6", "2e-5; the shipped configs say less"),
    ("`lr_scheduler_type`, `warmup_ratio`", "linear, 0", "cosine, 0.1"),
    ("`weight_decay`", "0", "0.01"),
    ("`num_train_epochs`", "3", "1"),
    ("`per_device_train_batch_size`", "8", "2"),
    ("`max_seq_length` of SFT", "1024", "2048"),
)
"""Defaults of TRL 1.16 and of this package."""

_BEFORE = """# From other trainers to atlas_jax

Generated by `python -m atlas_jax.migration > docs/migration.md`. The same answers come on the command
line: `--config.max_completion_length=512` ends with `unknown option max_completion_length: write
max_new_tokens; …`.

## The guide, item by item

Commands, files and fields of the ATLAS training guide that bear another name here. What is not in these
tables has its name in the guide: `learning_rate`, `beta`, `temperature`, `num_generations`,
`per_device_train_batch_size`, `gradient_accumulation_steps`, `warmup_ratio`, `output_dir`,
`model_name_or_path` and so on.

"""
_OTHERWISE = """
## Coming from TRL: the same name, another meaning

Of TRL 1.16. With options made alike, losses and gradients equal those of TRL's own code to 1e-6 on the 310
recorded cases of `tests/test_trl_cases.py` (`tools/trl_cases` makes them).

| TRL | here | to write for the same |
|---|---|---|
"""
_DEFAULTS = """
| option | default of TRL | default here |
|---|---|---|
"""
_AFTER = """
## What is not here

The guide's durations (4 to 6 hours of SFT and 24 to 36 of GRPO on 8 H100), its 200 GB of disk and its results
(15.7 % accuracy, 97 % non-degradation, half the tokens, 100 % completion) are its own measurements and were
not repeated with this package. `atlas-plan` computes memory, disk sizes and lower bounds of a step's time;
[speed.md](speed.md) has what was measured.

The guide's minimum of two GPUs (`launch_with_server.sh 1 1`) trains with 4 rows at a time and accumulates
up to the 128 lessons of a step.
"""


def find(word: str) -> Foreign | None:
    """Returns the entry of an option's name or of a word of a command line, with or without `=VALUE`."""
    name = word.partition("=")[0]
    short = re.sub(r"^(\+\+?|~)(?!override)", "", name)  # Hydra's signs for new and removed keys
    for entry in (*OPTIONS, *WORDS):
        if entry.matches(name) or entry.matches(short):
            return entry
    return None


def document() -> str:
    """Returns `docs/migration.md`."""
    items = "".join(f"| {there} | {here} |\n" for there, here in ITEMS)
    groups = {
        "Options with another name": [e for e in OPTIONS if not (e.changes_nothing or e.absent)],
        "Options that change nothing": [e for e in OPTIONS if e.changes_nothing],
        "Options without a counterpart": [e for e in OPTIONS if e.absent],
        "Words of the command line": WORDS,
    }
    notes = {
        "Options with another name": "Of TRL, transformers, the original ATLAS and its guide.",
        "Options that change nothing": "They are accepted, with a note in the log.",
        "Options without a counterpart": "Values that turn them off (`false`, `null`) are accepted.",
        "Words of the command line": "Hydra's words.",
    }
    text = f"{_BEFORE}| there | here |\n|---|---|\n{items}"
    for title, entries in groups.items():
        rows = "".join(f"| {_names(entry)} | {entry.here} |\n" for entry in entries)
        text += f"\n## {title}\n\n{notes[title]}\n\n| there | here |\n|---|---|\n{rows}"
    differences = "".join(f"| {' | '.join(row)} |\n" for row in OTHERWISE)
    defaults = "".join(f"| {' | '.join(row)} |\n" for row in DEFAULTS)
    return f"{text}{_OTHERWISE}{differences}{_DEFAULTS}{defaults}{_AFTER}"


def _names(entry: Foreign) -> str:
    return " ".join(f"`{name}`" for name in entry.names.split())


def main(words: list[str]) -> None:
    """Prints the document, or what to write for each word that has an entry."""
    answers = [entry.answer for entry in map(find, words) if entry]
    sys.stdout.write("\n".join([*answers, ""]) if words else document())


if __name__ == "__main__":
    main(sys.argv[1:])
