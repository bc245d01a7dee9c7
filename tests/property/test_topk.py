"""What `select` and `sort_entries` promise for any distribution."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from random import Random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lopd_store.topk import Candidates, TopK, concatenate, select, sort_entries
from tests.property.distributions import COVERAGES, Floats, scored, scored_by_two, topks, topks_of_two

Scored = tuple[Floats, Candidates]
KS = st.tuples(st.integers(1, 13), st.integers(1, 13)).map(sorted)  # k_min, k_max


def rows(topk: TopK) -> list[list[tuple[int, float]]]:
    """The (id, log-prob) entries of each position."""
    pairs = list(zip(topk.ids.tolist(), topk.logprobs.tolist(), strict=True))
    return [pairs[start:stop] for start, stop in zip(topk.offsets[:-1], topk.offsets[1:], strict=True)]


def kept_of(given: Scored, ks: list[int], coverage: float) -> TopK:
    return select(given[1], k_min=ks[0], k_max=ks[1], coverage=coverage)


@given(scored(), KS, COVERAGES)
def test_entries_stand_by_logprob_descending_then_id_ascending(given: Scored, ks: list[int], coverage: float) -> None:
    topk = kept_of(given, ks, coverage)
    assert all(row == sorted(row, key=lambda entry: (-entry[1], entry[0])) for row in rows(topk))


@given(scored(), KS, COVERAGES)
def test_k_is_the_smallest_whose_mass_reaches_the_coverage(given: Scored, ks: list[int], coverage: float) -> None:
    topk = kept_of(given, ks, coverage)
    for count, row in zip(topk.counts.tolist(), given[1].logprobs, strict=True):
        assert count == smallest_k(row.tolist(), ks[0], ks[1], coverage)


def smallest_k(logprobs: list[float], k_min: int, k_max: int, coverage: float) -> int:
    """Twin: how many of some log-probs one model keeps."""
    possible = sorted((value for value in logprobs if value > -np.inf), reverse=True)
    reaches = [k for k in range(1, len(possible) + 1) if np.cumsum(np.exp(possible[:k]))[-1] >= coverage]
    wanted = k_max if coverage == 1 or not reaches else min(max(reaches[0], k_min), k_max)
    return min(wanted, len(possible))


@given(scored(), KS, COVERAGES)
def test_kept_entries_and_tail_sum_to_one(given: Scored, ks: list[int], coverage: float) -> None:
    topk = kept_of(given, ks, coverage)
    kept = [sum(np.exp(np.float64(logprob)) for _, logprob in row) for row in rows(topk)]
    np.testing.assert_allclose(kept + np.exp(topk.tail_logprobs.astype(np.float64)), 1, atol=1e-5)


@given(scored(), KS, COVERAGES)
def test_the_tail_is_the_log_of_all_mass_that_is_not_kept(given: Scored, ks: list[int], coverage: float) -> None:
    topk = kept_of(given, ks, coverage)
    for row, logprobs, found in zip(rows(topk), given[0], topk.tail_logprobs.tolist(), strict=True):
        assert_tail(found, logprobs, [id for id, _ in row])


def assert_tail(found: float, logprobs: Floats, kept: list[int]) -> None:
    rest = np.delete(logprobs, kept)
    wanted = np.logaddexp.reduce(rest) if len(rest) else -np.inf
    np.testing.assert_allclose(found, min(wanted, 0), atol=1e-5, rtol=1e-6)


@given(scored(), KS, COVERAGES)
def test_an_impossible_token_is_never_kept(given: Scored, ks: list[int], coverage: float) -> None:
    topk = kept_of(given, ks, coverage)
    assert np.isfinite(topk.logprobs).all() and (topk.counts >= 1).all()


@given(scored())
def test_coverage_one_and_room_keep_every_possible_column_and_the_tail_to_the_bit(given: Scored) -> None:
    candidates = given[1]
    topk = kept_of(given, [1, 12], 1.0)
    np.testing.assert_array_equal(topk.counts, np.isfinite(candidates.logprobs).sum(axis=1))
    np.testing.assert_array_equal(topk.tail_logprobs, candidates.tail_logprobs)


@given(scored(), st.randoms(use_true_random=False))
def test_the_order_of_the_columns_changes_nothing(given: Scored, random: Random) -> None:
    candidates = given[1]
    shuffled = list(range(candidates.ids.shape[1]))
    random.shuffle(shuffled)
    other = Candidates(
        ids=candidates.ids[:, shuffled],
        logprobs=candidates.logprobs[:, shuffled],
        tail_logprobs=candidates.tail_logprobs,
    )
    one = select(candidates, k_min=1, k_max=9, coverage=0.9)
    assert rows(one) == rows(select(other, k_min=1, k_max=9, coverage=0.9))


# With a reference policy


def kept_by(logprobs: Floats, k_min: int, k_max: int, coverage: float) -> set[int]:
    """Twin: the ids that one model keeps of one position."""
    row = logprobs.astype(np.float32).tolist()
    count = smallest_k(sorted(row, reverse=True)[:k_max], k_min, k_max, coverage)
    return set(sorted(range(len(row)), key=lambda id: (-row[id], id))[:count])


@given(scored_by_two(), st.integers(1, 12), COVERAGES)
def test_with_a_reference_policy_the_union_of_what_each_keeps_is_kept(
    given: tuple[Floats, Floats, int, Candidates], k_min: int, coverage: float
) -> None:
    teacher, reference, k, candidates = given
    topk = select(candidates, k_min=min(k_min, k), k_max=k, coverage=coverage)
    assert topk.reference_logprobs is not None and topk.reference_tail_logprobs is not None
    for position, row in enumerate(rows(topk)):
        union = {id for model in (teacher, reference) for id in kept_by(model[position], min(k_min, k), k, coverage)}
        possible = {id for id in union if np.float32(teacher[position, id]) > -np.inf}
        wanted = sorted(possible, key=lambda id: (-np.float32(teacher[position, id]), id))
        assert [id for id, _ in row] == wanted
        entries = slice(topk.offsets[position], topk.offsets[position + 1])
        np.testing.assert_array_equal(topk.logprobs[entries], teacher[position, wanted].astype(np.float32))
        np.testing.assert_array_equal(topk.reference_logprobs[entries], reference[position, wanted].astype(np.float32))
        assert_tail(topk.tail_logprobs[position], teacher[position], wanted)
        assert_tail(topk.reference_tail_logprobs[position], reference[position], wanted)


# Reading


@given(scored(), KS, COVERAGES, st.integers(1, 13))
def test_truncating_gives_what_selecting_with_that_k_max_would_have_kept(
    given: Scored, ks: list[int], coverage: float, k: int
) -> None:
    found = kept_of(given, ks, coverage).truncate(k)
    wanted = kept_of(given, [min(ks[0], k), min(ks[1], k)], coverage)
    assert rows(found) == rows(wanted)
    np.testing.assert_allclose(found.tail_logprobs, wanted.tail_logprobs, atol=1e-5, rtol=1e-6)


@given(topks_of_two(), st.integers(1, 13))
def test_truncating_puts_the_mass_of_both_models_into_their_tails(topk: TopK, k: int) -> None:
    found = topk.truncate(k)
    assert found.counts.tolist() == [min(count, k) for count in topk.counts.tolist()]
    assert rows(found) == [row[:k] for row in rows(topk)]
    for before, after in zip(masses(topk), masses(found), strict=True):
        np.testing.assert_allclose(after, before, atol=1e-6)


def masses(topk: TopK) -> list[Floats]:
    """The sum of each position, of the teacher and of the reference policy where there is one."""
    pairs = [(topk.logprobs, topk.tail_logprobs), (topk.reference_logprobs, topk.reference_tail_logprobs)]
    return [
        np.exp(tails.astype(np.float64))
        + np.bincount(topk.positions, np.exp(logprobs.astype(np.float64)), len(topk.counts))
        for logprobs, tails in pairs
        if logprobs is not None and tails is not None
    ]


@given(topks(), st.sampled_from([0.01, 0.5, 1.0, 1.7, 30.0]) | st.floats(0.05, 50))
def test_at_another_temperature_the_stored_entries_are_the_dense_softmax_over_them(
    topk: TopK, temperature: float
) -> None:
    found = topk.tempered(temperature)
    for before, after in zip(rows(topk), rows(found), strict=True):
        logits = np.array([logprob for _, logprob in before]) / temperature
        wanted = logits - np.logaddexp.reduce(logits)
        np.testing.assert_allclose([logprob for _, logprob in after], wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(masses(found)[0], 1, atol=1e-4)
    assert np.isneginf(found.tail_logprobs).all()


@given(topks_of_two(), st.sampled_from([0.01, 0.5, 2.0]))
def test_at_another_temperature_the_reference_logprobs_sum_to_one_where_any_entry_is_possible(
    topk: TopK, temperature: float
) -> None:
    found = topk.tempered(temperature)
    assert topk.reference_logprobs is not None and found.reference_logprobs is not None
    possible = np.bincount(topk.positions, np.isfinite(topk.reference_logprobs), len(topk.counts)) > 0
    np.testing.assert_allclose(masses(found)[1], possible.astype(float), atol=1e-4)
    np.testing.assert_array_equal(np.isneginf(found.reference_logprobs), np.isneginf(topk.reference_logprobs))


@given(topks_of_two(), st.data())
def test_masked_positions_are_left_out_with_their_entries(topk: TopK, data: st.DataObject) -> None:
    kept = data.draw(st.lists(st.booleans(), min_size=len(topk.counts), max_size=len(topk.counts)))
    found = topk.mask(np.array(kept, np.bool_))
    assert rows(found) == [row for row, keep in zip(rows(topk), kept, strict=True) if keep]
    assert topk.reference_logprobs is not None and found.reference_logprobs is not None
    entries = np.repeat(np.array(kept, np.bool_), topk.counts)
    np.testing.assert_array_equal(found.reference_logprobs, topk.reference_logprobs[entries])


# Order, slices


@given(topks() | topks_of_two(), st.randoms(use_true_random=False))
def test_sorting_puts_equal_entries_of_a_position_back_in_order_of_their_ids(topk: TopK, random: Random) -> None:
    order: list[int] = []
    for _, run in groupby(range(len(topk.ids)), key=lambda entry: (topk.positions[entry], topk.logprobs[entry])):
        piece = list(run)
        random.shuffle(piece)
        order += piece
    index, reference = np.array(order, np.int64), topk.reference_logprobs
    shuffled = replace(topk, ids=topk.ids[index], reference_logprobs=None if reference is None else reference[index])
    found = sort_entries(shuffled)
    assert rows(found) == rows(topk)
    if reference is not None and found.reference_logprobs is not None:
        np.testing.assert_array_equal(found.reference_logprobs, reference)


@given(st.lists(topks(), max_size=4) | st.lists(topks_of_two(), min_size=1, max_size=4))
def test_slicing_a_concatenation_gives_the_pieces_back(pieces: list[TopK]) -> None:
    whole, start = concatenate(pieces), 0
    for piece in pieces:
        found = whole.slice(start, start + len(piece.counts))
        assert rows(found) == rows(piece)
        np.testing.assert_array_equal(found.tail_logprobs, piece.tail_logprobs)
        start += len(piece.counts)
    assert start == len(whole.counts)
