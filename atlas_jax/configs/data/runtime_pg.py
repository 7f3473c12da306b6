"""Sessions straight from the database of the Atlas runtime, approved ones only.

    --config configs/run/teacher_rcl.py:data=runtime_pg \
        --config.data.db_url=postgresql://atlas:atlas@localhost:5433/atlas

Without that flag the URL is $ATLAS_DATABASE_URL, where no list of processes shows its password.
"""

import os

from ml_collections import ConfigDict

from atlas_jax.configs.data import runtime_traces


def apply(config: ConfigDict) -> None:
    config.data.db_url = os.environ.get("ATLAS_DATABASE_URL", "")
    runtime_traces.apply_sessions(config)
