"""The demonstrations that tools/make_demo.py writes to outputs/demo/data."""

from ml_collections import ConfigDict

from atlas_jax.configs.data import arc_atlas_sft

ROWS = "outputs/demo/data"


def apply(config: ConfigDict) -> None:
    arc_atlas_sft.apply_templates(config)
    config.data.dataset_path = f"{ROWS}/sft.jsonl"
    config.data.eval_path = ""
    config.data.format = "teaching"
