"""Replacement of export directories, limited to those that this program wrote.

A marker file lists the files that were written, each with a fingerprint. A file that is not listed
is the user's and is kept. A listed file with another fingerprint was changed by the user; since
the new export needs its name, the directory is refused.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Sequence

from atlas_jax import files
from atlas_jax.checkpoint import layout

MARKER = ".atlas_jax_export.json"
"""Name of the marker file; neither transformers nor vLLM read it."""

UNMARKED_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "additional_chat_templates/*.jinja",
)  # fmt: skip
"""Patterns of the files in `model/` of a run by a version that wrote no markers."""

UNMARKED_EXPORT = (
    *UNMARKED_FILES, layout.WHOLE, "model-*-of-*.safetensors", layout.INDEX, "trainer_state.json",
)  # fmt: skip
"""Patterns of the files in `final/` of such a run."""

_FORMAT = 1
_FINGERPRINT_BYTES = 1 << 20
_PARTS = 16
_PART_BYTES = 1 << 16


@contextlib.contextmanager
def replaced(
    directory: str | os.PathLike[str], kind: str, source: str, unmarked: Sequence[str] = ()
) -> Iterator[pathlib.Path]:
    """Yields an empty directory to fill, which becomes `directory` if no error is raised.

    Args:
        directory: the target; absent, empty, or an earlier export of the same kind.
        kind: the kind of content, as the marker names it.
        source: the origin of the content, for the marker.
        unmarked: patterns of files, see `check`.

    Raises:
        ValueError: if `directory` holds anything that this program may not replace.
        OSError: if something cannot be written; `directory` is then unchanged.
    """
    check(directory, kind, unmarked)
    target = files.resolved(directory)
    with files.replace_directory(target) as new:
        yield new
        # The fingerprints come before the user's files, which are not this program's to replace.
        written = {name: _fingerprint(new / name) for name in _names(new)}
        # Again, because the user may have written here in the minutes since.
        theirs = check(directory, kind, unmarked)
        taken = [name for name in theirs if name in written]
        if taken:
            raise ValueError(
                f"{directory} holds {layout.some(taken)}, which an export did not write "
                "but this one would; move it away"
            )
        for name in theirs:
            _carry_over(target / name, new / name)
        marker = {
            "format": _FORMAT,
            "tool": "atlas_jax",
            "kind": kind,
            "source": source,
            "files": written,
        }
        (new / MARKER).write_text(json.dumps(marker, indent=2) + "\n")


def check(directory: str | os.PathLike[str], kind: str, unmarked: Sequence[str] = ()) -> list[str]:
    """Checks that `directory` may be replaced.

    Args:
        directory: the target, which need not exist.
        kind: the kind of content that is to be written there.
        unmarked: patterns of the files that a directory without a marker may hold, for directories
            of runs from before markers were written.

    Returns:
        The user's files in it, which are kept.

    Raises:
        ValueError: if it holds anything that this program may not replace; the message names it.
    """
    target = files.resolved(directory)
    files.recover(target)
    if not target.exists():
        return []
    if not target.is_dir():
        raise ValueError(f"{directory} is a file; name a directory that does not exist yet")
    if not any(target.iterdir()):
        return []
    written = _read_marker(target, kind)
    if written is None:
        _check_unmarked(directory, target, unmarked)
        return []
    names = [name for name in _names(target) if name != MARKER]
    changed = [n for n in names if n in written and _fingerprint(target / n) != written[n]]
    if changed:
        raise ValueError(
            f"{directory} holds {layout.some(changed)}, changed since it was exported; "
            "move it away, or name another directory"
        )
    return [name for name in names if name not in written]


def _check_unmarked(
    directory: str | os.PathLike[str], target: pathlib.Path, patterns: Sequence[str]
) -> None:
    found = sorted(_names(target) if patterns else (path.name for path in target.iterdir()))
    foreign = [n for n in found if not any(fnmatch.fnmatchcase(n, p) for p in patterns)]
    if foreign:
        raise ValueError(
            f"{directory} is not empty and no earlier export of its kind: it holds "
            f"{layout.some(foreign)}; name another directory, or move this away"
        )


def _read_marker(target: pathlib.Path, kind: str) -> dict[str, str] | None:
    """Returns the fingerprints that the marker lists, or None without a marker of this kind."""
    try:
        marker = json.loads((target / MARKER).read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(marker, dict) or not isinstance(marker.get("files"), dict):
        return None
    return (
        marker["files"] if (marker.get("format"), marker.get("kind")) == (_FORMAT, kind) else None
    )


def _names(directory: pathlib.Path) -> list[str]:
    """Returns the paths of all files and links in a directory, relative to it."""
    return sorted(
        pathlib.Path(folder, name).relative_to(directory).as_posix()
        for folder, folders, names in os.walk(directory)
        for name in [*names, *(f for f in folders if os.path.islink(os.path.join(folder, f)))]
    )


def _fingerprint(path: pathlib.Path) -> str:
    """Returns the size and a hash of parts of a file: its beginning, its end and some between.

    A safetensors file begins with its header and with weights that any training changes. Reading a
    large file whole would take as long as writing it.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(file.read(_FINGERPRINT_BYTES))
            for part in range(1, _PARTS + 1):
                file.seek(max(file.tell(), part * size // _PARTS - _PART_BYTES))
                digest.update(file.read(_PART_BYTES))
    except OSError:
        return ""
    return f"{size}:{digest.hexdigest()}"


def _carry_over(old: pathlib.Path, new: pathlib.Path) -> None:
    """Links a user's file into the new directory."""
    new.parent.mkdir(parents=True, exist_ok=True)
    files.link_or_copy(old, new)
