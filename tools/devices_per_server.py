"""Prints over how many devices a vLLM server should split its model, for the launch scripts."""

import _checkout  # noqa: F401  (comes first: see there)

from atlas_jax import cli
from atlas_jax.plan import serving


def main() -> None:
    """Prints the number."""
    parser = cli.ToolParser(__doc__)
    parser.add_argument("devices", type=int, help="largest number, which the answer divides")
    parser.add_argument("memory_mib", type=float, help="memory of one device")
    parser.add_argument("models", nargs="+", help="directories of the models of all servers")
    args = parser.parse_args()
    sizes = [serving.model_size(model) for model in args.models]
    print(serving.devices_per_server(sizes, args.devices, args.memory_mib * 2**20))


if __name__ == "__main__":
    cli.tool(main)
