"""Prints options of a run, one a line, for scripts.

python tools/read_config.py NAME[,NAME…] --config configs/run/NAME.py [--config.key=value …]
"""

from absl import app

from atlas_jax import cli
from atlas_jax import config as config_lib

_CONFIG = cli.define_config()


def main(argv: list[str]) -> None:
    """Prints the options that the first argument names."""
    if not argv[1:]:
        raise cli.UsageError("names of options are needed, such as output_dir,rollout.protocol")
    cli.no_more_words(argv[2:])
    values = config_lib.flat(config_lib.freeze(cli.needed(_CONFIG)))
    for name in argv[1].split(","):
        if name not in values:
            raise ValueError(f"unknown option {name}{config_lib.nearest(name, values)}")
        print(values[name])


if __name__ == "__main__":
    app.run(cli.guarded(main), flags_parser=cli.parse)
