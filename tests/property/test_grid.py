"""What rounding promises for any grid and any values."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lopd_store.grid import LAST_LEVEL, Grid
from tests.property.distributions import GRIDS

Logprobs = npt.NDArray[np.float32]
# Down to a thousand nats below certainty, which every grid of these tests reaches.
VALUES = st.one_of(
    st.integers(-16_000, 0).map(lambda sixteenths: sixteenths / 16),  # many are ties
    st.floats(-5, 0, width=32),
    st.floats(-1000, 0, width=32),
)
LOGPROBS = hnp.arrays(
    np.float32, st.integers(0, 30), elements=st.one_of(VALUES, st.sampled_from([0.0, -0.0, -1e-40, -np.inf]))
)


def nearest_levels(grid: Grid, logprobs: Logprobs) -> list[float]:
    """Twin: of all levels the nearest to each value, and of two equally near ones that of the even code."""
    levels = [(code, float(level)) for code, level in enumerate(grid.levels[: LAST_LEVEL + 1])]
    return [
        -np.inf if value == -np.inf else min(levels, key=lambda level: (abs(level[1] - value), level[0] % 2))[1]
        for value in map(float, logprobs)
    ]


@given(GRIDS, hnp.arrays(np.float32, st.integers(0, 4), elements=st.one_of(VALUES, st.just(-np.inf))))
def test_a_logprob_becomes_the_nearest_of_all_levels(grid: Grid, logprobs: Logprobs) -> None:
    assert grid.to_logprobs(grid.to_codes(logprobs)).tolist() == nearest_levels(grid, logprobs)


@given(GRIDS, LOGPROBS)
def test_a_logprob_is_within_the_greatest_error_of_its_level(grid: Grid, logprobs: Logprobs) -> None:
    finite = logprobs[np.isfinite(logprobs)]
    codes = grid.to_codes(finite)
    errors = np.abs(grid.to_logprobs(codes).astype(np.float64) - finite)
    assert (errors <= grid.half_steps[codes]).all() and (grid.half_steps[codes] <= grid.bound).all()


@given(GRIDS, LOGPROBS)
def test_rounding_keeps_the_order(grid: Grid, logprobs: Logprobs) -> None:
    rounded = grid.to_logprobs(grid.to_codes(np.sort(logprobs)))
    assert (rounded[1:] >= rounded[:-1]).all()


@given(GRIDS, LOGPROBS)
def test_rounding_twice_is_rounding_once(grid: Grid, logprobs: Logprobs) -> None:
    codes = grid.to_codes(logprobs)
    np.testing.assert_array_equal(grid.to_codes(grid.to_logprobs(codes)), codes)


@given(GRIDS, LOGPROBS)
def test_certain_stays_certain_impossible_impossible_and_nothing_becomes_impossible(
    grid: Grid, logprobs: Logprobs
) -> None:
    rounded = grid.to_logprobs(grid.to_codes(logprobs))
    np.testing.assert_array_equal(np.isneginf(rounded), np.isneginf(logprobs))
    assert (rounded[logprobs == 0] == 0).all() and (rounded <= 0).all()
    assert not np.signbit(rounded[rounded == 0]).any()


@given(GRIDS)
def test_levels_fall_in_steps_that_never_shrink(grid: Grid) -> None:
    steps = -np.diff(grid.levels[:2000].astype(np.float64))
    assert (steps > 0).all() and (np.diff(steps) >= 0).all()
    assert set(steps.tolist()) <= {step for _, step in grid.segments}


@given(GRIDS)
def test_a_grid_comes_back_from_its_json(grid: Grid) -> None:
    assert Grid.from_json(grid.to_json()) == grid
