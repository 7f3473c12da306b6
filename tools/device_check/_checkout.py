"""Makes the checks use the package of their own checkout; imported first."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
