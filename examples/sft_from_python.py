"""SFT from Python, on rows that are made there.

    python -m examples.sft_from_python MODEL OUTPUT_DIR

The same call again continues a run that was stopped.
"""

import sys

from atlas_jax import config, train


def main(model, output_dir):
    """Trains a model to add, for 20 steps."""
    options = config.defaults(config.SFTConfig)
    options.model_name_or_path = model
    options.output_dir = output_dir
    options.max_steps = 20
    options.learning_rate = 1e-3
    options.max_seq_length = 32
    options.data.length_buckets = (32,)
    sums = [
        {"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a in range(5) for b in range(5)
    ]
    return train.run(options, rows=sums)


if __name__ == "__main__":
    main(*sys.argv[1:])
