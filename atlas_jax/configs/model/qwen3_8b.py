"""Qwen3 8B."""

from ml_collections import ConfigDict


def apply(config: ConfigDict) -> None:
    config.model_name_or_path = "Qwen/Qwen3-8B"
