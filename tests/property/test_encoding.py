"""What rounding and the table of ids promise for any values."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lopd_store.encoding import RESPONSE_TOKEN, IdDecoder, ids_to_rows, make_encoding, round_logprobs, round_topk
from lopd_store.errors import ArtifactError
from lopd_store.grid import Grid
from lopd_store.topk import TopK
from tests.property.distributions import GRIDS, topks, topks_of_two
from tests.property.test_topk import rows

Ids = npt.NDArray[np.uint32]
LOGPROBS = hnp.arrays(
    np.float32,
    st.integers(0, 30),
    elements=st.one_of(st.just(0.0), st.just(-0.0), st.just(-np.inf), st.floats(-1000, 0, width=32)),
)
ANY_TOPK = topks() | topks_of_two()
FEW = st.integers(0, 5) | st.integers(0, 300_000)


@st.composite
def entries(draw: st.DrawFn) -> tuple[Ids, npt.NDArray[np.uint16], Ids]:
    """(ids, counts, response ids) of some positions; the response token is among the entries of some."""
    counts = draw(hnp.arrays(np.uint16, st.integers(0, 20), elements=st.integers(0, 4)))
    response_ids = draw(hnp.arrays(np.uint32, len(counts), elements=FEW))
    return draw(hnp.arrays(np.uint32, int(counts.sum()), elements=FEW)), counts, response_ids


def is_response(ids: Ids, counts: npt.NDArray[np.uint16], response_ids: Ids) -> npt.NDArray[np.bool_]:
    return np.asarray(ids == np.repeat(response_ids, counts))


@given(LOGPROBS)
def test_without_a_grid_every_bit_stays(logprobs: npt.NDArray[np.float32]) -> None:
    assert round_logprobs(logprobs, None).tobytes() == logprobs.tobytes()


@given(ANY_TOPK, GRIDS)
def test_rounded_entries_keep_the_order_rule_and_lose_none(topk: TopK, grid: Grid) -> None:
    rounded = round_topk(topk, grid)
    for before, after in zip(rows(topk), rows(rounded), strict=True):
        assert after == sorted(after, key=lambda entry: (-entry[1], entry[0]))
        assert sorted(id for id, _ in after) == sorted(id for id, _ in before)


@given(ANY_TOPK, GRIDS)
def test_rounding_moves_the_mass_of_a_position_within_its_bound(topk: TopK, grid: Grid) -> None:
    rounded = round_topk(topk, grid)
    for row, tail in zip(rows(rounded), rounded.tail_logprobs.tolist(), strict=True):
        mass = sum(np.exp(logprob) for _, logprob in row) + np.exp(tail)
        assert np.exp(-grid.bound) - 1e-5 <= mass <= np.exp(grid.bound) + 1e-5


@given(topks_of_two(), GRIDS)
def test_a_reference_logprob_stays_with_its_id_when_entries_are_put_in_order(topk: TopK, grid: Grid) -> None:
    rounded = round_topk(topk, grid)
    assert topk.reference_logprobs is not None and rounded.reference_logprobs is not None
    wanted = grid.to_logprobs(grid.to_codes(topk.reference_logprobs)).tolist()

    def by_id(topk: TopK, logprobs: list[float]) -> dict[tuple[int, int], float]:
        return dict(zip(zip(topk.positions.tolist(), topk.ids.tolist(), strict=True), logprobs, strict=True))

    assert by_id(rounded, rounded.reference_logprobs.tolist()) == by_id(topk, wanted)


@given(topks())
def test_the_exact_profile_keeps_every_bit(topk: TopK) -> None:
    assert round_topk(topk, make_encoding(exact=True).topk_grid) is topk


@given(entries(), st.integers(1, 9))
def test_rows_give_the_ids_back_in_pieces_of_any_length(
    some: tuple[Ids, npt.NDArray[np.uint16], Ids], length: int
) -> None:
    ids, counts, response_ids = some
    table, stored = ids_to_rows(*some)
    decoder, found = IdDecoder(table, counts, response_ids), np.empty_like(ids)
    for start in range(0, len(ids), length):
        decoder.decode(start, stored[start : start + length], found[start : start + length])
    np.testing.assert_array_equal(found, ids)


@given(entries())
def test_the_response_token_has_the_row_of_its_own_and_no_other_id_has_it(
    some: tuple[Ids, npt.NDArray[np.uint16], Ids],
) -> None:
    _, stored = ids_to_rows(*some)
    np.testing.assert_array_equal(stored == RESPONSE_TOKEN, is_response(*some))


@given(entries())
def test_the_table_lists_each_other_id_once_frequent_ones_first(
    some: tuple[Ids, npt.NDArray[np.uint16], Ids],
) -> None:
    table, _ = ids_to_rows(*some)
    others = some[0][~is_response(*some)].tolist()
    octave = {id: others.count(id).bit_length() for id in set(others)}
    assert table.tolist() == sorted(octave, key=lambda id: (-octave[id], id))


@given(entries())
def test_a_row_beyond_the_table_is_refused(some: tuple[Ids, npt.NDArray[np.uint16], Ids]) -> None:
    ids, counts, response_ids = some
    table, stored = ids_to_rows(*some)
    if len(ids):
        stored[-1] = len(table) + 1
        with pytest.raises(ArtifactError, match="a row is not in `id_table`"):
            IdDecoder(table, counts, response_ids).decode(0, stored, np.empty_like(ids))
