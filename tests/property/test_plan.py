"""The borders of parts, for any lengths of responses."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lopd_store.plan import MAX_PART_POSITIONS, MIN_PART_POSITIONS, part_borders

LENGTHS = st.lists(st.integers(0, 4), min_size=1) | st.lists(st.integers(0, 1 << 21), min_size=1, max_size=60)
PART_POSITIONS = st.none() | st.integers(1, 9) | st.integers(1, MAX_PART_POSITIONS)


@given(LENGTHS, PART_POSITIONS)
def test_parts_hold_every_row_once_and_in_order(lengths: list[int], part_positions: int | None) -> None:
    borders = part_borders(lengths, part_positions)
    assert [row for start, stop in borders for row in range(start, stop)] == list(range(len(lengths)))
    assert all(start < stop for start, stop in borders)


@given(LENGTHS, PART_POSITIONS)
def test_a_part_is_closed_by_the_first_rollout_that_fills_it(lengths: list[int], part_positions: int | None) -> None:
    size = part_positions or min(max(sum(lengths) // 16, MIN_PART_POSITIONS), MAX_PART_POSITIONS)
    borders = part_borders(lengths, part_positions)
    assert all(sum(lengths[start : stop - 1]) < size for start, stop in borders)
    assert all(sum(lengths[start:stop]) >= size for start, stop in borders[:-1])


@given(LENGTHS)
def test_without_a_wish_there_are_at_most_seventeen_parts_until_parts_are_full(lengths: list[int]) -> None:
    borders = part_borders(lengths)
    assert len(borders) <= 17 or sum(lengths) > 16 * MAX_PART_POSITIONS
