"""What an export needs to know of a format: its columns, made of whole parts at a time, and nothing of files.

A rollout is a row in every format. No loop runs over tokens in Python: flat arrays become lists by their offsets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lopd_store.errors import InputError
from lopd_store.part import Part
from lopd_store.reader import Artifact
from lopd_store.topk import TopK

Format = Literal["trl", "lightning-opd", "distillkit", "axolotl"]
Keep = npt.NDArray[np.bool_]
IGNORED = -100  # the label of a token that takes no part in a loss
# The log-prob of an entry that is not stored: its probability is 0 in float32, and 0 times it is 0, not NaN.
NOTHING = -1e4


@dataclass(frozen=True, kw_only=True)
class Target:
    """One format, set up for one artifact."""

    schema: pa.Schema
    columns: Callable[[Part], list[pa.Array]]  # in the order of the schema, a row per rollout
    bytes_per_token: int  # about what a token takes in memory on its way
    keep: Callable[[Part, int], Keep] | None = None  # which rollouts it can hold; the int is the first one's number
    zeros: str | None = None  # what it makes of a loss mask with zeros, where that is wrong
    files: Mapping[str, bytes] | None = None  # beside the data, where the format is a directory
    settings: Mapping[str, Any] = field(default_factory=dict)  # for the record of the export


def require_topk(artifact: Artifact) -> None:
    """Raise InputError where a copy has no top-k files."""
    if not artifact.view.has_topk:
        raise InputError(
            f"`{artifact.place}` is a copy without top-k",
            hint="pull the whole artifact, or export `trl` or `lightning-opd`, which need none",
        )


def fixed_k(artifact: Artifact, k: int | None) -> int:
    """The number of entries of every row: as many as any position can have, or fewer where that is asked for."""
    most = min(artifact.manifest.encoding.most_entries, artifact.manifest.inputs[0].teacher.vocab_size)
    if k is not None and not 1 <= k <= most:
        raise InputError("`k` is out of range", expected=f"1 to {most}, which is what positions have", actual=k)
    return k or most


def lists(values: npt.NDArray[Any], offsets: npt.NDArray[np.int64]) -> pa.ListArray:
    """A list for each pair of neighbouring offsets."""
    return nested(pa.array(values), offsets)


def nested(values: pa.Array, offsets: npt.NDArray[np.int64]) -> pa.ListArray:
    """The same of an Arrow array, whose elements may be lists."""
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)


def rows_of(matrix: npt.NDArray[Any]) -> pa.ListArray:
    """A list for each row of a matrix."""
    count, width = matrix.shape
    return lists(matrix.reshape(-1), np.arange(count + 1) * width)


def prompt_ids(part: Part, is_response: Keep) -> pa.ListArray:
    """The prompt of each rollout."""
    offsets = np.zeros(len(part.prompt_lengths) + 1, np.int64)
    np.cumsum(part.prompt_lengths, out=offsets[1:])
    return lists(part.token_ids[~is_response], offsets)


def fixed_rows(topk: TopK, k: int) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.float32], Keep]:
    """Ids and log-probs with k entries at each position, and which of them are stored; [positions, k] each.

    The stored entries come first, in their order. Of a position with more the first k stay. One with fewer is filled up
    with the lowest ids that it does not have, at `NOTHING`: no id twice, so that a scatter into a vocabulary is safe.
    """
    if int(topk.counts.max(initial=0)) > k:
        topk = topk.truncate(k)
    positions = topk.positions
    places = positions, np.arange(len(topk.ids)) - np.repeat(topk.offsets[:-1], topk.counts)
    ids = np.empty((len(topk.counts), k), np.uint32)
    logprobs = np.full(ids.shape, NOTHING, np.float32)
    stored, free = np.zeros(ids.shape, np.bool_), np.ones(ids.shape, np.bool_)
    is_low = topk.ids < k
    free[positions[is_low], topk.ids[is_low]] = False
    columns = np.cumsum(free, axis=1, dtype=np.int32) - 1 + topk.counts[:, None].astype(np.int32)
    fills = free & (columns < k)
    ids[np.nonzero(fills)[0], columns[fills]] = np.nonzero(fills)[1]
    ids[places], logprobs[places], stored[places] = topk.ids, topk.logprobs, True
    return ids, logprobs, stored
