"""The teaching demonstrations that ship with the project, in `configs/data/quickstart`."""

from ml_collections import ConfigDict

from configs.data import arc_atlas_sft


def apply(config: ConfigDict) -> None:
    arc_atlas_sft.apply_templates(config)
    config.data.dataset_path = "configs/data/quickstart/train.jsonl"
    config.data.eval_path = "configs/data/quickstart/eval.jsonl"
    config.data.format = "teaching"
