"""Makes the tools use the package, `configs` and `tests` of their own checkout; imported first."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
