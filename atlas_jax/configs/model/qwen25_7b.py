"""Qwen2.5 7B Instruct."""

from ml_collections import ConfigDict


def apply(config: ConfigDict) -> None:
    config.model_name_or_path = "Qwen/Qwen2.5-7B-Instruct"
