"""From records to tensors on a device: micro-batches, packed.

    for records in micro_batches(chosen, max_tokens=8192):
        batch = collate(records, "cuda")

A record carries token ids and teacher values together, so nothing can be cut or shuffled apart.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lopd_store import topk
from lopd_store.topk import TopK
from lopd_train.losses import Categories


@dataclass(frozen=True, kw_only=True)
class Record:
    """One rollout and what the teacher said of it; row j of everything per position speaks of response token j."""

    row: int  # in the artifact or file
    token_ids: npt.NDArray[np.uint32]  # [tokens], prompt and response
    prompt_length: int
    loss_mask: npt.NDArray[np.bool_]  # [positions]
    sampled_logprobs: npt.NDArray[np.float32] | None = None  # [positions], the teacher's
    reference_logprobs: npt.NDArray[np.float32] | None = None  # [positions], of the reference policy
    topk: TopK | None = None

    @cached_property
    def positions(self) -> int:
        """How many positions count in the loss."""
        return int(np.count_nonzero(self.loss_mask))

    @property
    def prompt(self) -> bytes:
        """The prompt's token ids, as a key."""
        return self.token_ids[: self.prompt_length].tobytes()


@dataclass(frozen=True, kw_only=True)
class BatchTopK:
    """The distributions that are stored at the positions of a batch, flat."""

    offsets: npt.NDArray[np.int64]  # [positions + 1], where each position's entries begin
    ids: Tensor  # [entries]
    teacher: Categories
    reference: Categories | None  # the reference policy's at the same ids

    def slice(self, start: int, stop: int) -> BatchTopK:
        """Positions [start, stop), counted from 0 again."""
        entries = slice(int(self.offsets[start]), int(self.offsets[stop]))

        def cut(stored: Categories) -> Categories:
            tail, positions = stored.tail[start:stop], stored.positions[entries] - start
            return Categories(logprobs=stored.logprobs[entries], tail=tail, positions=positions)

        return BatchTopK(
            offsets=self.offsets[start : stop + 1] - self.offsets[start],
            ids=self.ids[entries],
            teacher=cut(self.teacher),
            reference=None if self.reference is None else cut(self.reference),
        )


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some rollouts end to end, as tensors; positions are those of all of them that the loss mask includes."""

    rows: tuple[int, ...]
    input_ids: Tensor  # [1, tokens]
    borders: Tensor  # [rollouts + 1], int32, on the CPU: where each rollout begins in input_ids
    sources: Tensor  # [positions], the index in input_ids of the token before each target
    targets: Tensor  # [positions], token ids
    rollouts: Tensor  # [positions], which of `rows` each belongs to
    sampled_logprobs: Tensor | None  # [positions]
    reference_logprobs: Tensor | None  # [positions]
    topk: BatchTopK | None

    def slice(self, start: int, stop: int) -> Batch:
        """The same rollouts, and of their positions those in [start, stop)."""
        names = ("sources", "targets", "rollouts", "sampled_logprobs", "reference_logprobs")
        cut = {name: values[start:stop] for name in names if (values := getattr(self, name)) is not None}
        return replace(self, **cut, topk=self.topk and self.topk.slice(start, stop))


def micro_batches(records: Sequence[Record], *, max_tokens: int, share: int = 1) -> list[list[Record]]:
    """Cut rollouts into micro-batches of about equal length: at most `max_tokens` tokens each, or a single rollout.

    There is a multiple of `share` of them, or one for each rollout.
    """
    longest_first = sorted(records, key=lambda record: -len(record.token_ids))
    count = -(-sum(len(record.token_ids) for record in records) // max_tokens)
    while True:
        count = min(-(-count // share) * share, len(records))
        cut: list[list[Record]] = [[] for _ in range(count)]
        fill = [(0, index) for index in range(count)]  # a heap: the emptiest takes the next
        for record in longest_first:
            tokens, index = fill[0]
            heapq.heapreplace(fill, (tokens + len(record.token_ids), index))
            cut[index].append(record)
        if all(tokens <= max_tokens or len(cut[index]) == 1 for tokens, index in fill):
            return cut
        count += 1


def collate(records: Sequence[Record], device: str) -> Batch:
    """Records as one batch. Here, once, the targets are chosen and shifted against the states that predict them."""
    borders = np.cumsum([0, *(len(record.token_ids) for record in records)])
    places = [record.prompt_length + np.flatnonzero(record.loss_mask) for record in records]
    targets = [record.token_ids[some] for record, some in zip(records, places, strict=True)]
    # A token is predicted by the state of the one before it.
    sources = [start + some - 1 for start, some in zip(borders[:-1], places, strict=True)]

    def tensor(pieces: Sequence[npt.NDArray[Any]], dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(np.concatenate(pieces)).to(device=device, dtype=dtype)

    def stored(name: str) -> Tensor | None:
        pieces = [getattr(record, name) for record in records]
        if any(piece is None for piece in pieces):
            return None
        return tensor([piece[record.loss_mask] for piece, record in zip(pieces, records, strict=True)], torch.float32)

    kept = [record.topk.mask(record.loss_mask) for record in records if record.topk is not None]
    return Batch(
        rows=tuple(record.row for record in records),
        input_ids=tensor([record.token_ids for record in records], torch.int64)[None],
        borders=torch.from_numpy(borders.astype(np.int32)),
        sources=tensor(sources, torch.int64),
        targets=tensor(targets, torch.int64),
        rollouts=tensor([np.full(len(some), index) for index, some in enumerate(targets)], torch.int64),
        sampled_logprobs=stored("sampled_logprobs"),
        reference_logprobs=stored("reference_logprobs"),
        topk=_batch_topk(topk.concatenate(kept), device) if kept else None,
    )


def _batch_topk(stored: TopK, device: str) -> BatchTopK:
    positions = torch.from_numpy(stored.positions).to(device)

    def categories(logprobs: npt.NDArray[np.float32], tail: npt.NDArray[np.float32]) -> Categories:
        entries, outside = (torch.from_numpy(values).to(device) for values in (logprobs, tail))
        return Categories(logprobs=entries, tail=outside, positions=positions).normalised()

    reference, reference_tail = stored.reference_logprobs, stored.reference_tail_logprobs
    return BatchTopK(
        offsets=stored.offsets,
        ids=torch.from_numpy(stored.ids.astype(np.int64)).to(device),
        teacher=categories(stored.logprobs, stored.tail_logprobs),
        reference=None if reference is None or reference_tail is None else categories(reference, reference_tail),
    )
