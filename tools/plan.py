"""`atlas-plan` of this checkout: `python tools/plan.py --config NAME --target KIND:SIZE`."""

import _checkout  # noqa: F401  (comes first: see there)

from atlas_jax import commands

if __name__ == "__main__":
    commands.plan()
