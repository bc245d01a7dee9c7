"""The teacher beside the reference policy, where an engine only lists likely ids: what both find likely, by both.

Each model lists its likeliest ids. What one of them chooses and the other has not listed is asked for by name:

    union = Union(of_teacher, of_reference, k=64, k_min=1, coverage=0.99)
    union.asked      # (position, id) pairs to put to the teacher, and to the reference policy
    union.scores(answers)

Only ids that will be stored are asked for, so the engine is told how they are chosen. At most positions each model has
listed what the other chooses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from lopd_store.teachers import RolloutScores
from lopd_store.teachers.flat import Ids, Listing
from lopd_store.topk import Candidates, Floats, chosen

MOST_IDS = 128  # that vLLM gives the log-probs of at a time
WIDER = 2  # times as many ids as without a reference policy are listed: asking by name costs far more


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How many ids of each model are kept: the smallest number whose mass reaches `coverage`, and `k_min` at least."""

    k_min: int = 1
    coverage: float = 1.0


class Union:
    """Two listings of one rollout, and what each still lacks of the other."""

    asked: tuple[Ids, ...]  # [asked, 2]: position and id, positions ascending; of the teacher, of the reference policy

    def __init__(self, teacher: Listing, reference: Listing, *, k: int, choice: Choice) -> None:
        self._listings = (teacher, reference)
        first, second = (_chosen(listing, k, choice) for listing in self._listings)
        second[~np.isnan(_find(first, np.zeros(first.shape, np.float32), second))] = -1  # chosen by both, stands once
        self._ids = np.concatenate([first, second], axis=1)  # [positions, columns], -1 where there is none
        self._known = [_find(one.ids, one.logprobs, self._ids) for one in self._listings]
        self._lacks = [np.isnan(known) & (self._ids >= 0) for known in self._known]
        self.asked = tuple(np.stack([np.nonzero(lack)[0], self._ids[lack]], axis=1) for lack in self._lacks)

    def scores(self, answers: Sequence[Floats]) -> RolloutScores:
        """The scores, given the log-probs of what was asked for, of each model."""
        (logprobs, tail), (reference, reference_tail) = (
            self._complete(index, answer) for index, answer in enumerate(answers)
        )
        return RolloutScores(
            sampled_logprobs=self._listings[0].sampled_logprobs,
            candidates=Candidates(
                ids=self._ids.clip(min=0).astype(np.uint32),
                logprobs=logprobs,
                tail_logprobs=tail,
                reference_logprobs=reference,
                reference_tail_logprobs=reference_tail,
            ),
            entropies=None,
            reference_sampled_logprobs=self._listings[1].sampled_logprobs,
        )

    def _complete(self, index: int, answer: Floats) -> tuple[Floats, Floats]:
        """The log-probs of one model for all ids, -inf where there is none, and its tail."""
        listing, lacks, logprobs = self._listings[index], self._lacks[index], self._known[index].copy()
        logprobs[lacks] = np.minimum(answer, 0)
        logprobs[self._ids < 0] = -np.inf
        more = np.where(lacks, self._ids, -1)
        kept = ~np.isnan(_find(self._ids, logprobs, listing.ids))
        tail = listing.tail_logprobs(
            np.concatenate([listing.ids, more], axis=1),
            np.concatenate([listing.logprobs, np.where(lacks, logprobs, -np.inf)], axis=1).astype(np.float32),
            np.concatenate([kept, lacks], axis=1),
        )
        return logprobs, tail


def questions(asked: Ids) -> Iterator[tuple[slice, int, list[int]]]:
    """The asked ids by position, at most `MOST_IDS` at a time: where they stand, the position, the ids."""
    borders = [0, *(np.flatnonzero(np.diff(asked[:, 0])) + 1).tolist(), len(asked)]
    for begin, end in pairwise(borders):
        for start in range(begin, end, MOST_IDS):
            some = slice(start, min(start + MOST_IDS, end))
            yield some, int(asked[start, 0]), asked[some, 1].tolist()


def _chosen(listing: Listing, k: int, choice: Choice) -> Ids:
    """The ids that a model chooses, -1 elsewhere; [positions, k]."""
    kept = chosen(listing.logprobs[:, :k], k_min=choice.k_min, k_max=k, coverage=choice.coverage)
    return np.where(kept, listing.ids[:, :k], -1)


def _find(
    ids: Ids,  # [positions, columns], each once
    values: Floats,  # [positions, columns]
    wanted: Ids,  # [positions, others]; -1 is not found
) -> npt.NDArray[np.float32]:
    """The value of each wanted id at its position, NaN where the position lacks it; [positions, others]."""
    found = np.full(wanted.shape, np.nan, np.float32)
    if ids.size and wanted.size:
        rows = np.arange(len(ids))[:, None] << 32
        keys, asked = (ids + rows).ravel(), wanted + rows
        order = np.argsort(keys)
        at = order[np.searchsorted(keys, asked, sorter=order).clip(max=len(keys) - 1)]
        is_there = (keys[at] == asked) & (wanted >= 0)
        found[is_there] = values.ravel()[at[is_there]]
    return found
