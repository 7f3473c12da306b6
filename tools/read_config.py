"""Prints options of a run, one a line, for scripts.

    python tools/read_config.py NAME[,NAME…] --config configs/run/NAME.py [--config.key=value …]

With --check_devices N it first checks all of the run that needs no accelerator and no server, as a
run on N devices.
"""

import _checkout  # noqa: F401  (comes first: see there)
from absl import app, flags

from atlas_jax import cli, preflight
from atlas_jax import config as config_lib

_CONFIG = cli.define_config()
_DEVICES = flags.DEFINE_integer("check_devices", 0, "Check the run, as one on so many devices.")


def main(argv: list[str]) -> None:
    """Prints the options that the first argument names."""
    if not argv[1:]:
        raise cli.UsageError("names of options are needed, such as output_dir,rollout.protocol")
    cli.no_more_words(argv[2:])
    config = config_lib.freeze(cli.needed(_CONFIG))
    if _DEVICES.value:
        preflight.check(config, _DEVICES.value)
    values = config_lib.flat(config)
    for name in argv[1].split(","):
        if name not in values:
            raise ValueError(f"unknown option {name}{config_lib.nearest(name, values)}")
        print(values[name])


if __name__ == "__main__":
    app.run(cli.guarded(main), flags_parser=cli.parse)
