"""The audit against its float64 twin, and against text whose origin is known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import lopd_store
from lopd_store.audit import score_and_variance
from lopd_store.errors import DataError, InputError
from lopd_store.rollouts import RolloutsFile, write_rollouts
from lopd_store.statistic import LEAST_POSITIONS, Statistic, add_up
from tests.artifacts import random_pairs, save_rollouts


def twin(logits: np.ndarray, target: int, temperature: float, top_p: float) -> tuple[float, float]:
    """(log p + H, variance) of one position, token by token."""
    mass = np.exp((logits - logits.max()) / temperature)
    mass /= mass.sum()
    kept, reached = {}, 0.0
    for id in sorted(range(len(mass)), key=lambda id: -mass[id]):
        if reached >= top_p:
            break
        kept[id] = mass[id]
        reached += mass[id]
    total = sum(kept.values())
    logs = {id: math.log(value / total) for id, value in kept.items()}
    entropy = -sum(kept[id] / total * log for id, log in logs.items())
    variance = sum(kept[id] / total * (log + entropy) ** 2 for id, log in logs.items())
    return logs.get(target, -math.inf) + entropy, variance


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 1.0])
def test_score_and_variance_equal_the_twin(temperature: float, top_p: float) -> None:
    generator = np.random.default_rng(0)
    logits, targets = generator.normal(0, 3, (40, 30)), generator.integers(0, 30, 40)
    found = score_and_variance(torch.from_numpy(logits).float(), torch.from_numpy(targets), temperature, top_p)
    rows = [twin(row, int(target), temperature, top_p) for row, target in zip(logits, targets, strict=True)]
    np.testing.assert_allclose(found["score"], [score for score, _ in rows], atol=1e-5)
    np.testing.assert_allclose(found["variance"], [variance for _, variance in rows], atol=1e-5)


def test_at_temperature_zero_only_the_likeliest_token_is_possible() -> None:
    found = score_and_variance(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.tensor([1, 0]), 0.0, 1.0)
    assert found["score"].tolist() == [0.0, -math.inf] and found["variance"].tolist() == [0.0, 0.0]


def test_draws_from_the_distribution_itself_are_standard_normal() -> None:
    """2,000 sets of 300 positions: mean, spread and tails of z are those of a standard normal."""
    generator = np.random.default_rng(1)
    logits = generator.normal(0, 3, (300, 50)).astype(np.float32)
    mass = np.exp(logits - logits.max(axis=1, keepdims=True))
    cumulative = np.cumsum(mass / mass.sum(axis=1, keepdims=True), axis=1)
    every_id = torch.arange(50).expand(300, 50)
    found = score_and_variance(torch.from_numpy(logits), every_id, 1.0, 1.0)
    every, variance = found["score"], found["variance"]
    draws = (generator.random((2000, 300, 1)) > cumulative).sum(axis=2).clip(max=49)
    z = np.take_along_axis(every[None], draws[..., None], axis=2)[..., 0].sum(axis=1) / math.sqrt(variance.sum())
    assert abs(z.mean()) < 4 / math.sqrt(2000) and abs(z.std() - 1) < 0.07
    assert (np.abs(z) > 4).sum() <= 2  # a little skew is left at 300 positions
    assert 0.03 < (np.abs(z) > 1.96).mean() < 0.07


@pytest.fixture(scope="module")
def own_text(teacher_dir: Path, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About two thousand tokens that the teacher sampled."""
    return sample(teacher_dir, prompts_file, tmp_path_factory.mktemp("own") / "own.parquet")


def sample(model: Path, prompts: Path, output: Path, *, temperature: float = 1.0, top_p: float = 1.0) -> Path:
    return lopd_store.generate(
        model=model,
        prompts=prompts,
        output=output,
        max_response_tokens=64,
        samples_per_prompt=8,
        temperature=temperature,
        top_p=top_p,
    ).output


def test_a_models_own_samples_are_consistent_with_it(teacher_dir: Path, own_text: Path) -> None:
    found = lopd_store.audit(model=teacher_dir, data=own_text)
    assert found.verdict == "consistent" and found.overall.outside == 0
    assert found.overall.positions == sum(len(one.response_ids) for one in RolloutsFile(own_text).read())
    assert found.overall.interval[0] < 0 < found.overall.interval[1] or abs(found.overall.z) < 4


def test_another_models_samples_are_not(other_teacher_dir: Path, own_text: Path) -> None:
    found = lopd_store.audit(model=other_teacher_dir, data=own_text)
    assert found.verdict == "inconsistent" and found.overall.effect < -0.5


def test_sampling_parameters_are_those_of_the_record_and_others_are_noticed(
    teacher_dir: Path, prompts_file: Path, tmp_path: Path
) -> None:
    cool = sample(teacher_dir, prompts_file, tmp_path / "cool.parquet", temperature=0.6, top_p=0.9)
    assert lopd_store.audit(model=teacher_dir, data=cool).verdict == "consistent"
    warm = lopd_store.audit(model=teacher_dir, data=cool, temperature=1.0, top_p=1.0)
    assert warm.verdict == "inconsistent" and warm.overall.effect > 0.1  # likelier than samples at 1


def test_tokens_that_the_loss_mask_excludes_neither_count_nor_condemn(
    teacher_dir: Path, own_text: Path, tmp_path: Path
) -> None:
    sampled = RolloutsFile(own_text).read()
    strange = np.random.default_rng(0).integers(6, 300, 32).tolist()  # what a tool may answer
    found = []
    for name, flag in (("masked", False), ("unmasked", True)):
        rows = [
            {
                "prompt_ids": one.prompt_ids,
                "response_ids": [*one.response_ids, *strange],
                "loss_mask": [*one.loss_mask, *[flag] * len(strange)],
            }
            for one in sampled
        ]
        write_rollouts(tmp_path / f"{name}.parquet", rows, None)
        data = tmp_path / f"{name}.parquet"
        found.append(lopd_store.audit(model=teacher_dir, data=data, temperature=1, top_p=1).overall)
    alone = lopd_store.audit(model=teacher_dir, data=own_text).overall
    assert found[0].positions == alone.positions and found[0].score == pytest.approx(alone.score, abs=0.05)
    assert found[0].verdict == "consistent" and found[1].verdict == "inconsistent"


def test_tokens_outside_top_p_are_counted_and_condemn(teacher_dir: Path, own_text: Path) -> None:
    found = lopd_store.audit(model=teacher_dir, data=own_text, top_p=0.5)
    assert found.verdict == "inconsistent" and found.overall.outside > 100


def test_too_little_text_is_not_judged(teacher_dir: Path, own_text: Path) -> None:
    found = lopd_store.audit(model=teacher_dir, data=own_text, limit=1)
    assert found.overall.positions < LEAST_POSITIONS and found.verdict == "too little"


def test_text_that_does_not_say_how_it_was_sampled_needs_to_be_told(teacher_dir: Path, tmp_path: Path) -> None:
    path = save_rollouts(tmp_path / "rollouts.parquet", random_pairs([(3, 40)] * 8))
    with pytest.raises(InputError, match="does not say how it was sampled"):
        lopd_store.audit(model=teacher_dir, data=path)
    assert lopd_store.audit(model=teacher_dir, data=path, temperature=1, top_p=1).verdict == "inconsistent"


def test_ids_beyond_the_tokenizer_are_refused(teacher_dir: Path, tmp_path: Path) -> None:
    path = save_rollouts(tmp_path / "rollouts.parquet", [([1], [300])])
    with pytest.raises(DataError, match="has ids that the tokenizer"):
        lopd_store.audit(model=teacher_dir, data=path, temperature=1, top_p=1)


def test_sums_of_rollouts_are_those_of_all_positions() -> None:
    one = Statistic(positions=300, outside=1, score=2.0, variance=9.0)
    both = add_up([one, one])
    assert (both.positions, both.outside, both.score, both.variance) == (600, 2, 4.0, 18.0)
    assert both.z == pytest.approx(4 / math.sqrt(18)) and both.effect == pytest.approx(4 / 598)
    assert both.p_value == pytest.approx(math.erfc(both.z / math.sqrt(2)))
