"""What two models find likely, from the listings of each and what is asked for by name, against dense distributions."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from lopd_store.teachers.flat import Listing, listed, to_listing
from lopd_store.teachers.union import MOST_IDS, Choice, Union, questions
from lopd_store.teachers.vllm import to_grid
from lopd_store.topk import Floats, TopK, select
from tests.artifacts import rollout
from tests.unit.dense import adaptive_k, best, log_softmax, tail

WIDTH, VOCAB_SIZE, K, COVERAGE = 320, 300, 12, 0.9
RESPONSE = [3, 299, 50, 7, 120, 7]
Dense = npt.NDArray[np.float64]  # [positions, WIDTH]


def two_models(seed: int, apart: float) -> tuple[Dense, Dense]:
    """Distributions of a teacher and of a reference policy that differ by so much."""
    generator = np.random.default_rng(seed)
    logits = 3 * generator.standard_normal((len(RESPONSE), WIDTH))
    others = logits + apart * generator.standard_normal(logits.shape)
    return np.array([log_softmax(row) for row in logits]), np.array([log_softmax(row) for row in others])


def listing(dense: Dense) -> Listing:
    """What an engine lists of dense rows."""
    columns = listed(K, vocab_size=VOCAB_SIZE, output_width=WIDTH)
    ids = np.array([best(row, columns, WIDTH) for row in dense], np.int64)
    return to_listing(
        rollout([1, 2], RESPONSE),
        ids,
        np.take_along_axis(dense, ids, axis=1).astype(np.float32),
        dense[np.arange(len(dense)), RESPONSE].astype(np.float32),
        k=K,
        vocab_size=VOCAB_SIZE,
        output_width=WIDTH,
    )


def answer(dense: Dense, asked: npt.NDArray[np.int64]) -> Floats:
    """The log-probs of what is asked for."""
    return dense[asked[:, 0], asked[:, 1]].astype(np.float32)


def stored(teacher: Dense, reference: Dense, *, k_min: int, coverage: float) -> tuple[Union, TopK]:
    """The union, and what a build keeps of it."""
    union = Union(listing(teacher), listing(reference), k=K, choice=Choice(k_min=k_min, coverage=coverage))
    scores = union.scores(
        [answer(dense, asked) for dense, asked in zip((teacher, reference), union.asked, strict=True)]
    )
    return union, select(scores.candidates, k_min=k_min, k_max=K, coverage=coverage)


@pytest.mark.parametrize("apart", [0.0, 0.3, 4.0])
@pytest.mark.parametrize(("k_min", "coverage"), [(1, COVERAGE), (3, 0.5), (1, 1.0)])
@pytest.mark.parametrize("seed", range(3))
def test_the_union_is_that_of_the_dense_distributions(apart: float, k_min: int, coverage: float, seed: int) -> None:
    teacher, reference = two_models(seed, apart)
    _, topk = stored(teacher, reference, k_min=k_min, coverage=coverage)
    assert topk.reference_logprobs is not None and topk.reference_tail_logprobs is not None
    for j, rows in enumerate(zip(teacher, reference, strict=True)):
        wanted: set[int] = set()
        for row in rows:
            k = adaptive_k(row, k_min=k_min, k_max=K, coverage=coverage, vocab_size=VOCAB_SIZE)
            wanted |= set(best(row, k, VOCAB_SIZE))
        here = topk.slice(j, j + 1)
        assert here.reference_logprobs is not None and here.reference_tail_logprobs is not None
        assert here.ids.tolist() == sorted(wanted, key=lambda id: (-rows[0][id], id))
        np.testing.assert_allclose(here.logprobs, rows[0][here.ids], atol=1e-5)
        np.testing.assert_allclose(here.reference_logprobs, rows[1][here.ids], atol=1e-5)
        assert np.exp(here.tail_logprobs[0]) == pytest.approx(np.exp(tail(rows[0], list(wanted))), abs=3e-6)
        assert np.exp(here.reference_tail_logprobs[0]) == pytest.approx(np.exp(tail(rows[1], list(wanted))), abs=3e-6)


def test_nothing_is_asked_for_where_the_models_agree() -> None:
    union, _ = stored(*two_models(0, 0.0), k_min=1, coverage=1.0)
    assert [len(asked) for asked in union.asked] == [0, 0]


def test_only_what_will_be_stored_is_asked_for() -> None:
    teacher, reference = two_models(0, 4.0)
    few, _ = stored(teacher, reference, k_min=1, coverage=0.5)
    all_of_k, _ = stored(teacher, reference, k_min=1, coverage=1.0)
    assert 0 < len(few.asked[0]) < len(all_of_k.asked[0])
    chosen = [best(row, K, VOCAB_SIZE) for row in reference]
    assert all(id in chosen[position] for position, id in all_of_k.asked[0].tolist())


def test_a_rollout_without_a_response_has_no_union() -> None:
    empty = to_listing(
        rollout([1, 2], []),
        np.zeros((0, 20), np.int64),
        np.zeros((0, 20), np.float32),
        np.zeros(0, np.float32),
        k=K,
        vocab_size=VOCAB_SIZE,
        output_width=WIDTH,
    )
    union = Union(empty, empty, k=K, choice=Choice())
    scores = union.scores([np.zeros(0, np.float32)] * 2)
    assert [asked.shape for asked in union.asked] == [(0, 2), (0, 2)]
    assert scores.candidates.ids.shape == (0, 2 * K) and len(scores.sampled_logprobs) == 0
    assert list(questions(union.asked[0])) == []


def test_questions_are_of_one_position_and_no_more_ids_than_the_engine_takes() -> None:
    asked = np.array([[2, 7], [4, 1], [4, 9], *([5, id] for id in range(MOST_IDS + 3))], np.int64)
    found = list(questions(asked))
    assert [position for _, position, _ in found] == [2, 4, 5, 5]
    assert [ids for _, _, ids in found][:2] == [[7], [1, 9]]
    assert [len(ids) for _, _, ids in found] == [1, 2, MOST_IDS, 3]
    for some, position, ids in found:
        assert asked[some].tolist() == [[position, id] for id in ids]


def test_a_grid_of_ids_begins_with_the_response_and_is_filled_with_none() -> None:
    grid, columns = to_grid(np.array([30, 31, 32, 33]), np.array([[1, 7], [3, 8], [3, 9]]))
    assert grid.tolist() == [[30, -1, -1], [31, 7, -1], [32, -1, -1], [33, 8, 9]]
    assert columns.tolist() == [1, 1, 2]
