"""What `select` and `sort_entries` promise for any distribution."""

from __future__ import annotations

from random import Random

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from lopd_store.topk import TopK, concatenate, select, sort_entries
from tests.property.distributions import Floats, scored, topks

Scored = tuple[Floats, npt.NDArray[np.uint32], npt.NDArray[np.float32], npt.NDArray[np.float32]]
COVERAGES = st.one_of(st.sampled_from([0.9, 0.99, 1.0]), st.floats(0.01, 1.0))


def rows(topk: TopK) -> list[list[tuple[int, float]]]:
    """The (id, log-prob) entries of each position."""
    pairs = list(zip(topk.ids.tolist(), topk.logprobs.tolist(), strict=True))
    return [pairs[start:stop] for start, stop in zip(topk.offsets[:-1], topk.offsets[1:], strict=True)]


@given(scored(), st.integers(1, 13), COVERAGES)
def test_entries_stand_by_logprob_descending_then_id_ascending(given: Scored, k_min: int, coverage: float) -> None:
    topk = select(*given[1:], k_min=k_min, coverage=coverage)
    assert all(row == sorted(row, key=lambda entry: (-entry[1], entry[0])) for row in rows(topk))


@given(scored(), st.integers(1, 13), COVERAGES)
def test_k_is_the_smallest_whose_mass_reaches_the_coverage(given: Scored, k_min: int, coverage: float) -> None:
    _, _, logprobs, _ = given
    topk = select(*given[1:], k_min=k_min, coverage=coverage)
    for count, row in zip(topk.counts.tolist(), logprobs, strict=True):
        possible = sorted((value for value in row.tolist() if value > -np.inf), reverse=True)
        reaches = [k for k in range(1, len(possible) + 1) if np.cumsum(np.exp(possible[:k]))[-1] >= coverage]
        least = min(k_min, len(possible))
        wanted = len(possible) if coverage == 1 or not reaches else max(reaches[0], least)
        assert count == wanted


@given(scored(), st.integers(1, 13), COVERAGES)
def test_kept_entries_and_tail_sum_to_one(given: Scored, k_min: int, coverage: float) -> None:
    topk = select(*given[1:], k_min=k_min, coverage=coverage)
    kept = [sum(np.exp(np.float64(logprob)) for _, logprob in row) for row in rows(topk)]
    np.testing.assert_allclose(kept + np.exp(topk.tail_logprobs.astype(np.float64)), 1, atol=1e-5)


@given(scored(), st.integers(1, 13), COVERAGES)
def test_the_tail_is_the_log_of_all_mass_that_is_not_kept(given: Scored, k_min: int, coverage: float) -> None:
    topk = select(*given[1:], k_min=k_min, coverage=coverage)
    for row, logprobs, found in zip(rows(topk), given[0], topk.tail_logprobs.tolist(), strict=True):
        rest = np.delete(logprobs, [id for id, _ in row])
        wanted = np.logaddexp.reduce(rest) if len(rest) else -np.inf
        np.testing.assert_allclose(found, min(wanted, 0), atol=1e-5, rtol=1e-6)


@given(scored(), st.integers(1, 13), COVERAGES)
def test_an_impossible_token_is_never_kept(given: Scored, k_min: int, coverage: float) -> None:
    topk = select(*given[1:], k_min=k_min, coverage=coverage)
    assert np.isfinite(topk.logprobs).all() and (topk.counts >= 1).all()


@given(scored())
def test_coverage_one_keeps_every_possible_column_and_the_tail_to_the_bit(given: Scored) -> None:
    _, _, logprobs, tails = given
    topk = select(*given[1:], k_min=1, coverage=1.0)
    np.testing.assert_array_equal(topk.counts, np.isfinite(logprobs).sum(axis=1))
    np.testing.assert_array_equal(topk.tail_logprobs, tails)


@given(scored(), st.randoms(use_true_random=False))
def test_the_order_of_the_columns_changes_nothing(given: Scored, random: Random) -> None:
    _, ids, logprobs, tails = given
    shuffled = list(range(ids.shape[1]))
    random.shuffle(shuffled)
    one = select(ids, logprobs, tails, k_min=1, coverage=0.9)
    other = select(ids[:, shuffled], logprobs[:, shuffled], tails, k_min=1, coverage=0.9)
    assert rows(one) == rows(other)


@given(topks(), st.randoms(use_true_random=False))
def test_sorting_restores_the_order_within_each_position(topk: TopK, random: Random) -> None:
    order: list[int] = []
    for start, stop in zip(topk.offsets[:-1].tolist(), topk.offsets[1:].tolist(), strict=True):
        piece = list(range(start, stop))
        random.shuffle(piece)
        order += piece
    index = np.array(order, np.int64)
    shuffled = TopK(
        counts=topk.counts, ids=topk.ids[index], logprobs=topk.logprobs[index], tail_logprobs=topk.tail_logprobs
    )
    assert rows(sort_entries(shuffled)) == rows(topk)


@given(st.lists(topks(), max_size=4))
def test_slicing_a_concatenation_gives_the_pieces_back(pieces: list[TopK]) -> None:
    whole, start = concatenate(pieces), 0
    for piece in pieces:
        found = whole.slice(start, start + len(piece.counts))
        assert rows(found) == rows(piece)
        np.testing.assert_array_equal(found.tail_logprobs, piece.tail_logprobs)
        start += len(piece.counts)
    assert start == len(whole.counts)
