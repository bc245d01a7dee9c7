"""Writing so that a file is either whole or not there, whatever happens in between."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
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


def link_or_copy(source: Path, target: Path) -> None:
    """The same file under another name; a copy on another file system, or on one without links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


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


@contextmanager
def becoming(path: Path) -> Iterator[Path]:
    """Another name, to write a file or a directory under; it becomes `path` at the end, and after an error it is gone.

    What a kill has left there is removed at the beginning.
    """
    unfinished = path.with_name(path.name + UNFINISHED)
    _remove(unfinished)
    try:
        yield unfinished
        for file in filter(Path.is_file, [unfinished, *unfinished.rglob("*")]):
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        unfinished.rename(path)
    finally:
        _remove(unfinished)
    sync_directory(path.parent)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
