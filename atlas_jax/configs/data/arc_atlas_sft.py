"""Teaching demonstrations of Arc-ATLAS-Teach: a student's approach, a diagnosis, a lesson.

The teacher sees the question and the student's approach, thinks, and writes its lesson in
`<teaching>`, which is all that a student gets to read.
"""

from ml_collections import ConfigDict

SYSTEM_PROMPT = (
    "You are a teacher. You read how a student approaches a problem and write guidance that helps "
    "the student to solve it. You never state the answer."
)
TEACHER_TEMPLATE = """\
Question: {question}

The student's approach: {approach}

In <thinking>, say what is right and what is missing in this approach. In <teaching>, write short \
guidance for the student. Do not solve the question and do not state its answer."""
LESSON_TEMPLATE = """\
<thinking>
{diagnosis}
</thinking>
<teaching>
{teaching}
</teaching>"""


def apply(config: ConfigDict) -> None:
    config.data.dataset_path = "Arc-Intelligence/Arc-ATLAS-Teach-v0:training/sft.jsonl"
    config.data.format = "teaching"
    apply_templates(config)


def apply_templates(config: ConfigDict) -> None:
    """Sets what the teacher is asked and how it writes a lesson."""
    config.teaching.system_prompt = SYSTEM_PROMPT
    config.teaching.teacher_template = TEACHER_TEMPLATE
    config.teaching.lesson_template = LESSON_TEMPLATE
