"""The problems of the shipped demonstrations, worded as SmolLM2-135M understands them."""

from ml_collections import ConfigDict

from atlas_jax.configs.data import quickstart_sft

TASK = 'Solve the problem in one short sentence, then write "Answer:" and the final answer.'


def apply(config: ConfigDict) -> None:
    quickstart_sft.apply(config)
    config.teaching.student_baseline_template = "{question}\n\n" + TASK
    config.teaching.student_with_teaching_template = "{question}\n\nHint: {teaching}\n\n" + TASK
    config.teaching.student_diagnostic_template = (
        "{question}\n\nDo not solve the problem. Describe in one or two short sentences how you "
        "would approach it."
    )
