"""Digests: `sha256:<64 lowercase hex>` names bytes, `xxh3_128` re-checks them at memory speed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from lopd_store.strictjson import canonical

DIGEST_PATTERN = re.compile(r"sha256:[0-9a-f]{64}")
XXH3_PATTERN = re.compile(r"[0-9a-f]{32}")
_BLOCK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class FileDigests:
    """Size in bytes and both digests of one file."""

    size: int
    sha256: str  # "sha256:<64 hex>"
    xxh3_128: str  # 32 hex


def digest_bytes(data: bytes | memoryview) -> str:
    """The digest of these bytes, `sha256:<64 lowercase hex>`."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def digest_json(value: Any) -> str:
    """The digest of a JSON value in canonical form: sorted names, no white space, UTF-8."""
    return digest_bytes(canonical(value))


def digest_file(path: Path, on_bytes: Callable[[int], None] | None = None) -> FileDigests:
    """Size, sha256 and xxh3-128 of a file, read once; `on_bytes` hears how many bytes each block had."""
    sha, xxh, size = hashlib.sha256(), xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            sha.update(block)
            xxh.update(block)
            size += len(block)
            if on_bytes is not None:
                on_bytes(len(block))
    return FileDigests(size=size, sha256="sha256:" + sha.hexdigest(), xxh3_128=xxh.hexdigest())


def xxh3_file(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """The xxh3-128 of a file alone, several times faster than `digest_file`."""
    xxh = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            xxh.update(block)
            if on_bytes is not None:
                on_bytes(len(block))
    return xxh.hexdigest()


def digest_contents(data: bytes) -> FileDigests:
    """What `digest_file` gives for a file with these bytes."""
    return FileDigests(size=len(data), sha256=digest_bytes(data), xxh3_128=xxhash.xxh3_128_hexdigest(data))


def is_digest(value: object) -> bool:
    """Whether this is a well-formed `sha256:<64 lowercase hex>`."""
    return isinstance(value, str) and DIGEST_PATTERN.fullmatch(value) is not None
