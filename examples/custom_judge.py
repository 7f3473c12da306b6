"""A judge of one's own beside the built-in ones, as a RIM config.

    atlas-train --config teacher_rcl:rim=examples.custom_judge

The judge is asked, escalated, protected from the texts that it reads, cached and recorded like the
others; its mean score is the metric `rim_rewards/brevity`.
"""

from atlas_jax.configs import rim_offline_config
from atlas_jax.rewards import Judge

BREVITY = Judge(
    name="brevity",
    prompt="You judge whether a student's answer is as short as it can be. Every sentence must be "
    "needed for the result or for following the way to it. A short answer that leaves out a step "
    "that the question asks for is not brief but incomplete.",
    sees=("question", "answer"),
    weight=0.5,
)


def apply(config):
    """Adds the judge to those of `rim_offline_config`, in which helpfulness now counts twice."""
    rim_offline_config.apply(config)
    config.reward.rim.judges = ("examples.custom_judge:BREVITY",)
    config.reward.rim.judge_weights.helpfulness = 2.0
