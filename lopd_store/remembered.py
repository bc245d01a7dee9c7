"""What this user has verified before: copies of artifacts, by fingerprint and view, whose every value was right.

The same bytes hold the same values. So whoever compares the bytes with their digests anyway need not look at values
that one verification by the same version of lopd has found right.
"""

from __future__ import annotations

from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lopd_store import strictjson
from lopd_store.cache import cache_directory
from lopd_store.digest import digest_bytes
from lopd_store.durable import write_durably
from lopd_store.view import View

# Without a cache, a home to keep one in or an installed lopd nothing is remembered, which only costs the next one time.
_NO_MEMORY = (OSError, RuntimeError, PackageNotFoundError)


def remember(fingerprint: str, view: View) -> None:
    """Keep in the cache that all values of these files of the artifact are right."""
    with suppress(*_NO_MEMORY):
        file = _file(fingerprint, view)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_durably(file, b"")


def is_remembered(fingerprint: str, view: View) -> bool:
    """Whether they were found right before."""
    with suppress(*_NO_MEMORY):
        return _file(fingerprint, view).is_file()
    return False


def _file(fingerprint: str, view: View) -> Path:
    of = strictjson.canonical([version("lopd"), view.to_json(fingerprint)])
    return cache_directory() / "verified" / digest_bytes(of).removeprefix("sha256:")
