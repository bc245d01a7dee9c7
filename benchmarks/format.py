"""The format in numbers: bytes, error, speed and memory beside their targets and beside the neighbours.

    python benchmarks/format.py                                  # all of it; `make bench-format`
    python benchmarks/format.py --distillkit path/to/DistillKit  # with DistillKit's own codec in the same run
    python benchmarks/format.py --small                          # made-up data, in seconds; keeps no results

It prints tables and writes them into RESULTS.md. Speeds are those of one core, and only Linux can be asked to stay on
one.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path

from distributions import Distributions, made_up, scored
from measure import in_new_process, machine, medians, pin
from neighbours import Codec, measure_distillkit
from parts import Files, encode, make_part, read_artifact, repeat_part, verify_artifact, write_artifact
from report import Row, number, table, table_of_rows, write_section
from sizes import array_sizes, mean_kl
from verification import measure_verifier

from lopd_store.encoding import make_encoding
from lopd_store.part import Part, read_part

HERE = Path(__file__).parent
COMPACT, FIXED, EXACT = "k_max 64, coverage 0.99", "k = 50", "exact, k_max 64, coverage 0.99"
ENCODINGS = {COMPACT: make_encoding(), FIXED: make_encoding(k_max=50, coverage=1), EXACT: make_encoding(exact=True)}


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is measured."""

    part_positions: tuple[int, ...]
    artifacts: tuple[tuple[int, int], ...]  # positions of a part, parts; the verifier is timed on the last
    repeats: int


FULL = Scale(
    part_positions=(1 << 14, 1 << 17, 1 << 20),
    artifacts=((10_000, 1), (100_000, 1), (1_000_000, 1), (1 << 20, 3), (1 << 20, 10)),
    repeats=5,
)
SMALL = Scale(part_positions=(1 << 11,), artifacts=((1 << 10, 1), (1 << 11, 2)), repeats=1)


def main() -> None:
    """Measure, print, and keep the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, default=HERE / ".cache", help="where scored distributions are kept")
    parser.add_argument("--distillkit", type=Path, metavar="PATH", help="a checkout of arcee-ai/DistillKit")
    parser.add_argument("--results", type=Path, default=HERE / "RESULTS.md", help="the file whose section is rewritten")
    parser.add_argument("--small", action="store_true", help="made-up data, in seconds; keeps no results")
    options = parser.parse_args()
    scale = SMALL if options.small else FULL
    source = None if options.small else scored(options.cache)
    data = made_up() if source is None else Distributions.load(source)
    parts = {name: make_part(data, encoding) for name, encoding in ENCODINGS.items()}
    cores = os.sched_getaffinity(0)
    pin({max(cores)})

    files = {name: encode(part, ENCODINGS[name]) for name, part in parts.items()}
    rows = [*measure_size(parts, files), *measure_speed(parts, scale)]
    with tempfile.TemporaryDirectory() as scratch:
        linearity, artifact = measure_linearity(Path(scratch), source, scale)
        rows += measure_verifier(artifact, 1, scale.repeats)
        pin(cores)
        rows += measure_verifier(artifact, len(cores), scale.repeats)
        pin({max(cores)})
    comparison = []
    if options.distillkit is not None:
        others = list(measure_distillkit(options.distillkit, data, scale.repeats))
        comparison = [
            "Beside DistillKit's own codec, in one thread. It stores no token ids, sampled log-probs or tails: its "
            "bytes are of the top-k alone, and its KL is measured with the true tails.",
            table_of_neighbours(parts, files, others, scale.repeats),
        ]

    text = "\n\n".join(
        [
            introduction(data),
            table_of_rows(rows),
            "Bytes per position by array:",
            table_of_sizes(parts, files),
            "Cost by size. An artifact is written, read and verified on disk, each in a process of its own with one "
            "thread; reading decodes ahead, so up to three parts are in memory.",
            linearity,
            *comparison,
        ]
    )
    print(text)
    if not options.small:
        write_section(options.results, "Format", text)


def measure_size(parts: dict[str, Part], files: dict[str, Files]) -> Iterator[Row]:
    """Bytes per position of whole files, and what the rounding costs."""
    count = parts[COMPACT].counts.positions
    for name, target in ((COMPACT, 32), (FIXED, 92), (EXACT, None)):
        size = sum(map(len, files[name])) / count
        yield Row(what=f"size, {name}", value=size, unit="bytes/position", target=target, at_most=True)
    size = len(files[COMPACT][0]) / count
    yield Row(what="size, sampled only", value=size, unit="bytes/position", target=6, at_most=True)
    for name, limit in ((COMPACT, 5e-5), (FIXED, None), (EXACT, None)):
        kl = kl_of_files(parts[name], files[name], name)
        yield Row(what=f"KL of the rounding, {name}", value=kl, unit="nat", target=limit, at_most=True)


def measure_speed(parts: dict[str, Part], scale: Scale) -> Iterator[Row]:
    """Decoding from bytes in memory into flat arrays, and encoding."""
    sizes = scale.part_positions
    for name, positions in [*((COMPACT, size) for size in sizes), (FIXED, sizes[len(sizes) // 2])]:
        is_usual = name == COMPACT and positions == sizes[-1]  # the parts that `build` makes; targets are theirs
        part = repeat_part(parts[name], positions)
        count, encoding = part.counts.positions, ENCODINGS[name]
        files = encode(part, encoding)
        decode = partial(read_part, *files, encoding, part.counts, where="")
        what = f"{name}, parts of {count:,}"
        for verb, work, target, repeats in (
            ("decode", decode, 5, 3 * scale.repeats),
            ("encode", partial(encode, part, encoding), 0.5, scale.repeats),
        ):
            (seconds,) = medians(work, repeats=repeats)
            speed = count / seconds / 1e6
            yield Row(what=f"{verb}, {what}", value=speed, unit="M positions/s", target=target if is_usual else None)


def measure_linearity(scratch: Path, source: Path | None, scale: Scale) -> tuple[str, Path]:
    """A table of cost and memory by size, and the last artifact; the others are removed."""
    lines = []
    for positions, parts in scale.artifacts:
        artifact = scratch / f"{positions}x{parts}"
        (count, writing), write_peak = in_new_process(
            write_artifact, artifact, source, ENCODINGS[COMPACT], positions, parts
        )
        reading, read_peak = in_new_process(read_artifact, artifact)
        verifying, verify_peak = in_new_process(verify_artifact, artifact)
        costs = [f"{seconds / count * 1e6:.2f}" for seconds in (writing, reading, verifying)]
        peaks = [f"{peak:,.0f}" for peak in (write_peak, read_peak, verify_peak)]
        lines.append([f"{count:,}", str(parts), *costs, *peaks])
        if (positions, parts) != scale.artifacts[-1]:
            shutil.rmtree(artifact)
    heads = ["positions", "parts", "write, µs/position", "read", "verify", "write, peak MB", "read", "verify"]
    return table(heads, lines), artifact


def kl_of_files(part: Part, files: Files, name: str) -> float:
    """What is lost between the teacher's distributions and those that are read back."""
    stored = read_part(*files, ENCODINGS[name], part.counts, where="")
    assert part.topk is not None and stored.topk is not None
    return mean_kl(part.topk, stored.topk)


def table_of_sizes(parts: dict[str, Part], files: dict[str, Files]) -> str:
    """Bytes per position of every array under every encoding."""
    sizes = {name: array_sizes(files[name]) for name in ENCODINGS}
    lines = [
        [array, *(f"{sizes[name][array] / parts[name].counts.positions:.3f}" for name in ENCODINGS)]
        for array in sizes[COMPACT]
    ]
    entries = [f"{parts[name].counts.entries / parts[name].counts.positions:.1f}" for name in ENCODINGS]
    return table(["array", *ENCODINGS], [*lines, ["(entries per position)", *entries]])


def table_of_neighbours(parts: dict[str, Part], files: dict[str, Files], neighbours: list[Codec], repeats: int) -> str:
    """Our encodings and the neighbours' on the same positions."""
    codecs = []
    for name in (COMPACT, FIXED):
        part = parts[name]
        decode = partial(read_part, *files[name], ENCODINGS[name], part.counts, where="")
        codecs.append(
            Codec(
                name=f"lopd, {name}",
                bytes_per_position=sum(map(len, files[name])) / part.counts.positions,
                kl=kl_of_files(part, files[name], name),
                positions_per_second=part.counts.positions / medians(decode, repeats=3 * repeats)[0],
            )
        )
    lines = [
        [codec.name, number(codec.bytes_per_position), number(codec.kl), f"{codec.positions_per_second:,.0f}"]
        for codec in [*codecs, *neighbours]
    ]
    return table(["codec", "bytes/position", "KL of the rounding, nat", "decoded, positions/s"], lines)


def introduction(data: Distributions) -> str:
    """When, where, with what and on what."""
    packages = ("lopd", "numpy", "zarr", "numcodecs", "pcodec", "pyarrow", "xxhash")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, {machine()}; Python {platform.python_version()}, {versions}. "
        f"{len(data.entropies):,} positions of {len(data.prompt_lengths)} rollouts, {len(data.token_ids):,} tokens, "
        f"mean entropy {data.entropies.mean():.3f} nat. Speeds are medians on one core; a margin is how many times "
        "better than its target a number is."
    )


if __name__ == "__main__":
    main()
