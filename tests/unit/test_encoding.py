"""Which encodings there are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lopd_store.encoding import K_LIMIT, Encoding, make_encoding, ranks_to_ids, round_to_grid, round_topk
from lopd_store.errors import ArtifactError, InputError
from lopd_store.part import TOPK_ARRAYS
from tests.artifacts import make_topk


@pytest.mark.parametrize(
    "encoding",
    [make_encoding(), make_encoding(exact=True), make_encoding(k_min=2, k_max=K_LIMIT, coverage=1, topk_step=2.0**-20)],
)
def test_an_encoding_comes_back_from_its_json(encoding: Encoding) -> None:
    assert Encoding.from_json(encoding.to_json(), where="x") == encoding


def test_the_exact_profile_rounds_nothing() -> None:
    assert make_encoding(exact=True).to_json()["bounds"] == {"topk_logprobs": 0.0, "sampled_logprobs": 0.0}


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
        ({"topk_step": 0.1}, "a step is not a power of two"),
        ({"sampled_step": 0.0}, "a step is not a power of two"),
        ({"sampled_step": 2.0}, "a step is not a power of two"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        make_encoding(**options)


def test_no_legal_count_is_the_fill_value_of_counts() -> None:
    assert TOPK_ARRAYS["counts"][1] > K_LIMIT


def test_the_grid_rounds_ties_to_even() -> None:
    values = np.array([-0.25, -0.75, -1.25], np.float32)
    assert round_to_grid(values, 0.5).tolist() == [0.0, -1.0, -1.0]


def test_entries_that_rounding_made_equal_stand_by_id() -> None:
    topk = make_topk([[(9, -0.49), (3, -0.51), (7, -1.0)], [(8, -0.1)]], tails=[-2.1, -3.0])
    rounded = round_topk(topk, 0.5)
    assert rounded.ids.tolist() == [3, 9, 7, 8]
    assert rounded.logprobs.tolist() == [-0.5, -0.5, -1.0, 0.0] and rounded.tail_logprobs.tolist() == [-2.0, -3.0]


def test_a_rank_beyond_the_table_is_refused() -> None:
    with pytest.raises(ArtifactError, match="a rank has no row in `id_table`\n  expected  below 2\n  actual    2"):
        ranks_to_ids(np.array([7, 8], np.uint32), np.array([0, 2], np.uint32))
