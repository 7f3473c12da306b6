"""Sessions of the Atlas runtime from an export, and the wording of the teaching protocol.

    --config configs/run/teacher_rcl.py:data=runtime_traces \
        --config.data.dataset_path=traces/runtime.jsonl

Guidance of the runtime comes without a diagnosis, so that lessons are `<teaching>` alone.
"""

from ml_collections import ConfigDict

from atlas_jax.configs.data import arc_atlas_rl, arc_atlas_sft

TEACHER_TEMPLATE = """\
Question: {question}

The student's approach: {approach}

In <teaching>, write short guidance for the student. Do not solve the question and do not state \
its answer."""
LESSON_TEMPLATE = """\
<teaching>
{teaching}
</teaching>"""


def apply(config: ConfigDict) -> None:
    config.data.dataset_path = "traces/runtime.jsonl"
    apply_sessions(config)


def apply_sessions(config: ConfigDict) -> None:
    """Sets what sessions have in common, wherever they come from."""
    config.data.format = "session"
    config.data.eval_split_ratio = 0.1
    config.teaching.system_prompt = arc_atlas_sft.SYSTEM_PROMPT
    config.teaching.teacher_template = TEACHER_TEMPLATE
    config.teaching.lesson_template = LESSON_TEMPLATE
    if config.algorithm == "grpo":
        arc_atlas_rl.apply_student_templates(config)
