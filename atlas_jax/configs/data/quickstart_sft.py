"""The teaching demonstrations that ship with the package, in `configs/data/quickstart`."""

import pathlib

from ml_collections import ConfigDict

from atlas_jax.configs.data import arc_atlas_sft

ROWS = pathlib.Path(__file__).parent / "quickstart"


def apply(config: ConfigDict) -> None:
    arc_atlas_sft.apply_templates(config)
    # A run in a checkout keeps its paths when the checkout moves.
    here = pathlib.Path.cwd()
    rows = ROWS.relative_to(here) if ROWS.is_relative_to(here) else ROWS
    config.data.dataset_path = str(rows / "train.jsonl")
    config.data.eval_path = str(rows / "eval.jsonl")
    config.data.format = "teaching"
