"""TRL, and whoever else takes a plain table: ids, the teacher's log-probs and its ragged top-k, one row per rollout.

TRL has no format of its own for stored log-probs; these columns are what a loss needs. k varies from position to
position; the tail says how much mass its entries leave.
"""

from __future__ import annotations

import pyarrow as pa

from lopd_store.interop.target import Target, lists, nested, prompt_ids
from lopd_store.part import Part, response_mask
from lopd_store.reader import Artifact

_IDS, _LOGPROBS = pa.list_(pa.uint32()), pa.list_(pa.float32())


def target(artifact: Artifact) -> Target:
    """Columns with what this artifact, or this copy of a part of it, has."""
    fields = [
        ("prompt_ids", _IDS),
        ("completion_ids", _IDS),
        ("loss_mask", pa.list_(pa.bool_())),
        ("teacher_sampled_logprobs", _LOGPROBS),
    ]
    if artifact.manifest.reference_logprobs:
        fields.append(("reference_sampled_logprobs", _LOGPROBS))
    if artifact.view.has_topk:
        fields += [
            ("teacher_topk_ids", pa.list_(_IDS)),
            ("teacher_topk_logprobs", pa.list_(_LOGPROBS)),
            ("teacher_tail_logprobs", _LOGPROBS),
        ]
    return Target(
        schema=pa.schema(fields), columns=_columns, bytes_per_token=8 * artifact.manifest.encoding.most_entries
    )


def _columns(part: Part) -> list[pa.Array]:
    is_response, offsets = response_mask(part.rollout_offsets, part.prompt_lengths), part.position_offsets
    columns = [
        prompt_ids(part, is_response),
        lists(part.token_ids[is_response], offsets),
        lists(part.loss_mask, offsets),
        lists(part.sampled_logprobs, offsets),
    ]
    if part.reference_logprobs is not None:
        columns.append(lists(part.reference_logprobs, offsets))
    if (topk := part.topk) is not None:
        columns += [
            nested(lists(topk.ids, topk.offsets), offsets),
            nested(lists(topk.logprobs, topk.offsets), offsets),
            lists(topk.tail_logprobs, offsets),
        ]
    return columns
