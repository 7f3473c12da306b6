"""Problems of Arc-ATLAS-Teach for GRPO, and the wording of the teaching protocol."""

from ml_collections import ConfigDict

from atlas_jax.configs.data import arc_atlas_sft

BASELINE = """\
{question}

Solve this problem step by step. Put the final answer inside <solution></solution>."""
DIAGNOSTIC = """\
{question}

Do not solve this problem yet. Describe briefly how you would approach it: what kind of problem it \
is, the steps you would take, and what you expect to be difficult."""
WITH_TEACHING = """\
{question}

A teacher has provided the following guidance:
{teaching}

Solve this problem step by step with this guidance. Put the final answer inside \
<solution></solution>."""


def apply(config: ConfigDict) -> None:
    arc_atlas_sft.apply_templates(config)
    config.data.dataset_path = (
        "Arc-Intelligence/Arc-ATLAS-Teach-v1:curriculum/arc_atlas_teach_rl.jsonl"
    )
    config.data.eval_split_ratio = 0.1
    apply_student_templates(config)


def apply_student_templates(config: ConfigDict) -> None:
    """Sets what the student is asked: alone, for its approach, and with a lesson."""
    config.teaching.student_baseline_template = BASELINE
    config.teaching.student_diagnostic_template = DIAGNOSTIC
    config.teaching.student_with_teaching_template = WITH_TEACHING
