"""Rows of datasets that the library `datasets` loads: those of the hub, and directories."""

from __future__ import annotations

import os
import pathlib

from absl import logging

from atlas_jax import extras
from atlas_jax.data import row_files, sources
from atlas_jax.options.data import DataConfig

_NO_ROWS = (sources.SAVED, "dataset_info.json", "dataset_infos.json", "dataset_dict.json")


def records(path: str, config: DataConfig) -> row_files.Records:
    """Yields the rows of a hub dataset, of one file of it, or of a directory of files.

    Raises:
        ValueError: if `datasets` cannot load it.
    """
    with extras.importing("datasets", f"the dataset {path}"):
        import datasets

    match = sources.HUB_FILE.fullmatch(path)
    repo, files = (match["repo"], match["file"]) if match else (path, None)
    # The only split that `datasets` gives a file.
    hub_split = "train" if match else config.dataset_split
    folder = pathlib.Path(path).expanduser()
    kind = "directory" if folder.is_dir() else "hub dataset"
    if folder.is_dir() and not any(row_files.is_known(str(f)) for f in folder.rglob("*")):
        raise ValueError(
            f"the directory {path}, given as a dataset, holds no file that ends in "
            f"{row_files.kinds()}; give the file itself"
        )
    try:
        if (folder / sources.SAVED).exists():
            table = datasets.load_from_disk(str(folder))
        else:
            table = datasets.load_dataset(
                str(folder) if folder.is_dir() else repo,
                config.dataset_config or None,
                data_files=files,
                split=hub_split,
            )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        why = " ".join(str(error.__cause__ or error).split())
        raise ValueError(
            f"{kind} {path!r}, split {hub_split!r}, cannot be loaded ({why}); check the id, "
            "data.dataset_config, data.dataset_split and the network, or give a .jsonl or .parquet "
            "file, or files by a pattern of their names"
        ) from error
    if folder.is_dir() and not (folder / sources.SAVED).exists():
        _tell_unread(folder, config)
    for number, fields in enumerate(table, start=1):
        yield f"{path}[{hub_split}]:{number}", dict(fields)


def _tell_unread(folder: pathlib.Path, config: DataConfig) -> None:
    """Warns of files that `datasets` leaves out: it reads the most frequent kind of a directory."""
    import datasets

    builder = datasets.load_dataset_builder(str(folder), config.dataset_config or None)
    read = {os.path.realpath(f) for files in builder.config.data_files.values() for f in files}
    left = [
        str(file)
        for file in sorted(folder.rglob("*"))
        if row_files.is_known(str(file))
        and file.name not in _NO_ROWS
        and os.path.realpath(file) not in read
    ]
    if left:
        logging.warning(
            "%d files of the directory %s are not read, such as %s; a pattern of names, such as "
            "%s/*, reads files of any kind",
            *(len(left), folder, left[0], folder),
        )
