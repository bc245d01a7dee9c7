"""Reading top-k at another k or temperature, on numbers that can be checked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from lopd_store.errors import InputError
from lopd_store.topk import Candidates, select
from tests.artifacts import make_topk

HALF, QUARTER, EIGHTH = (float(np.log(p)) for p in (1 / 2, 1 / 4, 1 / 8))
TOPK = make_topk([[(7, HALF), (3, QUARTER), (4, EIGHTH)], [(5, HALF)]], tails=[EIGHTH, HALF])


def test_entries_that_are_cut_go_to_the_tail() -> None:
    cut = TOPK.truncate(1)
    assert (cut.counts.tolist(), cut.ids.tolist()) == ([1, 1], [7, 5])
    np.testing.assert_allclose(cut.tail_logprobs, [HALF, HALF], rtol=1e-6)


@pytest.mark.parametrize("k", [3, 64, 100_000])
def test_truncating_to_a_k_that_no_position_has_changes_nothing(k: int) -> None:
    cut = TOPK.truncate(k)
    np.testing.assert_array_equal(cut.counts, TOPK.counts, strict=True)
    np.testing.assert_array_equal(cut.ids, TOPK.ids)
    np.testing.assert_array_equal(cut.tail_logprobs, TOPK.tail_logprobs)


def test_a_lower_temperature_squares_the_odds() -> None:
    found = np.exp(TOPK.tempered(0.5).logprobs)
    np.testing.assert_allclose(found, [16 / 21, 4 / 21, 1 / 21, 1], rtol=1e-5)


def test_entries_too_unlikely_for_a_float64_still_sum_to_one_at_a_low_temperature() -> None:
    flat = make_topk([[(1, -20.0), (2, -20.0)]], tails=[0.0])
    np.testing.assert_allclose(np.exp(flat.tempered(0.01).logprobs), [0.5, 0.5], rtol=1e-5)


def test_positions_without_entries_have_none_at_any_temperature() -> None:
    empty = make_topk([[], [(1, -1.0)], []], tails=[0.0, -0.5, 0.0])
    assert empty.tempered(2.0).logprobs.tolist() == [0.0]


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_none_is_refused(temperature: float) -> None:
    with pytest.raises(InputError, match="`temperature` is out of range\n  expected  above 0"):
        TOPK.tempered(temperature)


def test_what_the_teacher_finds_impossible_is_not_kept_however_likely_the_reference_policy_finds_it() -> None:
    candidates = Candidates(
        ids=np.array([[8, 9]], np.uint32),
        logprobs=np.array([[0.0, -np.inf]], np.float32),
        tail_logprobs=np.array([-np.inf], np.float32),
        reference_logprobs=np.array([[QUARTER, HALF]], np.float32),
        reference_tail_logprobs=np.array([QUARTER], np.float32),
    )
    topk = select(candidates, k_min=1, k_max=2, coverage=1.0)
    assert topk.reference_logprobs is not None and topk.reference_tail_logprobs is not None
    assert (topk.ids.tolist(), topk.reference_logprobs.tolist()) == ([8], [np.float32(QUARTER)])
    np.testing.assert_allclose(np.exp(topk.reference_tail_logprobs), [3 / 4], rtol=1e-6)
