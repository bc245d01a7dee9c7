"""Writing so that a file is either whole or not there, whatever happens in between."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

UNFINISHED = ".unfinished"


def write_durably(path: Path, data: bytes) -> None:
    """Write under another name, flush to the disk, rename; what could not be written whole takes up no room."""
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}{UNFINISHED}")
    try:
        with unfinished.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def remove_unfinished(directory: Path) -> None:
    """Remove what a kill in the middle of `write_durably` has left there."""
    for path in directory.glob(f"*{UNFINISHED}"):
        path.unlink(missing_ok=True)


def sync_directory(path: Path) -> None:
    """Make a rename in this directory survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
