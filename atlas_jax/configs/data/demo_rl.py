"""The questions that tools/make_demo.py writes to outputs/demo/data, worded as the quickstart's."""

from ml_collections import ConfigDict

from atlas_jax.configs.data import demo_sft, quickstart_rl


def apply(config: ConfigDict) -> None:
    quickstart_rl.apply(config)
    config.data.dataset_path = f"{demo_sft.ROWS}/train.jsonl"
    config.data.eval_path = f"{demo_sft.ROWS}/eval.jsonl"
