"""Llama 3.1 8B Instruct."""

from ml_collections import ConfigDict


def apply(config: ConfigDict) -> None:
    config.model_name_or_path = "meta-llama/Llama-3.1-8B-Instruct"
