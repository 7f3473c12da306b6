"""Writes options.md and metrics.md from the package: `python tools/make_docs.py`.

Run it after a change of an option or a metric; a test compares the files with the code.
"""

import pathlib

import _checkout  # noqa: F401  (comes first: see there)

from atlas_jax import cli, metric_docs, option_docs


def main() -> None:
    """Writes both files."""
    parser = cli.ToolParser(__doc__)
    parser.add_argument("--output", default="docs", help="directory of the files")
    output = pathlib.Path(parser.parse_args().output)
    (output / "options.md").write_text(option_docs.markdown())
    (output / "metrics.md").write_text(metric_docs.markdown())


if __name__ == "__main__":
    cli.tool(main)
