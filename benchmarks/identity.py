"""The digest of weights in numbers: bytes per second beside bare sha256 of the same file.

    python benchmarks/identity.py           # a file of 1 GB; `make bench-identity`
    python benchmarks/identity.py --small   # one of 32 MB, in seconds; keeps no results

It prints a table and writes it into RESULTS.md. The file is read once beforehand, so that memory and not the disk is
measured; each pass takes turns with bare sha256 in as many threads. Only Linux can be asked to stay on one core.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import os
import platform
import struct
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
from measure import machine, medians, pin
from report import Row, table_of_rows, write_section

import lopd_store
from lopd_store.weights import tensor_digests

HERE = Path(__file__).parent
TENSORS = 64  # as many as a model of some layers has, of equal size
SETTLED_SECONDS = 3.0  # a younger file is not remembered


def main() -> None:
    """Measure, print, and keep the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=HERE / "RESULTS.md", help="the file whose section is rewritten")
    parser.add_argument("--small", action="store_true", help="a small file, in seconds; keeps no results")
    options = parser.parse_args()
    megabytes, repeats = (32, 1) if options.small else (1024, 3)
    cores = os.sched_getaffinity(0)
    with tempfile.TemporaryDirectory() as directory:
        os.environ["XDG_CACHE_HOME"] = directory  # where digests are remembered
        rows = list(measure(Path(directory), megabytes << 20, cores, repeats))
    made = (
        f"{datetime.now(UTC):%Y-%m-%d}, {machine()}; Python {platform.python_version()}, lopd {lopd_store.__version__}"
    )
    text = f"{made}. One safetensors file of {megabytes} MiB, {TENSORS} tensors.\n\n{table_of_rows(rows)}"
    print(text)
    if not options.small:
        write_section(options.results, "Identity", text)


def measure(directory: Path, size: int, cores: set[int], repeats: int) -> Iterator[Row]:
    """Speeds of the digest in bfloat16 and float32, on one core and on all; then the second time."""
    for dtype in ("BF16", "F32"):
        path = write_weights(directory / f"{dtype}.safetensors", dtype, size)
        for some in ([min(cores)], sorted(cores)):
            pin(some)
            digest = partial(tensor_digests, [path], cache=False)
            seconds, bare = medians(digest, partial(sha256, path, len(some)), repeats=repeats)
            on = f"{dtype}, {len(some)} core{'s' * (len(some) > 1)}"
            yield Row(what=f"digest, {on}", value=size / seconds / 1e6, unit="MB/s")
            target = 0.8 if dtype == "BF16" else None  # float32 is hashed twice: as it is, and rounded
            yield Row(what=f"digest beside bare sha256, {on}", value=bare / seconds, unit="of its speed", target=target)
    pin(cores)
    time.sleep(SETTLED_SECONDS)
    tensor_digests([path])
    (again,) = medians(partial(tensor_digests, [path]), repeats=repeats)
    yield Row(what="the second time", value=again * 1e3, unit="ms", target=10, at_most=True)


def write_weights(path: Path, dtype: str, size: int) -> Path:
    """A safetensors file of random bytes, all tensors of one shape."""
    each = size // TENSORS
    shape = [each // {"BF16": 2, "F32": 4}[dtype]]
    offsets = {f"layer.{number:02d}": [number * each, (number + 1) * each] for number in range(TENSORS)}
    header = {name: {"dtype": dtype, "shape": shape, "data_offsets": ends} for name, ends in offsets.items()}
    head, generator = json.dumps(header).encode(), np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for _ in range(TENSORS):
            file.write(generator.bytes(each))
    return path


def sha256(path: Path, threads: int) -> None:
    """Bare sha256 of the file, mapped as the digest maps it: of as many equal pieces as there are threads."""
    size = path.stat().st_size
    each = -(-size // threads)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:

        def piece(start: int) -> None:
            with memoryview(mapped) as view, view[start : start + each] as some:
                hashlib.sha256(some)

        with ThreadPoolExecutor(max_workers=threads) as pool:
            list(pool.map(piece, range(0, size, each)))


if __name__ == "__main__":
    main()
