"""One part as files: token ids and top-k in Zarr groups, and a Parquet table for people.

`Part` is the decoded form that training reads; what is stored of it depends on the encoding alone.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from lopd_store.container import Arrays, ArraySpec, Group, pack
from lopd_store.encoding import Encoding, IdDecoder, ids_to_rows, round_logprobs, round_topk
from lopd_store.errors import ArtifactError
from lopd_store.grid import Grid
from lopd_store.lookup import lookup
from lopd_store.manifest import Counts
from lopd_store.table import LENGTHS
from lopd_store.topk import Floats, TopK

_ID = ArraySpec("uint32", 0xFFFF_FFFF)
_CODE, _FLOAT = ArraySpec("uint16", 65_535), ArraySpec("float32", "NaN")


def tokens_arrays(encoding: Encoding) -> dict[str, ArraySpec]:
    """The arrays of NNNNN.tokens.zarr.zip."""
    logprob = _FLOAT if encoding.sampled_grid is None else _CODE
    return {
        "rollout_offsets": ArraySpec("int64", -1),
        "prompt_lengths": ArraySpec("int32", -1),
        "token_ids": _ID,
        "loss_mask": ArraySpec("bool", False),
        "sampled_logprobs": logprob,
        "reference_logprobs": replace(logprob, optional=True),
    }


def topk_arrays(encoding: Encoding) -> dict[str, ArraySpec]:
    """The arrays of NNNNN.topk.zarr.zip."""
    logprob = _FLOAT if encoding.topk_grid is None else _CODE
    reference = ("reference_logprobs", "reference_tail_logprobs") if encoding.rule == "teacher+reference" else ()
    return {
        "counts": _CODE,
        "id_table": _ID,
        "ids": _ID,
        "logprobs": logprob,
        "tail_logprobs": logprob,
        **dict.fromkeys(reference, logprob),
    }


def array_lengths(counts: Counts) -> dict[str, dict[str, int]]:
    """How long the arrays of a part are, by file and name, as the counts of its manifest entry say."""
    return {
        "tokens": {
            "rollout_offsets": counts.rollouts + 1,
            "prompt_lengths": counts.rollouts,
            "token_ids": counts.tokens,
            **dict.fromkeys(("loss_mask", "sampled_logprobs", "reference_logprobs"), counts.positions),
        },
        "topk": {
            **dict.fromkeys(("counts", "tail_logprobs", "reference_tail_logprobs"), counts.positions),
            **dict.fromkeys(("ids", "logprobs", "reference_logprobs"), counts.entries),
        },
    }


@dataclass(frozen=True, kw_only=True)
class Part:
    """A run of whole rollouts as flat arrays.

    Rollout i owns tokens [rollout_offsets[i], rollout_offsets[i + 1]), of which the first prompt_lengths[i] are its
    prompt; its positions are the other ones, in order. `topk` is None in a copy without top-k files.
    """

    rollout_offsets: npt.NDArray[np.int64]  # [rollouts + 1], into token_ids
    prompt_lengths: npt.NDArray[np.int32]  # [rollouts]
    token_ids: npt.NDArray[np.uint32]  # [tokens]
    loss_mask: npt.NDArray[np.bool_]  # [positions]
    sampled_logprobs: Floats  # [positions]
    reference_logprobs: Floats | None  # [positions]
    topk: TopK | None

    @cached_property
    def position_offsets(self) -> npt.NDArray[np.int64]:
        """Where each rollout's positions begin; [rollouts + 1]."""
        offsets = np.zeros(len(self.rollout_offsets), np.int64)
        np.cumsum(np.diff(self.rollout_offsets) - self.prompt_lengths, out=offsets[1:])
        return offsets

    @property
    def response_ids(self) -> npt.NDArray[np.uint32]:
        """The token at each position; [positions]."""
        return self.token_ids[response_mask(self.rollout_offsets, self.prompt_lengths)]

    def slice(self, start: int, stop: int) -> Part:
        """Rollouts [start, stop), as views; `rollout_offsets` begin with 0 again."""
        tokens = slice(int(self.rollout_offsets[start]), int(self.rollout_offsets[stop]))
        positions = slice(int(self.position_offsets[start]), int(self.position_offsets[stop]))
        reference = self.reference_logprobs
        return Part(
            rollout_offsets=self.rollout_offsets[start : stop + 1] - tokens.start,
            prompt_lengths=self.prompt_lengths[start:stop],
            token_ids=self.token_ids[tokens],
            loss_mask=self.loss_mask[positions],
            sampled_logprobs=self.sampled_logprobs[positions],
            reference_logprobs=None if reference is None else reference[positions],
            topk=None if self.topk is None else self.topk.slice(positions.start, positions.stop),
        )

    @property
    def counts(self) -> Counts:
        """What the manifest says of this part."""
        return Counts(
            rollouts=len(self.prompt_lengths),
            tokens=len(self.token_ids),
            positions=len(self.sampled_logprobs),
            entries=0 if self.topk is None else len(self.topk.ids),
        )


def response_mask(
    rollout_offsets: npt.NDArray[np.int64], prompt_lengths: npt.NDArray[np.int32]
) -> npt.NDArray[np.bool_]:
    """Which tokens are response tokens, that is, positions; [tokens]."""
    pieces = np.empty(2 * len(prompt_lengths), np.int64)  # prompt, response, prompt, response, …
    pieces[0::2] = prompt_lengths
    pieces[1::2] = np.diff(rollout_offsets) - prompt_lengths
    return np.repeat(np.arange(len(pieces)) % 2 == 1, pieces)


def round_part(part: Part, encoding: Encoding) -> Part:
    """The part as it will be stored: log-probs on the encoding's grids."""
    reference = part.reference_logprobs
    return replace(
        part,
        sampled_logprobs=round_logprobs(part.sampled_logprobs, encoding.sampled_grid),
        reference_logprobs=None if reference is None else round_logprobs(reference, encoding.sampled_grid),
        topk=None if part.topk is None else round_topk(part.topk, encoding.topk_grid),
    )


def tokens_file(part: Part, encoding: Encoding) -> bytes:
    """The bytes of NNNNN.tokens.zarr.zip of a rounded part."""
    arrays: Arrays = {
        "rollout_offsets": part.rollout_offsets,
        "prompt_lengths": part.prompt_lengths,
        "token_ids": part.token_ids,
        "loss_mask": part.loss_mask,
        "sampled_logprobs": _stored(part.sampled_logprobs, encoding.sampled_grid),
    }
    if part.reference_logprobs is not None:
        arrays["reference_logprobs"] = _stored(part.reference_logprobs, encoding.sampled_grid)
    return pack(arrays, tokens_arrays(encoding))


def topk_file(part: Part, encoding: Encoding) -> bytes:
    """The bytes of NNNNN.topk.zarr.zip of a rounded part."""
    topk = part.topk
    assert topk is not None
    table, rows = ids_to_rows(topk.ids, topk.counts, part.response_ids)
    arrays: Arrays = {
        "counts": topk.counts,
        "id_table": table,
        "ids": rows,
        "logprobs": _stored(topk.logprobs, encoding.topk_grid),
        "tail_logprobs": _stored(topk.tail_logprobs, encoding.topk_grid),
    }
    if topk.reference_logprobs is not None and topk.reference_tail_logprobs is not None:
        arrays["reference_logprobs"] = _stored(topk.reference_logprobs, encoding.topk_grid)
        arrays["reference_tail_logprobs"] = _stored(topk.reference_tail_logprobs, encoding.topk_grid)
    return pack(arrays, topk_arrays(encoding))


def rollouts_file(columns: dict[str, Any]) -> bytes:
    """The bytes of NNNNN.rollouts.parquet; one row per rollout, for people and viewers."""
    sink = io.BytesIO()
    table = pa.table(columns)
    table = table.cast(pa.schema([field.with_nullable(field.name not in LENGTHS) for field in table.schema]))
    others = [name for name in table.column_names if name not in LENGTHS]
    codecs = {name: "zstd" if name in others else "none" for name in table.column_names}
    pq.write_table(table, sink, compression=codecs, use_dictionary=others, write_statistics=False, row_group_size=1024)
    return sink.getvalue()


def read_part(tokens: bytes, topk: bytes | None, encoding: Encoding, counts: Counts, *, where: str) -> Part:
    """Decode a part from the bytes of its files; raises ArtifactError where they are not what the format allows."""
    lengths = array_lengths(counts)
    group = Group(tokens, tokens_arrays(encoding), where=f"{where}.tokens.zarr.zip", lengths=lengths["tokens"])
    part = Part(
        rollout_offsets=group.read("rollout_offsets"),
        prompt_lengths=group.read("prompt_lengths"),
        token_ids=group.read("token_ids"),
        loss_mask=group.read("loss_mask"),
        sampled_logprobs=_logprobs(group, "sampled_logprobs", encoding.sampled_grid),
        reference_logprobs=_logprobs(group, "reference_logprobs", encoding.sampled_grid)
        if "reference_logprobs" in group.lengths
        else None,
        topk=None,
    )
    check_borders(part.rollout_offsets, part.prompt_lengths, counts, where=group.where)
    if topk is None:
        return part
    group = Group(topk, topk_arrays(encoding), where=f"{where}.topk.zarr.zip", lengths=lengths["topk"])
    return replace(part, topk=_read_topk(group, encoding, part.response_ids))


def _read_topk(group: Group, encoding: Encoding, response_ids: npt.NDArray[np.uint32]) -> TopK:
    counts = group.read("counts")
    entries = int(counts.sum(dtype=np.int64))
    if entries != group.lengths["ids"]:
        raise ArtifactError(
            f"`{group.where}`: `counts` do not add up to the entries",
            code="A043",
            expected=group.lengths["ids"],
            actual=entries,
        )
    ids = np.empty(entries, np.uint32)
    decoder = IdDecoder(group.read("id_table"), counts, response_ids)
    for piece, rows in group.chunks("ids"):
        decoder.decode(piece.start, rows, ids[piece])
    floats = {name: _logprobs(group, name, encoding.topk_grid) for name in group.lengths if name.endswith("logprobs")}
    return TopK(counts=counts, ids=ids, **floats)


def _logprobs(group: Group, name: str, grid: Grid | None) -> Floats:
    if grid is None:
        return group.read(name)
    values = np.empty(group.lengths[name], np.float32)
    for piece, codes in group.chunks(name):
        lookup(grid.levels, codes, out=values[piece])
    return values


def check_borders(
    rollout_offsets: npt.NDArray[np.int64], prompt_lengths: npt.NDArray[np.int32], counts: Counts, *, where: str
) -> None:
    """Raise ArtifactError unless offsets and lengths cut the tokens into rollouts, and these into halves."""
    lengths = np.diff(rollout_offsets)
    falls = (rollout_offsets[1:] < rollout_offsets[:-1]).any()  # differences of 64 bits may overflow
    if rollout_offsets[0] != 0 or rollout_offsets[-1] != counts.tokens or falls:
        raise ArtifactError(
            f"`{where}`: `rollout_offsets` do not run from 0 to the number of tokens",
            code="A041",
            expected=counts.tokens,
            actual=int(rollout_offsets[-1]),
        )
    prompts = prompt_lengths.astype(np.int64)
    if (wrong := np.flatnonzero((prompts < 1) | (prompts > lengths))).size:
        row = int(wrong[0])
        raise ArtifactError(
            f"`{where}`: rollout {row}: the prompt does not fit",
            code="A042",
            expected=f"1 to {lengths[row]}",
            actual=int(prompts[row]),
        )
    if int((lengths - prompts).sum()) != counts.positions:
        raise ArtifactError(f"`{where}`: positions are not the response tokens", code="A042", expected=counts.positions)


def _stored(logprobs: Floats, grid: Grid | None) -> npt.NDArray[Any]:
    return logprobs if grid is None else grid.to_codes(logprobs)
