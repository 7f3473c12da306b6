"""Extras of the package: dependencies that only some runs need, and the error for a missing one.

The keys are those of `[project.optional-dependencies]` in pyproject.toml.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator

MODULES = {
    "datasets": ("datasets", "pyarrow"),
    "gguf": ("gguf",),
    "hf": ("torch",),
    "judges": ("aiohttp", "yarl"),
    "postgres": ("psycopg", "pyarrow"),
    "vllm": ("aiohttp", "prometheus_client", "yarl"),
}
"""Extra -> the modules that it installs and that the package or its tools import."""


class MissingExtraError(ImportError, ValueError):
    """A dependency that is not installed.

    It is an `ImportError` for Python code, and a `ValueError` for the commands, which show it as
    one line.
    """


@contextlib.contextmanager
def importing(extra: str, purpose: str) -> Iterator[None]:
    """Guards the imports of an extra's modules.

    Args:
        extra: a key of `MODULES`.
        purpose: the subject of the error, such as "a database of sessions".

    Raises:
        MissingExtraError: names the module and the extra to install.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise _missing(extra, purpose, str(error.name)) from error


def need(extra: str, purpose: str) -> None:
    """Checks that an extra is installed, and imports nothing of it.

    Args:
        extra: a key of `MODULES`.
        purpose: the subject of the error, such as "rollout.backend=vllm".

    Raises:
        MissingExtraError: as `importing`.
    """
    for name in MODULES[extra]:
        if importlib.util.find_spec(name) is None:
            raise _missing(extra, purpose, name)


def _missing(extra: str, purpose: str, module: str) -> MissingExtraError:
    return MissingExtraError(
        f"{purpose} needs the package {module}, which is not installed; "
        f"pip install 'atlas_jax[{extra}]'",
        name=module,
    )
