"""Prints options of a run, one a line, for scripts.

python tools/read_config.py NAME[,NAME…] --config configs/run/NAME.py [--config.key=value …]
"""

from absl import app, flags
from ml_collections import config_flags

from atlas_jax import cli
from atlas_jax import config as config_lib

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file of the run.")
_DEVICES = flags.DEFINE_integer("check_devices", 0, "Check the run, as one on so many devices.")


def main(argv: list[str]) -> None:
    """Prints the options that the first argument names."""
    if len(argv) != 2 or _CONFIG.value is None:
        raise ValueError(f"names of options and --config are needed, and nothing else: {argv[1:]}")
    config = config_lib.freeze(_CONFIG.value)
    if _DEVICES.value:
        config_lib.validate(config)
    values = config_lib.flat(config)
    for name in argv[1].split(","):
        if name not in values:
            raise ValueError(f"unknown option {name}{config_lib.nearest(name, values)}")
        print(values[name])


if __name__ == "__main__":
    app.run(cli.guarded(main), flags_parser=cli.parse)
