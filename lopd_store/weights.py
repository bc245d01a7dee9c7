"""Digests of weights: of every tensor, on all processors, and remembered until the file changes.

A model has the same digest in 2 files or in 200, since only names, types, shapes and bytes of tensors count. A second
digest is over the values rounded to bfloat16: float32 and bfloat16 copies of one model differ in the first and agree
in this one.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lopd_store import strictjson
from lopd_store.digest import digest_bytes, digest_json, is_digest
from lopd_store.durable import write_durably
from lopd_store.errors import ArtifactError, DataError

OnBytes = Callable[[int, int], None]
_MAX_HEADER_BYTES = 100 << 20
_BLOCK = 256 << 10  # bytes hashed at a time: they stay in the cache; a multiple of every item size
_SETTLED_SECONDS = 2.0  # a file younger than this may change again within the same time stamp
_FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16}


@dataclass(frozen=True)
class TensorDigest:
    """One tensor; `rounded` is the digest of its values in bfloat16, of its bytes where they are no floats."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str
    rounded: str


@dataclass(frozen=True)
class WeightsDigests:
    """The two digests of a model's weights."""

    weights: str
    rounded: str


def weights_digests(tensors: Mapping[str, TensorDigest]) -> WeightsDigests:
    """Digests over the list of (name, dtype, shape, sha256), and of (name, shape, rounded), of all tensors by name."""
    ordered = [tensors[name] for name in sorted(tensors)]
    return WeightsDigests(
        weights=digest_json([[one.name, one.dtype, list(one.shape), one.sha256] for one in ordered]),
        rounded=digest_json([[one.name, list(one.shape), one.rounded] for one in ordered]),
    )


def tensor_digests(
    files: Sequence[Path], *, on_bytes: OnBytes | None = None, cache: bool = True
) -> dict[str, TensorDigest]:
    """Every tensor of a model by name, whichever of its files holds it.

    `on_bytes` hears (bytes read, bytes in all). With `cache`, a file with the size, times and inode of last time is not
    read again.
    """
    total = sum(path.stat().st_size for path in files)
    read, lock = 0, threading.Lock()

    def report(count: int) -> None:
        nonlocal read
        with lock:
            read += count
            if on_bytes is not None:
                on_bytes(read, total)

    tensors: dict[str, TensorDigest] = {}
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for path in files:
            for tensor in _tensors(path, pool, report, cache):
                if tensor.name in tensors:
                    raise DataError(f"the tensor `{tensor.name}` occurs twice", actual=f"again in `{path.name}`")
                tensors[tensor.name] = tensor
    return tensors


def _tensors(
    path: Path, pool: ThreadPoolExecutor, report: Callable[[int], None], cache: bool
) -> Sequence[TensorDigest]:
    state = _state(path)
    if cache and (remembered := _recall(path, state)) is not None:
        report(state["size"])
        return remembered
    digest = _gguf_tensors if path.suffix == ".gguf" else _safetensors
    found = list(digest(path, pool, report))
    if cache and _state(path) == state and time.time_ns() - state["changed"] > _SETTLED_SECONDS * 1e9:
        with suppress(OSError):  # a cache that cannot be written is no reason to fail
            _remember(path, state, found)
    return found


def _safetensors(path: Path, pool: ThreadPoolExecutor, report: Callable[[int], None]) -> Iterator[TensorDigest]:
    with path.open("rb") as file:
        size = path.stat().st_size
        length = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))[0]
        if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise DataError(f"`{path.name}` is not a safetensors file", actual=f"a header of {length} bytes")
        tensors = _header(file.read(length), path.name)
        start = 8 + length
        for name, tensor in tensors.items():
            if not 0 <= tensor["data_offsets"][0] <= tensor["data_offsets"][1] <= size - start:
                raise DataError(f"`{path.name}` is cut short at the tensor `{name}`")
        report(start)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            view = memoryview(mapped)[start:]

            def digest(item: tuple[str, dict[str, Any]]) -> TensorDigest:
                name, tensor = item
                with view[slice(*tensor["data_offsets"])] as data:
                    sha256, rounded = _digests(data, tensor["dtype"], report)
                return TensorDigest(name, tensor["dtype"], tuple(tensor["shape"]), sha256, rounded)

            try:
                yield from list(pool.map(digest, tensors.items()))
            finally:
                view.release()


def _digests(data: memoryview, dtype: str, report: Callable[[int], None]) -> tuple[str, str]:
    """sha256 of the bytes, and of the values in bfloat16."""
    exact, rounded = hashlib.sha256(), hashlib.sha256()
    kind = _FLOATS.get(dtype)
    for start in range(0, len(data), _BLOCK):
        with data[start : start + _BLOCK] as block:
            exact.update(block)
            if kind is not None:
                rounded.update(round_to_bfloat16(np.frombuffer(block, kind)).tobytes())
            report(len(block))
    digest = f"sha256:{exact.hexdigest()}"
    return digest, digest if kind is None else f"sha256:{rounded.hexdigest()}"


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits of the nearest bfloat16 values, ties to even, as uint16; of every NaN the same one."""
    with np.errstate(over="ignore"):
        bits = values.astype("<f4", copy=False).view("<u4")
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    rounded >>= np.uint32(16)
    rounded[np.isnan(values)] = 0x7FC0
    return rounded.astype("<u2")


def _header(data: bytes, file: str) -> dict[str, Any]:
    """What the header of a safetensors file says of each tensor, by name."""
    try:
        header = strictjson.loads(data, where=file, max_bytes=_MAX_HEADER_BYTES)
    except ArtifactError as error:
        raise DataError(f"`{file}` is not a safetensors file: {error.message}") from error
    tensors: dict[str, Any] = header if isinstance(header, dict) else {"": header}
    tensors.pop("__metadata__", None)
    if not all(_is_tensor(value) for value in tensors.values()):
        raise DataError(f"`{file}` is not a safetensors file", actual="a header that does not describe tensors")
    return tensors


def _is_tensor(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("dtype"), str)
        and all(isinstance(value.get(name), list) for name in ("shape", "data_offsets"))
        and all(type(number) is int for number in value["shape"] + value["data_offsets"])
        and len(value["data_offsets"]) == 2
    )


def _gguf_tensors(path: Path, pool: ThreadPoolExecutor, report: Callable[[int], None]) -> Iterator[TensorDigest]:
    from gguf import GGUFReader

    def digest(tensor: Any) -> TensorDigest:
        sha256 = digest_bytes(tensor.data.tobytes())
        report(tensor.data.nbytes)
        return TensorDigest(
            tensor.name, tensor.tensor_type.name, tuple(int(n) for n in tensor.shape), sha256, rounded=sha256
        )

    yield from pool.map(digest, GGUFReader(path).tensors)


def _state(path: Path) -> dict[str, int]:
    """What changes with a file's content, as far as the file system tells; the change time cannot be set by hand."""
    found = path.stat()
    return {
        "size": found.st_size,
        "modified": found.st_mtime_ns,
        "changed": found.st_ctime_ns,
        "inode": found.st_ino,
        "device": found.st_dev,
    }


def _cache_file(path: Path) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "lopd" / "weights" / (hashlib.sha256(os.fsencode(path.resolve())).hexdigest() + ".json")


def _recall(path: Path, state: dict[str, int]) -> list[TensorDigest] | None:
    try:
        note = json.loads(_cache_file(path).read_bytes())
        if note["file"] != str(path.resolve()) or note["state"] != state:
            return None
        found = [TensorDigest(name, dtype, tuple(shape), a, b) for name, dtype, shape, a, b in note["tensors"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if all(is_digest(one.sha256) and is_digest(one.rounded) for one in found) else None


def _remember(path: Path, state: dict[str, int], tensors: Sequence[TensorDigest]) -> None:
    rows = [[one.name, one.dtype, list(one.shape), one.sha256, one.rounded] for one in tensors]
    file = _cache_file(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_durably(file, strictjson.canonical({"file": str(path.resolve()), "state": state, "tensors": rows}))
