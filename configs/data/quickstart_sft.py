"""The teaching demonstrations that ship with the project, in `configs/data/quickstart`."""

import os
import pathlib

from ml_collections import ConfigDict

from configs.data import arc_atlas_sft

ROWS = pathlib.Path(__file__).parent / "quickstart"


def apply(config: ConfigDict) -> None:
    arc_atlas_sft.apply_templates(config)
    config.data.dataset_path = os.path.relpath(ROWS / "train.jsonl")
    config.data.eval_path = os.path.relpath(ROWS / "eval.jsonl")
    config.data.format = "teaching"
