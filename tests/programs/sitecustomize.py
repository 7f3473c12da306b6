"""Python reads this at its start in every program that tests start; `conftest.py` sees to that.

Programs of atlas_jax find no torch: they do not ask for it, and transformers, which comes with
them, would import it for three seconds. Tests themselves use it to check numbers.
"""

import os
import sys
from importlib.machinery import PathFinder


class WithoutTorch(PathFinder):
    """Finds every module but torch; a None in `sys.modules` is a module to scipy."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        """Returns where a module is; None for torch."""
        return None if name == "torch" else super().find_spec(name, path, target)


if sys.prefix == os.environ.get("ATLAS_TESTS_PREFIX"):  # not in the environment of vLLM
    sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutTorch
