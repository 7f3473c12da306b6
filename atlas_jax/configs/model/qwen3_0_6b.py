"""Qwen3 0.6B."""

from ml_collections import ConfigDict


def apply(config: ConfigDict) -> None:
    config.model_name_or_path = "Qwen/Qwen3-0.6B"
