"""Exports: an artifact in the files of neighbouring trainers, verified first, and behind the gate as training is.

    export("artifact", "trl", output="rows.parquet", student=identify("sft"))
    json.loads(pq.read_schema("rows.parquet").metadata[RECORD_KEY])["fingerprint"]

One file per format says what its columns are; this one verifies, judges, goes through the parts one at a time, and
writes. What an export came from, what the gate found and what was overridden stays in its metadata.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from lopd_store import gate, reader, sources, strictjson
from lopd_store.durable import making
from lopd_store.errors import DataError, InputError
from lopd_store.identity import ModelIdentity
from lopd_store.interop import axolotl, distillkit, lightning_opd, trl
from lopd_store.interop.target import Format, Keep, Target
from lopd_store.part import Part
from lopd_store.reader import Artifact
from lopd_store.survey import OnBad
from lopd_store.verifier import OnBytes, verify

RECORD_KEY = b"lopd.export"  # of the metadata of a Parquet schema
RECORD = "lopd-export.json"  # the same, beside the data of a format that is a directory
DATA = "data_0.parquet"
FIXED_K = ("distillkit", "axolotl")
_BYTES_AT_ONCE = 128 << 20


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export wrote, and what the gate found before."""

    output: Path
    rollouts: int
    positions: int
    left_out: int  # rollouts that no trainer could use, or that the format cannot hold
    bytes: int
    notes: tuple[str, ...]  # what the format loses of this artifact
    record: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """A JSON object with one member per field."""
        return {**vars(self), "output": str(self.output), "notes": list(self.notes)}


def export(
    artifact: str | Path,
    format: Format,
    *,
    output: str | Path,
    student: ModelIdentity | None = None,
    overrides: Collection[str] = (),
    k: int | None = None,
    tokenizer: str | Path | None = None,
    on_bad_rollout: OnBad = "fail",
    on_bytes: OnBytes | None = None,
    on_positions: OnBytes | None = None,
) -> Exported:
    """Write an artifact, or a copy of a part of it, as another format; it appears at `output` only when it is whole.

    One row per rollout, in order; those without a position that counts in the loss are left out, as in training.
    `k` is for `distillkit` and `axolotl`, whose rows all have as many entries: by default as many as any can have.
    `tokenizer` is for `lightning-opd`, whose prompts are text: a model that has the artifact's; and a prompt that does
    not survive as text stops the export or, with `on_bad_rollout="skip"`, is left out.
    `on_bytes` hears (bytes so far, bytes in all) of the verification, `on_positions` the same of the writing. Raises
    ConsistencyError where the gate refuses and `overrides` (names in `gate.OVERRIDES`) do not cover it.
    """
    if sources.is_url(artifact):
        raise InputError(f"`{artifact}` is not on this machine", hint="`lopd-store pull` brings it here")
    opened, output = reader.open(artifact), Path(output)
    if output.exists():
        raise InputError(f"`{output}` exists", hint="choose another `--output`, or move it away")
    target = _target(opened, format, k, tokenizer, on_bad_rollout)
    if target.files is None and output.suffix != ".parquet":
        raise InputError(f"`{output}` is not a name for a table", expected="a name that ends in .parquet")
    verdict = gate.judge(opened.manifest.inputs, student)
    overridden = gate.enforce(verdict, overrides)
    record = {
        "format": "lopd-export",
        "target": format,
        "settings": dict(target.settings),
        "verdict": verdict.state,
        "reasons": [finding.reason for finding in verdict.findings],
        "overrides": list(overridden),
        "student": None if student is None else student.to_json(),
        **_lineage(opened),
    }
    verify(opened.path, on_bytes=on_bytes).require_ok()
    with making(output) as unfinished:
        written = _write(opened, target, unfinished, record, on_positions)
        size = sum(file.stat().st_size for file in [unfinished, *unfinished.rglob("*")] if file.is_file())
    zeros = f"{target.zeros}, and {written.with_zeros:,} of {written.rollouts:,} rollouts have zeros in theirs"
    return Exported(
        output=output,
        rollouts=written.rollouts,
        positions=written.positions,
        left_out=written.left_out,
        bytes=size,
        notes=(zeros,) if target.zeros and written.with_zeros else (),
        record=record,
    )


def _lineage(artifact: Artifact) -> dict[str, Any]:
    """Which artifact, or which parts of it, and all that its manifest says of where it came from."""
    return {
        "fingerprint": artifact.fingerprint,
        "parts": [artifact.view.parts.start, artifact.view.parts.stop],
        "inputs": strictjson.loads(artifact.manifest_bytes, where=artifact.place)["inputs"],
    }


def _target(
    artifact: Artifact, format: Format, k: int | None, tokenizer: str | Path | None, on_bad_rollout: OnBad
) -> Target:
    if k is not None and format not in FIXED_K:
        raise InputError(f"`k` does not go with `{format}`", expected=" or ".join(FIXED_K))
    if (tokenizer is not None) != (format == "lightning-opd"):
        raise InputError("`tokenizer` goes with `lightning-opd`, and it with a tokenizer", actual=format)
    if format == "trl":
        return trl.target(artifact)
    if format == "distillkit":
        return distillkit.target(artifact, k)
    if format == "axolotl":
        return axolotl.target(artifact, k)
    if tokenizer is not None:
        return lightning_opd.target(artifact, tokenizer, on_bad_rollout)
    raise InputError(f"there is no format `{format}`", expected=", ".join(get_args(Format)))


@dataclass
class _Written:
    rollouts: int = 0
    positions: int = 0
    left_out: int = 0
    with_zeros: int = 0


def _write(
    artifact: Artifact, target: Target, place: Path, record: dict[str, Any], on_positions: OnBytes | None
) -> _Written:
    """Write the file, or the directory, part by part."""
    schema = target.schema.with_metadata({RECORD_KEY: strictjson.canonical(record)})
    total = sum(artifact.manifest.parts[number].counts.positions for number in artifact.view.parts)
    written, done, first = _Written(), 0, artifact.rollouts.start
    if target.files is not None:
        place.mkdir()
        for name, data in {**target.files, RECORD: strictjson.pretty(record)}.items():
            (place / name).write_bytes(data)
    with pq.ParquetWriter(place if target.files is None else place / DATA, schema, compression="zstd") as writer:
        for batch in _batches(artifact, _BYTES_AT_ONCE // target.bytes_per_token):
            keep = _per_rollout(batch.loss_mask, batch) > 0
            if target.keep is not None:
                keep &= target.keep(batch, first)
            kept = [target.columns(batch.slice(start, stop)) for start, stop in _runs(keep)]
            if kept:
                writer.write_table(pa.concat_tables([pa.Table.from_arrays(columns, schema=schema) for columns in kept]))
            written.rollouts += int(keep.sum())
            written.positions += int(np.diff(batch.position_offsets)[keep].sum())
            written.left_out += int((~keep).sum())
            written.with_zeros += int(np.count_nonzero(_per_rollout(~batch.loss_mask, batch)[keep]))
            first, done = first + len(keep), done + len(batch.loss_mask)
            if on_positions is not None:
                on_positions(done, total)
    if not written.rollouts:
        raise DataError(f"`{artifact.place}` has no rollout to export", actual=f"{written.left_out} left out")
    return written


def _batches(artifact: Artifact, tokens: int) -> Iterator[Part]:
    """All rollouts in order, some at a time, with at most so many tokens (one rollout at least)."""
    for part in artifact.parts():
        offsets, start = part.rollout_offsets, 0
        while start < len(part.prompt_lengths):
            stop = max(int(np.searchsorted(offsets, offsets[start] + tokens, side="right")) - 1, start + 1)
            yield part.slice(start, stop)
            start = stop


def _per_rollout(flags: Keep, part: Part) -> npt.NDArray[np.int64]:
    """How many positions of each rollout are true; [rollouts]."""
    counts = np.zeros(len(flags) + 1, np.int64)
    np.cumsum(flags, out=counts[1:])
    return np.diff(counts[part.position_offsets])


def _runs(keep: Keep) -> Iterator[tuple[int, int]]:
    """Where rollouts that are kept stand together: from, to."""
    edges = np.flatnonzero(np.diff(keep.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
    yield from ((int(start), int(stop)) for start, stop in edges)
