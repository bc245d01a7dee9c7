"""Writing so that a file is either whole or not there, whatever happens in between."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lopd_store.errors import InputError

UNFINISHED = ".unfinished"
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # what a file system without locks answers


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


@contextmanager
def making(output: Path) -> Iterator[Path]:
    """`becoming` for what somebody else may make at the same time: one does after the other, and nothing is replaced.

    Raises InputError where `output` exists, if only since the one before has ended.
    """
    with alone(output.with_name(output.name + UNFINISHED)):
        if output.exists():
            raise InputError(f"`{output}` exists", hint="choose another `--output`, or move it away")
        with becoming(output) as unfinished:
            yield unfinished


@contextmanager
def alone(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Wait until nobody else works on `path`, or raise InputError where somebody does.

    The lock is the system's, so a process that was killed leaves none.
    """
    lock = path.with_name(path.name + ".lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with lock.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError as error:
                raise InputError(f"another run works on `{path}`", hint="wait for it, or stop it") from error
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise  # else a file system without locks, where two must not begin at once
            if not _is_at(file.fileno(), lock):
                continue  # who had it has removed the file since, and somebody else may lock a new one
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an opened file is still the one of this name."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
