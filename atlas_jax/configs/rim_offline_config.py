"""The judges of offline training, as the ATLAS guide has them: helpfulness and process.

launch/launch.sh 8 configs/run/teacher_rcl.py:rim=rim_offline_config
"""

from ml_collections import ConfigDict

from atlas_jax.configs import rim_config


def apply(config: ConfigDict) -> None:
    rim_config.apply(config)
    c = config.reward.rim
    c.active_judges.accuracy = False
    c.active_judges.helpfulness = True
    c.active_judges.process = True
    c.active_judges.diagnostic = False
