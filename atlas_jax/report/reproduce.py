"""Options, versions, digests and commands that do a run again, without secrets."""

from __future__ import annotations

import hashlib
import pathlib
import platform
import shlex
from typing import Any, NamedTuple

import atlas_jax
from atlas_jax import config_files, masking
from atlas_jax.report.run_files import RunFiles
from atlas_jax.types import ENVIRONMENT

_PLACES = ("output_dir",)
"""Options that say where a run lies, not what it is."""
_MAX_HASHED_BYTES = 1 << 30


class Change(NamedTuple):
    """An option that differs from the shipped recipe."""

    name: str
    shipped: str
    here: str


class Recipe(NamedTuple):
    """Content of the section on doing a run again."""

    nearest: str
    """The shipped recipe with the fewest differences; empty without a config."""
    changes: list[Change]
    facts: list[tuple[str, str]]
    """Versions, devices and digests, by name."""
    commands: list[str]


def describe(run: RunFiles) -> Recipe:
    """Returns how to do a run again."""
    here = flat({k: v for k, v in run.config.items() if k != ENVIRONMENT})
    nearest, changes = _nearest(here)
    return Recipe(
        nearest=nearest,
        changes=changes,
        facts=_facts(run),
        commands=_commands(run, nearest, changes),
    )


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Returns nested options by their full names, as texts."""
    result: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{name}.")
        else:
            result[prefix + name] = masking.hide(_text(value))
            if value and isinstance(value, str) and masking.is_secret_name(name):
                result[prefix + name] = masking.HIDDEN
    return result


def _text(value: Any) -> str:
    """Returns a value as a command line takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"({', '.join(map(repr, value))}{',' if len(value) == 1 else ''})"
    return str(value)


def _nearest(here: dict[str, str]) -> tuple[str, list[Change]]:
    best: tuple[str, list[Change]] = ("", [])
    for name in config_files.shipped("run") if here else ():
        shipped = flat(config_files.load(name).to_dict())
        if shipped.get("algorithm") != here.get("algorithm"):
            continue
        changes = [
            Change(option, _rows(shipped.get(option, "-")), _rows(value))
            for option, value in here.items()
            if option not in _PLACES and _rows(shipped.get(option, "-")) != _rows(value)
        ]
        if not best[0] or len(changes) < len(best[1]):
            best = (name, changes)
    return best


def _rows(value: str) -> str:
    """Returns a path of shipped rows without the place of the installation."""
    place = value.find("atlas_jax/configs/")
    return value[place:] if place >= 0 else value


def _facts(run: RunFiles) -> list[tuple[str, str]]:
    environment = run.config.get(ENVIRONMENT, {})
    facts = [
        ("atlas_jax of this page", atlas_jax.__version__),
        ("Python of this page", platform.python_version()),
        *((name, masking.hide(str(value))) for name, value in environment.items()),
    ]
    names = {
        "weights": "digest of model_name_or_path",
        "tokenizer": "digest of the tokenizer",
        "student": "digest of student_model",
        "teacher": "digest of teacher_model_name_or_path",
        "date": "date that chat templates took for today",
    }
    facts += [(label, str(run.start[key])) for key, label in names.items() if run.start.get(key)]
    for option in ("dataset_path", "eval_path"):
        path = pathlib.Path(run.config.get("data", {}).get(option, "") or "-")
        if path.is_file() and path.stat().st_size <= _MAX_HASHED_BYTES:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            facts.append((f"SHA-256 of data.{option}, as it is now", digest))
    return facts


def _commands(run: RunFiles, nearest: str, changes: list[Change]) -> list[str]:
    commands = []
    if nearest:
        options = [f"--config.{change.name}={change.here}" for change in changes]
        options.append(f"--config.output_dir={run.config.get('output_dir', '')}")
        words = ["atlas-train", f"--config={nearest}", *options]
        commands.append(" \\\n  ".join(shlex.join([word]) for word in words))
        commands.append(shlex.join(["atlas-train", f"--config={run.name}/config.json"]))
    commands.append(shlex.join(["atlas-report", run.name]))
    return [masking.hide(command) for command in commands]
