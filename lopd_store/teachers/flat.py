"""From the k most likely ids that an engine lists to scores: what vllm and http share.

Such an engine says nothing of the other ids. The mass outside is what the listed ones leave of 1, in float64, held
between what is known and what is possible: the listed ids that are not kept, and the others each as likely as the last
one listed. It is as good as the float32 log-probs that it is taken from, about 1e-6 of mass; the entropy is not known.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from lopd_store.errors import DataError
from lopd_store.rollouts import Rollout
from lopd_store.teachers import RolloutScores
from lopd_store.topk import Candidates

_SPARE = 8  # ids listed beyond k, for ties at the border
_SPARE_PADDING = 24  # and where the head is padded; what no training has touched is seldom likely


def listed(k: int, *, vocab_size: int, output_width: int) -> int:
    """How many ids to ask an engine for, so that k can be kept."""
    padding = output_width - vocab_size
    return min(min(k, vocab_size) + _SPARE + min(padding, _SPARE_PADDING), output_width)


def to_scores(
    rollout: Rollout,
    ids: npt.NDArray[np.int64],  # [positions, columns]: the likeliest, each once, in any order
    logprobs: npt.NDArray[np.float32],  # [positions, columns]
    sampled_logprobs: npt.NDArray[np.float32],  # [positions]
    *,
    k: int,
    vocab_size: int,
    output_width: int,
) -> RolloutScores:
    """Scores of one rollout from the likeliest ids of each position.

    Raises DataError where too many of them are padding of the head for k to be left.
    """
    positions = len(rollout.response_ids)
    if ids.shape != logprobs.shape or len(ids) != positions or sampled_logprobs.shape != (positions,):
        raise DataError(
            "the engine gave another number of rows than there are positions",
            expected=positions,
            actual=f"{len(ids)} rows, {len(sampled_logprobs)} log-probs of the response",
        )
    if float(logprobs.max(initial=-np.inf)) > 1e-3:
        raise DataError(
            "the engine gave log-probs above 0",
            expected="raw log-probs",
            actual=f"{logprobs.max():.3g}",
            hint="run vLLM with `--logprobs-mode raw_logprobs`",
        )
    k = min(k, vocab_size)
    known = ids < vocab_size
    order = np.lexsort((ids, np.where(known, -logprobs, np.inf)), axis=-1)
    ids, known = np.take_along_axis(ids, order, axis=-1), np.take_along_axis(known, order, axis=-1)
    logprobs = np.take_along_axis(logprobs, order, axis=-1)
    if positions and not known[:, :k].all():
        raise DataError(
            "the engine listed too many ids that the tokenizer does not know",
            expected=f"{k} ids below {vocab_size} at every position",
            actual=int(known.sum(axis=1).min()),
            hint="build with the transformers engine",
        )
    is_sampled = ids == rollout.response_ids.astype(np.int64)[:, None]
    mass = np.exp(logprobs.astype(np.float64))
    unlisted = np.where(is_sampled.any(axis=1), 0, np.exp(sampled_logprobs.astype(np.float64)))
    least = mass[:, k:].sum(axis=1) + unlisted
    most = least + (output_width - ids.shape[1]) * mass.min(axis=1, initial=1)
    outside = np.clip(1 - mass[:, :k].sum(axis=1), least, most)
    with np.errstate(divide="ignore"):
        tail = np.log(outside).astype(np.float32)
    return RolloutScores(
        sampled_logprobs=np.minimum(sampled_logprobs, 0).astype(np.float32),
        candidates=Candidates(
            ids=ids[:, :k].astype(np.uint32), logprobs=np.minimum(logprobs[:, :k], 0), tail_logprobs=np.minimum(tail, 0)
        ),
        entropies=None,
    )


def groups(rollouts: Sequence[Rollout], tokens: int) -> Iterator[range]:
    """Rows of rollouts to hand to an engine at a time: of `tokens` tokens together, or one longer one."""
    start, held = 0, 0
    for row, rollout in enumerate(rollouts):
        length = len(rollout.prompt_ids) + len(rollout.response_ids)
        if row > start and held + length > tokens:
            yield range(start, row)
            start, held = row, 0
        held += length
    if start < len(rollouts):
        yield range(start, len(rollouts))
