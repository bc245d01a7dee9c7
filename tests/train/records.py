"""Small records made by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lopd_store.topk import TopK
from lopd_train.batches import Record


def record(
    prompt: Sequence[int],
    response: Sequence[int],
    *,
    row: int = 0,
    mask: Sequence[bool] | None = None,
    sampled_logprobs: Sequence[float] | None = None,
    topk: TopK | None = None,
) -> Record:
    """A rollout; every position counts unless a mask says otherwise."""
    return Record(
        row=row,
        token_ids=np.array([*prompt, *response], np.uint32),
        prompt_length=len(prompt),
        loss_mask=np.ones(len(response), np.bool_) if mask is None else np.array(mask, np.bool_),
        sampled_logprobs=None if sampled_logprobs is None else np.array(sampled_logprobs, np.float32),
        topk=topk,
    )


def ragged_topk(rows: Sequence[Sequence[tuple[int, float]]], tails: Sequence[float]) -> TopK:
    """A TopK from (id, log-prob) pairs per position."""
    return TopK(
        counts=np.array([len(row) for row in rows], np.uint16),
        ids=np.array([id for row in rows for id, _ in row], np.uint32),
        logprobs=np.array([logprob for row in rows for _, logprob in row], np.float32),
        tail_logprobs=np.array(tails, np.float32),
    )
