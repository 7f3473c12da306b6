"""SmolLM2 135M Instruct, small enough for a laptop."""

from ml_collections import ConfigDict


def apply(config: ConfigDict) -> None:
    config.model_name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
