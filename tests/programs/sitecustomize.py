"""Python reads this at its start in every program that tests start; `conftest.py` sees to that.

Programs of atlas_jax find no torch: they do not ask for it, and transformers, which comes with
them, would import it for three seconds. Tests themselves use it to check numbers.
"""

import os
import sys

if sys.prefix == os.environ.get("ATLAS_TESTS_PREFIX"):  # not in the environment of vLLM
    sys.modules["torch"] = None  # type: ignore[assignment]
