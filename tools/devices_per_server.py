"""Prints over how many devices a vLLM server should split its model, for the launch scripts.

    python tools/devices_per_server.py DEVICES MEMORY_MIB MODEL [MODEL …]

DEVICES is the largest number, which the answer divides; MEMORY_MIB the memory of one device.
"""

import sys

import _checkout  # noqa: F401  (comes first: see there)

from atlas_jax.plan import serving


def main(arguments: list[str]) -> None:
    """Prints the number, or ends with one line."""
    devices, memory, *models = arguments
    sizes = [serving.model_size(model) for model in models]
    print(serving.devices_per_server(sizes, int(devices), float(memory) * 2**20))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
