"""What rounding and ranking promise for any values."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lopd_store.encoding import ids_to_ranks, make_encoding, ranks_to_ids, round_to_grid, round_topk
from lopd_store.topk import TopK
from tests.property.distributions import topks
from tests.property.test_topk import rows

STEPS = st.sampled_from([1 / 2, 1 / 4, 1 / 16]) | st.integers(1, 20).map(lambda n: 2.0**-n)
LOGPROBS = hnp.arrays(
    np.float32,
    st.integers(0, 30),
    elements=st.one_of(st.just(0.0), st.just(-0.0), st.just(-np.inf), st.floats(-1000, 0, width=32)),
)
IDS = hnp.arrays(np.uint32, st.integers(0, 50), elements=st.integers(0, 300_000) | st.integers(0, 5))


@given(LOGPROBS, STEPS)
def test_a_rounded_logprob_is_within_half_a_step(logprobs: npt.NDArray[np.float32], step: float) -> None:
    finite = logprobs[np.isfinite(logprobs)].astype(np.float64)
    rounded = round_to_grid(logprobs, step)[np.isfinite(logprobs)].astype(np.float64)
    half_a_bit = np.abs(finite) * 2.0**-24  # where float32 itself is coarser than the grid
    assert (np.abs(rounded - finite) <= np.maximum(step / 2, half_a_bit)).all()


@given(LOGPROBS, STEPS)
def test_a_rounded_logprob_is_a_multiple_of_the_step_and_no_minus_zero(
    logprobs: npt.NDArray[np.float32], step: float
) -> None:
    rounded = round_to_grid(logprobs, step)
    finite = rounded[np.isfinite(rounded)].astype(np.float64)
    assert (finite / step == np.rint(finite / step)).all()
    assert not np.signbit(rounded[rounded == 0]).any()


@given(LOGPROBS, STEPS)
def test_rounding_keeps_impossible_impossible_and_certain_certain(
    logprobs: npt.NDArray[np.float32], step: float
) -> None:
    rounded = round_to_grid(logprobs, step)
    np.testing.assert_array_equal(np.isneginf(rounded), np.isneginf(logprobs))
    assert (rounded[logprobs == 0] == 0).all() and (rounded <= 0).all()


@given(LOGPROBS, STEPS)
def test_rounding_twice_is_rounding_once(logprobs: npt.NDArray[np.float32], step: float) -> None:
    once = round_to_grid(logprobs, step)
    np.testing.assert_array_equal(round_to_grid(once, step), once)


@given(LOGPROBS)
def test_without_a_step_every_bit_stays(logprobs: npt.NDArray[np.float32]) -> None:
    assert round_to_grid(logprobs, 0).tobytes() == logprobs.tobytes()


@given(topks(), STEPS)
def test_rounded_entries_keep_the_order_rule_and_lose_none(topk: TopK, step: float) -> None:
    rounded = round_topk(topk, step)
    for before, after in zip(rows(topk), rows(rounded), strict=True):
        assert after == sorted(after, key=lambda entry: (-entry[1], entry[0]))
        assert sorted(id for id, _ in after) == sorted(id for id, _ in before)


@given(topks(), STEPS)
def test_rounding_moves_the_mass_of_a_position_within_its_bound(topk: TopK, step: float) -> None:
    rounded = round_topk(topk, step)
    for row, tail in zip(rows(rounded), rounded.tail_logprobs.tolist(), strict=True):
        mass = sum(np.exp(logprob) for _, logprob in row) + np.exp(tail)
        assert np.exp(-step / 2) - 1e-5 <= mass <= np.exp(step / 2) + 1e-5


@given(topks())
def test_the_exact_profile_keeps_every_bit(topk: TopK) -> None:
    assert round_topk(topk, make_encoding(exact=True).topk_step) is topk


@given(IDS)
def test_ranks_give_the_ids_back(ids: npt.NDArray[np.uint32]) -> None:
    np.testing.assert_array_equal(ranks_to_ids(*ids_to_ranks(ids)), ids)


@given(IDS)
def test_the_table_lists_each_id_once_most_frequent_first(ids: npt.NDArray[np.uint32]) -> None:
    table, _ = ids_to_ranks(ids)
    frequency = {id: (ids == id).sum() for id in set(ids.tolist())}
    assert table.tolist() == sorted(frequency, key=lambda id: (-frequency[id], id))
