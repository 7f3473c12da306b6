"""A run's `config.json`, given back as `--config`. Imports no JAX."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from atlas_jax import masking
from atlas_jax.config import ALGORITHMS, defaults, schema
from atlas_jax.overrides import unknown
from atlas_jax.types import ENVIRONMENT, FROM_CALLER

_VARIABLES = {"data.db_url": "ATLAS_DATABASE_URL"}
"""Options that the environment may hold in their place."""


class SavedConfig(NamedTuple):
    """The config of an earlier run."""

    path: str
    config: ConfigDict
    hidden: tuple[str, ...]
    """Options whose secrets the file does not hold."""

    def check(self, given: Iterable[str]) -> None:
        """Takes secrets from the environment, or checks that they are given otherwise.

        Args:
            given: options that the command line sets.

        Raises:
            ValueError: names the options that must be given again.
        """
        missing = []
        for name in sorted(set(self.hidden) - set(given)):
            variable = _VARIABLES.get(name, "")
            if os.environ.get(variable):
                *groups, last = name.split(".")
                group: Any = self.config
                for part in groups:
                    group = group[part]
                group[last] = os.environ[variable]
            else:
                way = f" (or the variable {variable})" if variable else ""
                missing.append(f"--config.{name}=…{way}")
        if missing:
            raise ValueError(
                f"{self.path} keeps no secrets and no rows from Python; give again "
                f"{', '.join(missing)}"
            )


def load(path: str) -> SavedConfig:
    """Returns the config that a run has written to `config.json`.

    Raises:
        ValueError: if the file is none of a run, or has options that are unknown here.
    """
    try:
        values = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; give the config.json of a run") from error
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(values, dict) or values.get("algorithm") not in ALGORITHMS:
        raise ValueError(
            f"{path} is no run's config.json: its algorithm is none of {', '.join(ALGORITHMS)}"
        )
    values.pop(ENVIRONMENT, None)
    config = defaults(schema(values["algorithm"]))
    hidden: list[str] = []
    _fill(path, config, config, values, "", hidden)
    for name in ("dataset_path", "eval_path"):
        if config.data[name] == FROM_CALLER:
            hidden.append(f"data.{name}")
    return SavedConfig(path, config, tuple(hidden))


def _fill(
    path: str,
    root: ConfigDict,
    group: ConfigDict,
    values: Mapping[str, Any],
    prefix: str,
    hidden: list[str],
) -> None:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in group:
            raise ValueError(f"{path}: {unknown(name, root)}")
        if isinstance(value, dict):
            _fill(path, root, group[key], value, f"{name}.", hidden)
        elif masking.HIDDEN in str(value):
            hidden.append(name)
        else:
            group[key] = tuple(value) if isinstance(value, list) else value
