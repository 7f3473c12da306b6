"""Real files that tests read, fetched once into `.cache/assets`."""

from __future__ import annotations

from pathlib import Path

from tools.fetch_smollm2 import fetch

ASSETS = Path(__file__).resolve().parents[1] / ".cache" / "assets"


def smollm2_gguf() -> Path:
    """Returns the path of SmolLM2-135M-Instruct in GGUF (Q4_1, Q8_0 and F32 tensors)."""
    return fetch(ASSETS)
