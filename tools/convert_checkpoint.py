"""`atlas-convert` of this checkout: `python tools/convert_checkpoint.py SRC DST`."""

import _checkout  # noqa: F401  (comes first: see there)

from atlas_jax import commands

if __name__ == "__main__":
    commands.convert()
