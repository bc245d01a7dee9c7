"""From the likeliest ids that an engine lists to scores: what vllm and http share.

Such an engine says nothing of the other ids. The mass outside is what the known ones leave of 1, in float64, held
between what is known and what is possible: the known ids that are not kept, and the others each as likely as the last
one listed. It is as good as the float32 log-probs that it is taken from, about 1e-6 of mass; the entropy is not known.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lopd_store.errors import DataError
from lopd_store.rollouts import Rollout
from lopd_store.teachers import RolloutScores
from lopd_store.topk import Candidates, Floats

Ids = npt.NDArray[np.int64]
_SPARE = 8  # ids listed beyond k, for ties at the border
_SPARE_PADDING = 24  # and where the head is padded; what no training has touched is seldom likely


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The likeliest ids of one model at the positions of a rollout, by log-prob descending, then id ascending.

    Ids that the tokenizer does not know stand behind all others.
    """

    response_ids: Ids  # [positions]
    ids: Ids  # [positions, columns]
    logprobs: Floats  # [positions, columns]
    sampled_logprobs: Floats  # [positions]
    output_width: int

    def tail_logprobs(self, ids: Ids, logprobs: Floats, kept: npt.NDArray[np.bool_]) -> Floats:
        """Log of the mass outside the kept ids, given all known ones; each [positions, columns], an id of -1 is none.

        The known ones are those listed, and others that are less likely.
        """
        mass = np.exp(logprobs.astype(np.float64))
        is_known = (ids == self.response_ids[:, None]).any(axis=1)
        least = np.where(kept, 0, mass).sum(axis=1)
        least += np.where(is_known, 0, np.exp(self.sampled_logprobs.astype(np.float64)))
        last = np.exp(self.logprobs.astype(np.float64)).min(axis=1, initial=1)
        most = least + (self.output_width - (ids >= 0).sum(axis=1)) * last
        outside = np.clip(1 - np.where(kept, mass, 0).sum(axis=1), least, most)
        with np.errstate(divide="ignore"):
            tail: Floats = np.minimum(np.log(outside), 0).astype(np.float32)
        return tail


def listed(k: int, *, vocab_size: int, output_width: int) -> int:
    """How many ids to ask an engine for, so that k can be kept."""
    padding = output_width - vocab_size
    return min(min(k, vocab_size) + _SPARE + min(padding, _SPARE_PADDING), output_width)


def to_listing(
    rollout: Rollout,
    ids: Ids,  # [positions, columns]: the likeliest, each once, in any order
    logprobs: Floats,  # [positions, columns]
    sampled_logprobs: Floats,  # [positions]
    *,
    k: int,
    vocab_size: int,
    output_width: int,
) -> Listing:
    """What an engine listed, checked and in order.

    Raises DataError where too many of the ids are padding of the head for k to be left.
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
    if positions and int(known.sum(axis=1).min()) < k:
        raise DataError(
            "the engine listed too many ids that the tokenizer does not know",
            expected=f"{k} ids below {vocab_size} at every position",
            actual=int(known.sum(axis=1).min()),
            hint="build with the transformers engine",
        )
    return Listing(
        response_ids=rollout.response_ids.astype(np.int64),
        ids=np.take_along_axis(ids, order, axis=-1),
        logprobs=np.minimum(np.take_along_axis(logprobs, order, axis=-1), 0),
        sampled_logprobs=np.minimum(sampled_logprobs, 0).astype(np.float32),
        output_width=output_width,
    )


def to_scores(listing: Listing, k: int) -> RolloutScores:
    """Scores of one rollout by one model: the k likeliest ids of each position."""
    kept = np.broadcast_to(np.arange(listing.ids.shape[1]) < k, listing.ids.shape)
    return RolloutScores(
        sampled_logprobs=listing.sampled_logprobs,
        candidates=Candidates(
            ids=listing.ids[:, :k].astype(np.uint32),
            logprobs=listing.logprobs[:, :k],
            tail_logprobs=listing.tail_logprobs(listing.ids, listing.logprobs, kept),
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
