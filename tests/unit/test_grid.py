"""Grids: which there are, what their codes stand for, and which values they keep."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lopd_store.encoding import SAMPLED_GRID, TOPK_GRID
from lopd_store.errors import InputError
from lopd_store.grid import IMPOSSIBLE, LAST_LEVEL, Grid

GRID = Grid(segments=((0.0, 1 / 4), (1.0, 1 / 2), (3.0, 1.0)))


def test_steps_grow_where_segments_begin() -> None:
    assert GRID.levels[:11].tolist() == [0, -0.25, -0.5, -0.75, -1, -1.5, -2, -2.5, -3, -4, -5]


def test_the_greatest_error_of_a_level_is_half_the_step_below_it() -> None:
    assert GRID.half_steps[:11].tolist() == [1 / 8] * 4 + [1 / 4] * 4 + [1 / 2] * 3
    assert GRID.half_steps.max() == GRID.bound == 1 / 2


@pytest.mark.parametrize(
    ("logprob", "level"),
    [
        *((0.0, 0.0), (-0.0, 0.0), (-1e-40, 0.0), (-0.13, -0.25), (-0.9, -1.0), (-1.2, -1.0), (-1.3, -1.5)),
        *((-2.8, -3.0), (-3.4, -3.0), (-3.6, -4.0), (-1000.4, -1000.0)),
    ],
)
def test_a_logprob_becomes_the_nearest_level(logprob: float, level: float) -> None:
    assert GRID.to_logprobs(GRID.to_codes(np.array([logprob], np.float32))).tolist() == [level]


def test_a_tie_goes_to_the_even_code() -> None:
    ties = np.array([-0.125, -0.375, -0.625, -1.25, -1.75, -3.5, -4.5], np.float32)
    assert GRID.to_codes(ties).tolist() == [0, 2, 2, 4, 6, 8, 10]


def test_an_impossible_token_stays_impossible_and_any_other_possible() -> None:
    codes = GRID.to_codes(np.array([-np.inf, -3e38], np.float32))
    assert codes.tolist() == [IMPOSSIBLE, LAST_LEVEL]
    assert GRID.to_logprobs(codes).tolist()[0] == -np.inf and np.isfinite(GRID.to_logprobs(codes)[1])


def test_the_fill_value_stands_for_no_number() -> None:
    assert np.isnan(GRID.to_logprobs(np.array([65_535], np.uint16))).all()


def test_no_level_is_minus_zero() -> None:
    assert not np.signbit(GRID.to_logprobs(np.zeros(1, np.uint16))).any()


def test_more_values_than_fit_a_piece_are_rounded_as_one_by_one() -> None:
    values = -np.random.default_rng(0).exponential(3, 100_001).astype(np.float32)
    codes = GRID.to_codes(values)
    some = np.random.default_rng(1).integers(0, len(values), 200)
    assert codes[some].tolist() == [int(GRID.to_codes(values[at : at + 1])[0]) for at in some]


@pytest.mark.parametrize("grid", [GRID, TOPK_GRID, SAMPLED_GRID, Grid(segments=((0.0, 2.0**-20),))])
def test_a_grid_comes_back_from_its_json(grid: Grid) -> None:
    assert Grid.from_json(grid.to_json()) == grid


@pytest.mark.parametrize(
    ("segments", "said"),
    [
        ((), "a grid has 1 to 16 segments, the first from 0"),
        (((0.5, 1.0),), "a grid has 1 to 16 segments, the first from 0"),
        (tuple((float(start), 1.0) for start in range(17)), "a grid has 1 to 16 segments"),
        (((0.0, 0.3),), r"a step of a grid is not a power of two from 2\^-20 to 1"),
        (((0.0, 2.0),), "a step of a grid is not a power of two"),
        (((0.0, 0.0),), "a step of a grid is not a power of two"),
        (((0.0, -1.0),), "a step of a grid is not a power of two"),
        (((0.0, 2.0**-21),), "a step of a grid is not a power of two"),
        (((0.0, float("nan")),), "a step of a grid is not a power of two"),
        (((0.0, 1 / 2), (1.0, 1 / 4)), "the segments of a grid do not follow each other in whole steps"),
        (((0.0, 1 / 2), (0.75, 1.0)), "the segments of a grid do not follow each other in whole steps"),
        (((0.0, 1 / 2), (1.0, 1 / 2), (1.0, 1.0)), "the segments of a grid do not follow each other"),
        (((0.0, 1 / 2), (float("inf"), 1.0)), "the segments of a grid do not follow each other"),
        (((0.0, 1 / 2), (float("nan"), 1.0)), "the segments of a grid do not follow each other"),
        (((0.0, 2.0**-16), (1.0, 1.0)), "a grid has more levels than codes"),
    ],
)
def test_what_is_no_grid_is_refused(segments: tuple[tuple[float, float], ...], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Grid(segments=segments)


@pytest.mark.parametrize("value", [None, {}, [[0]], [[0, 1, 1]], [["0", 1]], [[0, True]], [[None, 1]], [0, 1], "grid"])
def test_json_that_is_no_list_of_pairs_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match=r"a grid is not a list of \[from, step\]"):
        Grid.from_json(value)
