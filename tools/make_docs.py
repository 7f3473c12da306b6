"""Writes docs/options.md and docs/metrics.md from the package: `python tools/make_docs.py`."""

import pathlib

import _checkout  # noqa: F401  (comes first: see there)

from atlas_jax import cli, metric_docs, option_docs


def main() -> None:
    """Writes both files."""
    docs = pathlib.Path(__file__).resolve().parent.parent / "docs"
    (docs / "options.md").write_text(option_docs.markdown())
    (docs / "metrics.md").write_text(metric_docs.markdown())


if __name__ == "__main__":
    cli.tool(main)
