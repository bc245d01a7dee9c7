"""Which encodings there are, and what is stored for ids."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lopd_store.encoding import (
    K_LIMIT,
    SAMPLED_GRID,
    TOPK_GRID,
    Encoding,
    IdDecoder,
    ids_to_rows,
    make_encoding,
    round_topk,
)
from lopd_store.errors import ArtifactError, InputError
from lopd_store.grid import Grid
from lopd_store.part import topk_arrays
from tests.artifacts import make_topk

GRID = Grid(segments=((0.0, 1 / 2),))


@pytest.mark.parametrize(
    "encoding",
    [
        make_encoding(),
        make_encoding(exact=True, rule="teacher+reference"),
        make_encoding(k_min=2, k_max=K_LIMIT, coverage=1, topk_grid=GRID, sampled_grid=SAMPLED_GRID),
    ],
)
def test_an_encoding_comes_back_from_its_json(encoding: Encoding) -> None:
    assert Encoding.from_json(encoding.to_json(), where="x") == encoding


def test_the_exact_profile_rounds_nothing() -> None:
    encoding = make_encoding(exact=True).to_json()
    assert encoding["bounds"] == {"topk_logprobs": 0.0, "sampled_logprobs": 0.0}
    assert encoding["grids"] == {"topk_logprobs": None, "sampled_logprobs": None}


def test_the_bounds_are_half_the_widest_steps() -> None:
    assert make_encoding().to_json()["bounds"] == {"topk_logprobs": 1 / 8, "sampled_logprobs": 1 / 32}
    assert (TOPK_GRID.bound, SAMPLED_GRID.bound) == (1 / 8, 1 / 32)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"k_max": 0}, f"`k_max` is out of range\n  expected  1 to {K_LIMIT}\n  actual    0"),
        ({"k_max": K_LIMIT + 1}, "`k_max` is out of range"),
        ({"k_min": 0}, "`k_min` is out of range"),
        ({"k_min": 5, "k_max": 4}, "`k_min` is greater than `k_max`\n  actual    5 > 4"),
        ({"k_max": True}, "`k_max` is out of range"),
        ({"coverage": 0}, "`coverage` is out of range"),
        ({"coverage": 1.01}, "`coverage` is out of range"),
        ({"coverage": float("nan")}, "`coverage` is out of range"),
        ({"rule": "student"}, "there is no such selection\n  expected  teacher or teacher.reference\n  actual    stud"),
        ({"topk_grid": None}, "the profile `compact` lacks a grid"),
        ({"sampled_grid": None}, "the profile `compact` lacks a grid"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        make_encoding(**options)


def test_no_legal_count_is_the_fill_value_of_counts() -> None:
    encoding = make_encoding(rule="teacher+reference", k_max=K_LIMIT)
    assert encoding.most_entries < int(topk_arrays(encoding)["counts"].fill)


def test_entries_that_rounding_made_equal_stand_by_id() -> None:
    topk = make_topk([[(9, -0.49), (3, -0.51), (7, -1.0)], [(8, -0.1)]], tails=[-2.1, -3.0])
    rounded = round_topk(topk, GRID)
    assert rounded.ids.tolist() == [3, 9, 7, 8]
    assert rounded.logprobs.tolist() == [-0.5, -0.5, -1.0, 0.0] and rounded.tail_logprobs.tolist() == [-2.0, -3.0]


def test_the_response_token_is_row_0_and_the_table_does_without_it() -> None:
    ids = np.array([9, 4, 9, 7, 9, 7, 4], np.uint32)
    table, rows = ids_to_rows(ids, np.array([2, 3, 2], np.uint16), np.array([9, 3, 4], np.uint32))
    assert table.tolist() == [7, 9, 4]  # 7 and 9 stand twice without being the response token, 4 once
    assert rows.tolist() == [0, 3, 2, 1, 2, 1, 0]


def test_a_row_beyond_the_table_is_refused() -> None:
    decoder = IdDecoder(np.array([7, 8], np.uint32), np.array([2], np.uint16), np.array([5], np.uint32))
    with pytest.raises(ArtifactError, match="a row is not in `id_table`\n  expected  below 3\n  actual    3"):
        decoder.decode(0, np.array([0, 3], np.uint32), np.empty(2, np.uint32))
