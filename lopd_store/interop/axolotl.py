"""Axolotl's prepared rows for knowledge distillation, to be trained on with `skip_prepare_dataset: true`.

Row i of the targets is the distribution that follows token i; labels stand at the tokens themselves, as the model's own
loss shifts them. Entries that are not stored have the mask 0.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pyarrow as pa

from lopd_store.interop.target import (
    IGNORED,
    NOTHING,
    Target,
    fixed_k,
    fixed_rows,
    lists,
    nested,
    require_topk,
    rows_of,
)
from lopd_store.part import Part, response_mask
from lopd_store.reader import Artifact

_INTEGERS = pa.list_(pa.int32())
SCHEMA = pa.schema(
    [
        ("input_ids", _INTEGERS),
        ("labels", _INTEGERS),
        ("attention_mask", _INTEGERS),
        ("target_token_ids", pa.list_(_INTEGERS)),
        ("target_logprobs", pa.list_(pa.list_(pa.float32()))),
        ("target_mask", pa.list_(_INTEGERS)),
    ]
)


def target(artifact: Artifact, k: int | None) -> Target:
    """The columns, with k entries in every row."""
    require_topk(artifact)
    k = fixed_k(artifact, k)
    return Target(schema=SCHEMA, columns=partial(_columns, k), bytes_per_token=40 * k, settings={"k": k})


def _columns(k: int, part: Part) -> list[pa.Array]:
    assert part.topk is not None
    tokens, offsets = len(part.token_ids), part.rollout_offsets
    targets = np.flatnonzero(response_mask(offsets, part.prompt_lengths))
    ids = np.tile(np.arange(k, dtype=np.int32), (tokens, 1))
    logprobs = np.full((tokens, k), NOTHING, np.float32)
    mask = np.zeros((tokens, k), np.int32)
    ids[targets - 1], logprobs[targets - 1], mask[targets - 1] = fixed_rows(part.topk, k)
    mask[targets[~part.loss_mask] - 1] = 0
    labels = np.full(tokens, IGNORED, np.int32)
    counted = targets[part.loss_mask]
    labels[counted] = part.token_ids[counted]
    return [
        lists(part.token_ids.astype(np.int32), offsets),
        lists(labels, offsets),
        lists(np.ones(tokens, np.int32), offsets),
        *(nested(rows_of(matrix), offsets) for matrix in (ids, logprobs, mask)),
    ]
