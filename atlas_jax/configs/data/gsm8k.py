"""GSM8K, grade-school problems with whole-number answers after `####`."""

from ml_collections import ConfigDict


def apply(config: ConfigDict) -> None:
    config.data.dataset_path = "openai/gsm8k:main/train-00000-of-00001.parquet"
    config.data.eval_path = "openai/gsm8k:main/test-00000-of-00001.parquet"
    config.rollout.direct_template = (
        "{question}\n\nSolve this problem step by step. Put the final answer inside "
        "<solution></solution>."
    )
