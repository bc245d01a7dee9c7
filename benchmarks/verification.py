"""Each pass of the verifier beside the work that it cannot do without."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import xxhash
from measure import medians
from report import Row

import lopd_store
from lopd_store import layout
from lopd_store.container import Group
from lopd_store.part import read_part, tokens_arrays, topk_arrays


def measure_verifier(directory: Path, threads: int, repeats: int) -> Iterator[Row]:
    """Speeds as fractions of the bare work's, both in so many threads with a part each."""
    artifact = lopd_store.open(directory)
    encoding, parts = artifact.manifest.encoding, artifact.manifest.parts

    def verify(*, quick: bool = False) -> None:
        lopd_store.verify(directory, quick=quick, threads=threads).require_ok()

    def verify_bytes() -> None:
        lopd_store.verify(directory, values=False, threads=threads).require_ok()

    def hash_files(number: int, *, algorithm: Callable[[], Any]) -> None:
        for kind in layout.FILE_KINDS:
            with (directory / layout.part_file(number, kind)).open("rb") as file:
                hashlib.file_digest(file, algorithm)

    def contents(number: int) -> list[bytes]:
        return [(directory / layout.part_file(number, kind)).read_bytes() for kind in (layout.TOKENS, layout.TOPK)]

    def decode(number: int) -> None:
        tokens, topk = contents(number)
        read_part(tokens, topk, encoding, parts[number].counts, where="")

    def decode_chunks(number: int) -> None:
        for data, arrays in zip(contents(number), (tokens_arrays(encoding), topk_arrays(encoding)), strict=True):
            group = Group(data, arrays, where="")
            for name in group.lengths:
                for _ in group.chunks(name):
                    pass

    def on_parts(work: Callable[[int], None]) -> None:
        with ThreadPoolExecutor(max_workers=threads) as pool:
            list(pool.map(work, range(len(parts))))

    def beside(what: str, target: float | None, seconds: float, bare: float) -> Row:
        on = f"{threads} core{'s' * (threads > 1)}"
        return Row(what=f"{what}, {on}", value=bare / seconds, unit="of its speed", target=target)

    for what, work, algorithm in (
        ("quick pass beside bare xxh3", partial(verify, quick=True), xxhash.xxh3_128),
        ("byte pass beside bare sha256", verify_bytes, hashlib.sha256),
    ):
        bare = partial(on_parts, partial(hash_files, algorithm=algorithm))
        yield beside(what, 0.8, *medians(work, bare, repeats=3 * repeats))
    full, flat, chunks = medians(verify, partial(on_parts, decode), partial(on_parts, decode_chunks), repeats=repeats)
    yield beside("full pass beside decoding into flat arrays", 0.7, full, flat)
    yield beside("full pass beside decoding chunk after chunk", None, full, chunks)  # and keeping nothing
