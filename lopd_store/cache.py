"""The cache: part files of artifacts that are read where they are, by their digests, and never more than a limit.

It lies in XDG_CACHE_HOME or ~/.cache, in `lopd`, and is shared by all processes of a user. LOPD_CACHE_BYTES is its
limit, 16 GB where that is not set; the files that were not used for the longest time go first.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import xxhash

from lopd_store.digest import FileDigests, digest_bytes
from lopd_store.errors import ArtifactError, InputError

_LIMIT = 16 * 10**9
_FETCHING = ".fetching-"
_ABANDONED_SECONDS = 24 * 3600  # a download this old has no process any more

_locks: dict[str, threading.Lock] = {}


def cache_directory() -> Path:
    """Where this user's caches of lopd are."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lopd"


def read_cached(path: str, digests: FileDigests, fetch: Callable[[str, Path], None]) -> bytes:
    """The bytes of a file with these digests, out of the cache, or fetched to `path` below a directory and kept.

    Raises ArtifactError where other bytes come.
    """
    file = _directory() / digests.sha256.removeprefix("sha256:")
    with _locks.setdefault(file.name, threading.Lock()):
        if (data := _recall(file, digests)) is not None:
            return data
        scratch = Path(tempfile.mkdtemp(prefix=_FETCHING, dir=_directory()))
        try:
            fetch(path, scratch)
            data = (scratch / path).read_bytes() if (scratch / path).stat().st_size == digests.size else b""
            if len(data) != digests.size or digest_bytes(data) != digests.sha256:
                raise ArtifactError(
                    f"`{path}`: digest differs",
                    code="A022",
                    expected=digests.sha256,
                    actual=digest_bytes(data) if data else "another size",
                )
            (scratch / path).replace(file)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    _make_room(file)
    return data


def _recall(file: Path, digests: FileDigests) -> bytes | None:
    """The bytes of a file in the cache; None where it is not there, or was damaged."""
    with suppress(FileNotFoundError):  # also where another process made room meanwhile
        data = file.read_bytes() if file.stat().st_size == digests.size else b""
        if len(data) == digests.size and xxhash.xxh3_128_hexdigest(data) == digests.xxh3_128:
            os.utime(file)  # it was used
            return data
        file.unlink()
    return None


def _make_room(newest: Path) -> None:
    """Remove what was not used for the longest time until the limit holds; the newest file stays in any case."""
    limit, files = _limit(), []
    for entry in os.scandir(newest.parent):
        with suppress(FileNotFoundError):
            state = entry.stat(follow_symlinks=False)
            if not entry.name.startswith(_FETCHING):
                files.append((state.st_mtime_ns, state.st_size, Path(entry.path)))
            elif time.time() - state.st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(entry.path, ignore_errors=True)
    room = limit - sum(size for _, size, _ in files)
    for _, size, file in sorted(files):
        if room >= 0:
            break
        if file != newest:
            file.unlink(missing_ok=True)
            room += size


def _directory() -> Path:
    directory = cache_directory() / "files"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _limit() -> int:
    text = os.environ.get("LOPD_CACHE_BYTES", str(_LIMIT))
    if not text.isdecimal():
        raise InputError("LOPD_CACHE_BYTES is not a number of bytes", actual=text[:100])
    return int(text)
