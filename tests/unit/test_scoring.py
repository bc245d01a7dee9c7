"""Scoring against the float64 twin, and against a model whose answer is known."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lopd_store
from lopd_store import layout, models
from lopd_store.encoding import make_encoding
from lopd_store.errors import DataError, UnavailableError
from lopd_store.grid import Grid
from lopd_store.manifest import Scoring
from lopd_store.plan import Plan, make_plan
from lopd_store.rollouts import Rollout
from lopd_store.scoring import score_part
from lopd_store.teachers import RolloutScores, load
from lopd_store.teachers import transformers as engine
from lopd_store.teachers.transformers import TransformersTeacher, batches, score_logits
from lopd_store.topk import Candidates
from lopd_store.workers import gpus_of_worker
from tests.artifacts import random_pairs, rollout, save_rollouts
from tests.tiny import save_tiny_model, tiny_tokenizer
from tests.unit.conftest import LENGTHS, PART_POSITIONS
from tests.unit.dense import DenseTeacher, adaptive_k, best, entropy, log_softmax, tail

VOCAB_SIZE, PADDED_WIDTH, K = 300, 320, 20
TOLERANCE = 1e-4  # float32 against float64
ROLLOUTS = [rollout(*pair) for pair in random_pairs(LENGTHS)]


@pytest.fixture(scope="module")
def padded_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher whose head has 20 columns more than its tokenizer has ids."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "padded", seed=4, output_width=PADDED_WIDTH)


@pytest.fixture(scope="module")
def twin(teacher_dir: Path) -> list[np.ndarray]:
    """The dense distributions of every rollout."""
    dense = DenseTeacher(teacher_dir)
    return [dense.logprobs(one) for one in ROLLOUTS]


@pytest.fixture(scope="module")
def scores(teacher_dir: Path) -> list[RolloutScores]:
    """What the engine says of the same rollouts."""
    return score(teacher_dir, ROLLOUTS)


def score(model: Path, rollouts: Sequence[Rollout], *, k: int = K, batch_tokens: int = 64) -> list[RolloutScores]:
    teacher = load_teacher(model, batch_tokens=batch_tokens)
    by_index = dict(teacher.score(rollouts, k))
    assert sorted(by_index) == list(range(len(rollouts)))
    return [by_index[index] for index in range(len(rollouts))]


def load_teacher(model: Path, *, batch_tokens: int = 64) -> TransformersTeacher:
    return TransformersTeacher(
        str(model), vocab_size=VOCAB_SIZE, dtype="float32", device="cpu", batch_tokens=batch_tokens
    )


def test_every_rollout_has_one_row_per_response_token(scores: list[RolloutScores]) -> None:
    rows = [
        (len(s.sampled_logprobs), s.candidates.ids.shape, s.candidates.logprobs.shape, len(s.candidates.tail_logprobs))
        for s in scores
    ]
    assert rows == [(n, (n, K), (n, K), n) for _, n in LENGTHS]


def test_sampled_logprobs_equal_the_dense_twin(scores: list[RolloutScores], twin: list[np.ndarray]) -> None:
    for one, found, dense in zip(ROLLOUTS, scores, twin, strict=True):
        wanted = [dense[j, id] for j, id in enumerate(one.response_ids)]
        np.testing.assert_allclose(found.sampled_logprobs, wanted, atol=TOLERANCE)


def test_the_top_k_ids_are_those_of_the_dense_twin(scores: list[RolloutScores], twin: list[np.ndarray]) -> None:
    for found, dense in zip(scores, twin, strict=True):
        for row, logprobs in zip(found.candidates.ids, dense, strict=True):
            assert set(row.tolist()) == set(best(logprobs, K, VOCAB_SIZE))


def test_the_top_k_values_are_the_dense_twins_at_those_ids(scores: list[RolloutScores], twin: list[np.ndarray]) -> None:
    for found, dense in zip(scores, twin, strict=True):
        np.testing.assert_allclose(
            found.candidates.logprobs, np.take_along_axis(dense, found.candidates.ids, axis=1), atol=TOLERANCE
        )


def test_the_tail_is_the_measured_mass_outside_the_top_k(scores: list[RolloutScores], twin: list[np.ndarray]) -> None:
    for found, dense in zip(scores, twin, strict=True):
        wanted = [tail(logprobs, ids.tolist()) for logprobs, ids in zip(dense, found.candidates.ids, strict=True)]
        np.testing.assert_allclose(found.candidates.tail_logprobs, wanted, atol=TOLERANCE)


def test_entropies_equal_the_dense_twin(scores: list[RolloutScores], twin: list[np.ndarray]) -> None:
    for found, dense in zip(scores, twin, strict=True):
        assert found.entropies is not None
        np.testing.assert_allclose(found.entropies, [entropy(row) for row in dense], atol=10 * TOLERANCE)


@pytest.mark.parametrize("batch_tokens", [1, 10_000])
def test_the_size_of_a_batch_changes_no_score(
    teacher_dir: Path, scores: list[RolloutScores], batch_tokens: int
) -> None:
    for found, wanted in zip(score(teacher_dir, ROLLOUTS, batch_tokens=batch_tokens), scores, strict=True):
        np.testing.assert_allclose(found.sampled_logprobs, wanted.sampled_logprobs, atol=TOLERANCE)
        np.testing.assert_allclose(found.candidates.tail_logprobs, wanted.candidates.tail_logprobs, atol=TOLERANCE)


def test_the_head_in_chunks_gives_the_scores_of_the_head_at_once(
    teacher_dir: Path, scores: list[RolloutScores], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_HEAD_CHUNK_VALUES", 4 * VOCAB_SIZE)  # four positions; else only large heads chunk
    for found, wanted in zip(score(teacher_dir, ROLLOUTS), scores, strict=True):
        np.testing.assert_allclose(found.sampled_logprobs, wanted.sampled_logprobs, atol=TOLERANCE)
        np.testing.assert_array_equal(found.candidates.ids, wanted.candidates.ids)


def test_rollouts_without_any_response_give_no_rows(teacher_dir: Path) -> None:
    found = score(teacher_dir, [rollout([7, 8, 9], []), rollout([7], [])])
    assert [len(one.sampled_logprobs) for one in found] == [0, 0]


def test_k_beyond_the_vocabulary_keeps_all_of_it(teacher_dir: Path) -> None:
    (found,) = score(teacher_dir, [rollout([7, 8], [9])], k=5000)
    assert sorted(found.candidates.ids[0].tolist()) == list(range(VOCAB_SIZE))
    assert found.candidates.tail_logprobs[0] == -np.inf


# A padded head


def test_ids_of_padding_are_never_among_the_top_k(padded_dir: Path) -> None:
    found = score(padded_dir, ROLLOUTS, k=VOCAB_SIZE)
    assert max(int(one.candidates.ids.max()) for one in found if len(one.candidates.ids)) == VOCAB_SIZE - 1


def test_mass_on_ids_of_padding_goes_to_the_tail(padded_dir: Path) -> None:
    dense = DenseTeacher(padded_dir)
    for one, found in zip(ROLLOUTS, score(padded_dir, ROLLOUTS, k=VOCAB_SIZE), strict=True):
        wanted = [tail(row, list(range(VOCAB_SIZE))) for row in dense.logprobs(one)]
        assert max(wanted, default=0) > -10 or not wanted, "the padding must have mass, or this shows nothing"
        np.testing.assert_allclose(found.candidates.tail_logprobs, wanted, atol=TOLERANCE)


def test_mass_on_ids_of_padding_is_in_the_build_record(
    padded_dir: Path, teacher_dir: Path, rollouts_path: Path, tmp_path: Path
) -> None:
    dense = DenseTeacher(padded_dir)
    mass = np.concatenate([np.exp(dense.logprobs(one)[:, VOCAB_SIZE:]).sum(axis=1) for one in ROLLOUTS])
    assert mass.mean() > 1e-3, "the padding must have mass, or this shows nothing"
    for teacher, wanted in ((padded_dir, mass.mean()), (teacher_dir, 0)):
        output = tmp_path / teacher.name
        lopd_store.build(teacher=teacher, rollouts=rollouts_path, output=output, part_positions=PART_POSITIONS)
        found = json.loads((output / layout.BUILD_RECORD).read_text())["padding"]
        assert found == pytest.approx(wanted, rel=1e-3)


def test_sampled_logprobs_are_over_the_whole_padded_head(padded_dir: Path) -> None:
    dense = DenseTeacher(padded_dir)
    for one, found in zip(ROLLOUTS, score(padded_dir, ROLLOUTS), strict=True):
        wanted = [row[id] for row, id in zip(dense.logprobs(one), one.response_ids, strict=True)]
        np.testing.assert_allclose(found.sampled_logprobs, wanted, atol=TOLERANCE)


# A model whose answer is known: it always counts up by one


@pytest.fixture(scope="module")
def counting_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that gives token t + 1 a logit of 15 after token t, and every other token 0."""
    return save_counting_model(tmp_path_factory.mktemp("models") / "counting", logit=15)


def save_counting_model(directory: Path, *, logit: float) -> Path:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=VOCAB_SIZE,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        rms_norm_eps=1e-12,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(VOCAB_SIZE))
        model.model.norm.weight.fill_(logit / VOCAB_SIZE**0.5)  # a one-hot row has the square root of its width as norm
        model.lm_head.weight.copy_(torch.eye(VOCAB_SIZE).roll(1, dims=0))
    model.save_pretrained(directory)
    tiny_tokenizer(VOCAB_SIZE).save_pretrained(directory)
    return directory


LIKELY = float(-np.log1p((VOCAB_SIZE - 1) * np.exp(-15.0)))
UNLIKELY = LIKELY - 15


@pytest.mark.parametrize(
    ("response", "wanted"),
    [
        ([11, 12, 13, 14], [LIKELY, LIKELY, LIKELY, LIKELY]),
        ([50, 51, 52, 53], [UNLIKELY, LIKELY, LIKELY, LIKELY]),
        ([11, 50, 51, 52], [LIKELY, UNLIKELY, LIKELY, LIKELY]),
        ([11, 12, 13, 50], [LIKELY, LIKELY, LIKELY, UNLIKELY]),
        ([50], [UNLIKELY]),
    ],
)
def test_row_j_is_the_distribution_of_response_token_j(
    counting_dir: Path, response: list[int], wanted: list[float]
) -> None:
    longer = rollout([20, 21, 22], list(range(30, 60)))  # a neighbour in the batch, so that there is padding
    found = score(counting_dir, [rollout([9, 10], response), longer], batch_tokens=1000)[0]
    np.testing.assert_allclose(found.sampled_logprobs, wanted, atol=TOLERANCE)


def test_the_first_row_sees_the_last_prompt_token(counting_dir: Path) -> None:
    (found,) = score(counting_dir, [rollout([9, 10, 77], [11])], k=1)
    assert found.candidates.ids.tolist() == [[78]]


@pytest.mark.parametrize("exact", [False, True])
def test_a_teacher_that_is_certain_is_stored_as_certain(tmp_path: Path, exact: bool) -> None:
    teacher = save_counting_model(tmp_path / "certain", logit=200)
    rollouts = save_rollouts(tmp_path / "r.parquet", [([9, 10], [11, 12, 50, 51])], logprob=0.0)
    artifact = lopd_store.build(teacher=teacher, rollouts=rollouts, output=tmp_path / "a", exact=exact)
    stored = artifact.rollout(0)
    assert stored.sampled_logprobs.tolist()[:2] == [0, 0] == stored.sampled_logprobs.tolist()[3:] * 2
    assert stored.sampled_logprobs[2] == pytest.approx(-200, abs=0.5)
    assert stored.reference_logprobs is not None and stored.reference_logprobs.tolist() == [0] * 4
    assert stored.topk is not None
    assert stored.topk.ids.tolist() == [11, 12, 13, 51] and stored.topk.logprobs.tolist() == [0] * 4
    np.testing.assert_allclose(stored.topk.tail_logprobs, np.log(VOCAB_SIZE - 1) - 200, atol=0.5)
    assert lopd_store.verify(artifact.path).ok


# bfloat16


def test_logits_that_tie_in_bfloat16_make_entries_in_order_and_no_id_twice(teacher_dir: Path, tmp_path: Path) -> None:
    rollouts = save_rollouts(tmp_path / "r.parquet", random_pairs([(3, 40), (5, 30)]))
    artifact = lopd_store.build(
        teacher=teacher_dir,
        rollouts=rollouts,
        output=tmp_path / "a",
        dtype="bfloat16",
        exact=True,
        k_max=40,
        coverage=1,
    )
    topk = artifact.part(0).topk
    assert topk is not None and set(topk.counts.tolist()) == {40}
    ids, logprobs = topk.ids.reshape(-1, 40).astype(np.int64), topk.logprobs.reshape(-1, 40)
    ties = logprobs[:, 1:] == logprobs[:, :-1]
    assert ties.any(axis=1).mean() > 0.9, "most positions must have ties, or this shows nothing"
    assert ((logprobs[:, 1:] < logprobs[:, :-1]) | (ties & (ids[:, 1:] > ids[:, :-1]))).all()
    assert all(len(set(row)) == 40 for row in ids.tolist())
    assert lopd_store.verify(artifact.path).ok


# Numbers of single positions


@pytest.mark.parametrize("likeliest", [-20.0, -90.0, -102.0, -150.0])  # float32 has no probability below e^-104
def test_a_tail_too_small_for_a_float32_probability_is_still_measured(likeliest: float) -> None:
    logits = np.array([0.0, likeliest, likeliest - 1, -400.0])
    found = score_logits(torch.tensor(logits, dtype=torch.float32)[None], torch.tensor([0]), 1, 4)
    assert found["tail_logprobs"][0] == pytest.approx(tail(log_softmax(logits), [0]), abs=TOLERANCE)


def test_a_sampled_token_outside_the_top_k_keeps_its_own_logprob() -> None:
    logits = np.array([5.0, 4.0, 3.0, -9.0])
    found = score_logits(torch.tensor(logits, dtype=torch.float32)[None], torch.tensor([3]), 2, 4)
    assert sorted(found["ids"][0].tolist()) == [0, 1]
    assert found["sampled_logprobs"][0] == pytest.approx(log_softmax(logits)[3], abs=TOLERANCE)


def test_an_impossible_token_leaves_the_entropy_a_number() -> None:
    found = score_logits(torch.tensor([[0.0, 0.0, -torch.inf]]), torch.tensor([0]), 2, 3)
    assert found["entropies"][0] == pytest.approx(np.log(2))
    assert found["tail_logprobs"][0] == -np.inf


def test_equal_logits_keep_the_lowest_ids() -> None:
    logits = torch.tensor([[0.0, 1.0, 0.0, 0.0, 0.0]])
    found = score_logits(logits, torch.tensor([0]), 3, 5)
    assert sorted(found["ids"][0].tolist()) == [0, 1, 2]


def test_batches_stay_within_their_padded_size_and_hold_every_rollout_once() -> None:
    found = list(batches(ROLLOUTS, 40))
    lengths = [len(one.token_ids) for one in ROLLOUTS]
    assert sorted(index for batch in found for index in batch) == list(range(len(ROLLOUTS)))
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 40 for batch in found)


def test_an_unknown_engine_is_refused_with_those_there_are(teacher_dir: Path) -> None:
    with pytest.raises(
        lopd_store.InputError, match="there is no engine `abacus`\n  expected  transformers, vllm, http"
    ):
        load("abacus", str(teacher_dir), vocab_size=300, dtype="float32", device="cpu", batch_tokens=8)


# From scores to a part


@pytest.mark.parametrize("coverage", [0.9, 0.99, 1.0])
@pytest.mark.parametrize("k_min", [1, 5])
def test_an_exact_artifact_holds_what_the_dense_twin_says(
    teacher_dir: Path, rollouts_path: Path, twin: list[np.ndarray], tmp_path: Path, coverage: float, k_min: int
) -> None:
    artifact = lopd_store.build(
        teacher=teacher_dir,
        rollouts=rollouts_path,
        output=tmp_path / "exact",
        exact=True,
        k_min=k_min,
        k_max=50,
        coverage=coverage,
    )
    for index, dense in enumerate(twin):
        stored = artifact.rollout(index)
        assert stored.topk is not None
        ks = [adaptive_k(row, k_min=k_min, k_max=50, coverage=coverage, vocab_size=VOCAB_SIZE) for row in dense]
        assert stored.topk.counts.tolist() == ks
        ids = [best(row, k, VOCAB_SIZE) for row, k in zip(dense, ks, strict=True)]
        assert stored.topk.ids.tolist() == [id for row in ids for id in row]
        wanted = [row[id] for row, kept in zip(dense, ids, strict=True) for id in kept]
        np.testing.assert_allclose(stored.topk.logprobs, wanted, atol=TOLERANCE)
        tails = [tail(row, kept) for row, kept in zip(dense, ids, strict=True)]
        np.testing.assert_allclose(stored.topk.tail_logprobs, tails, atol=TOLERANCE)
        sampled = [row[id] for row, id in zip(dense, stored.response_ids, strict=True)]
        np.testing.assert_allclose(stored.sampled_logprobs, sampled, atol=TOLERANCE)


def test_a_compact_artifact_is_within_its_bounds_of_the_exact_one(
    teacher_dir: Path, rollouts_path: Path, sealed: Path, tmp_path: Path
) -> None:
    exact = lopd_store.build(
        teacher=teacher_dir,
        rollouts=rollouts_path,
        output=tmp_path / "exact",
        exact=True,
        k_max=40,
        part_positions=PART_POSITIONS,
    )
    compact = lopd_store.open(sealed)
    encoding = compact.manifest.encoding
    for wanted, found in zip(exact.parts(), compact.parts(), strict=True):
        assert wanted.topk is not None and found.topk is not None
        np.testing.assert_array_equal(wanted.topk.counts, found.topk.counts)
        assert_rounded(found.sampled_logprobs, wanted.sampled_logprobs, encoding.sampled_grid)
        assert_rounded(found.topk.logprobs, wanted.topk.logprobs, encoding.topk_grid)
        assert_rounded(found.topk.tail_logprobs, wanted.topk.tail_logprobs, encoding.topk_grid)


def assert_rounded(found: np.ndarray, exact: np.ndarray, grid: Grid | None) -> None:
    """Each difference is at most the greatest error of the level that was stored."""
    assert grid is not None
    assert (np.abs(found - exact) <= grid.half_steps[grid.to_codes(found)] + 1e-6).all()
    assert np.abs(found - exact).max() <= grid.bound + 1e-6


def ignore(tokens: int, positions: int) -> None:
    pass


def make_small_plan(teacher_dir: Path, path: Path, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Plan:
    return make_plan(
        teacher=str(teacher_dir),
        rollouts=save_rollouts(path / "small.parquet", pairs),
        sft=None,
        encoding=make_encoding(k_max=4),
        scoring=Scoring(engine="transformers", dtype="float32"),
    )


@pytest.mark.parametrize(
    ("prompt", "response", "said"),
    [
        ([7], [300], "rollout 1 has an id that the teacher's tokenizer does not know\n  expected  below 300"),
        ([300], [7], "rollout 1 has an id that the teacher's tokenizer does not know"),
        ([], [7], "rollout 1 has no prompt"),
        ([], [], "rollout 1 has no prompt"),
        ([7] * 200, [8] * 57, "rollout 1 is longer than the teacher's context\n  expected  at most 256 tokens"),
    ],
)
def test_a_rollout_that_cannot_be_scored_is_named_by_its_row(
    teacher_dir: Path, tmp_path: Path, prompt: list[int], response: list[int], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        make_small_plan(teacher_dir, tmp_path, [([7], [8]), (prompt, response)])


def test_a_rollout_as_long_as_the_context_is_scored(teacher_dir: Path, tmp_path: Path) -> None:
    plan = make_small_plan(teacher_dir, tmp_path, [([7] * 200, [8] * 56)])
    part = score_part(plan, load_teacher(teacher_dir), 0, ignore).part
    assert len(part.sampled_logprobs) == 56


class FaultyTeacher:
    """An engine that answers wrongly: it leaves out the first row, or gives what is not a number."""

    scoring: Scoring = Scoring(engine="faulty", dtype="float32")
    context_length: int | None = None

    def __init__(self, scores: RolloutScores) -> None:
        self._scores = scores

    def score(self, rollouts: Sequence[Rollout], k: int) -> Iterator[tuple[int, RolloutScores]]:
        yield 0, self._scores


GOOD_SCORES = RolloutScores(
    sampled_logprobs=np.array([-1.0, -2.0], np.float32),
    candidates=Candidates(
        ids=np.array([[7, 8], [8, 9]], np.uint32),
        logprobs=np.array([[-1.0, -2.0], [-0.5, -2.0]], np.float32),
        tail_logprobs=np.array([-0.7, -1.4], np.float32),
    ),
    entropies=np.array([1.0, 1.0], np.float32),
)


def good_scores_but(name: str, value: Any) -> RolloutScores:
    """The good scores with one other array, of theirs or of their candidates."""
    if name in RolloutScores.__dataclass_fields__:
        return replace(GOOD_SCORES, **{name: value})
    return replace(GOOD_SCORES, candidates=replace(GOOD_SCORES.candidates, **{name: value}))


def good(name: str) -> np.ndarray:
    found: np.ndarray = getattr(GOOD_SCORES if hasattr(GOOD_SCORES, name) else GOOD_SCORES.candidates, name)
    return found


@pytest.mark.parametrize("name", ["sampled_logprobs", "ids", "logprobs", "tail_logprobs"])
def test_a_teacher_that_leaves_out_a_row_is_refused(teacher_dir: Path, tmp_path: Path, name: str) -> None:
    plan = make_small_plan(teacher_dir, tmp_path, [([7], [8, 9])])
    faulty = FaultyTeacher(good_scores_but(name, good(name)[1:]))
    with pytest.raises(DataError, match="rollout 0: the teacher gave another number of rows\n  expected  2"):
        score_part(plan, faulty, 0, ignore)


@pytest.mark.parametrize("name", ["sampled_logprobs", "logprobs", "tail_logprobs"])
def test_a_teacher_that_gives_no_number_is_refused(teacher_dir: Path, tmp_path: Path, name: str) -> None:
    plan = make_small_plan(teacher_dir, tmp_path, [([7], [8, 9])])
    values = good(name).copy()
    values.flat[0] = np.nan
    faulty = FaultyTeacher(good_scores_but(name, values))
    with pytest.raises(DataError, match="rollout 0: the teacher gave log-probs that are not numbers"):
        score_part(plan, faulty, 0, ignore)


def test_a_logprob_a_hair_above_zero_is_stored_as_zero(teacher_dir: Path, tmp_path: Path) -> None:
    plan = replace(make_small_plan(teacher_dir, tmp_path, [([7], [8, 9])]), encoding=make_encoding(k_max=4, exact=True))
    sampled = np.array([1e-7, -2.0], np.float32)
    part = score_part(plan, FaultyTeacher(replace(GOOD_SCORES, sampled_logprobs=sampled)), 0, ignore).part
    assert part.sampled_logprobs.tolist() == [0.0, -2.0]


# Where memory runs out


def with_room_for(teacher: TransformersTeacher, rows: int) -> list[int]:
    """Let the body of a teacher ask for more than any machine has when a batch has more rows; notes how many had."""
    seen: list[int] = []
    (split,) = teacher._splits

    def body(*, input_ids: torch.Tensor, use_cache: bool) -> Any:
        seen.append(len(input_ids))
        if len(input_ids) > rows:
            torch.empty(1 << 50)
        return split.body(input_ids=input_ids, use_cache=use_cache)

    teacher._splits = [replace(split, body=body)]
    return seen


def test_where_memory_runs_out_batches_are_halved_and_the_scores_are_those_of_such_batches(teacher_dir: Path) -> None:
    rollouts = [rollout(*pair) for pair in random_pairs([(5, 15)] * 9)]
    teacher = load_teacher(teacher_dir, batch_tokens=8 * 20)
    seen = with_room_for(teacher, 3)
    for _ in range(2):  # a part begins with whole batches, whatever happened in the one before
        found = dict(teacher.score(rollouts, K))
        for index, wanted in enumerate(score(teacher_dir, rollouts, batch_tokens=2 * 20)):
            np.testing.assert_array_equal(found[index].sampled_logprobs, wanted.sampled_logprobs)
            np.testing.assert_array_equal(found[index].candidates.ids, wanted.candidates.ids)
    assert seen == 2 * [8, 4, 2, 2, 2, 2, 1]


def test_a_rollout_that_fits_into_no_memory_is_said(teacher_dir: Path) -> None:
    teacher = load_teacher(teacher_dir)
    with_room_for(teacher, 0)
    with pytest.raises(UnavailableError, match=r"a rollout of 12 tokens does not fit into the memory(?s:.)*hint: try"):
        list(teacher.score([rollout([7] * 4, [8] * 8)], K))


def test_a_teacher_in_several_processes_does_not_halve_its_batches_alone(teacher_dir: Path) -> None:
    teacher = load_teacher(teacher_dir)
    with_room_for(teacher, 0)
    teacher._in_step = True
    with pytest.raises(UnavailableError, match=r"2 rollouts of up to 12 tokens do not fit(?s:.)*smaller `--batch-tok"):
        list(teacher.score([rollout([7] * 4, [8] * 8)] * 2, K))
    with pytest.raises(UnavailableError, match=r"a rollout of 12 tokens does not fit(?s:.)*hint: try `--dtype"):
        list(teacher.score([rollout([7] * 4, [8] * 8)], K))


def test_an_error_that_is_not_about_memory_passes_through(teacher_dir: Path) -> None:
    teacher = load_teacher(teacher_dir)
    with pytest.raises(IndexError):  # the engine is for ids that the model has; `build` has looked
        list(teacher.score([rollout([7], [400])], K))


# Devices


def test_a_teacher_on_whatever_devices_there_are_gives_the_scores_of_one(
    teacher_dir: Path, scores: list[RolloutScores]
) -> None:
    spread = TransformersTeacher(
        str(teacher_dir), vocab_size=VOCAB_SIZE, dtype="float32", device=models.pick_device("auto"), batch_tokens=64
    )
    for index, found in spread.score(ROLLOUTS, K):
        np.testing.assert_array_equal(found.sampled_logprobs, scores[index].sampled_logprobs)
        np.testing.assert_array_equal(found.candidates.logprobs, scores[index].candidates.logprobs)


@pytest.mark.parametrize(
    ("gpus", "size", "wanted"),
    [
        (["0", "1"], 1, [["0"], ["1"], ["0"]]),
        (["3"], 1, [["3"], ["3"], ["3"]]),
        (["GPU-a", "5", "6"], 1, [["GPU-a"], ["5"], ["6"]]),
        (["4", "5", "6", "7"], 2, [["4", "5"], ["6", "7"], ["4", "5"]]),
    ],
)
def test_every_worker_has_gpus_of_its_own_where_there_are_enough(
    gpus: list[str], size: int, wanted: list[list[str]]
) -> None:
    assert [gpus_of_worker(index, gpus, size) for index in range(3)] == wanted
