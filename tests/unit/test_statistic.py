"""The audit of what is stored: against its float64 twin, and against draws whose origin is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lopd_store.errors import ArtifactError
from lopd_store.statistic import LEAST_POSITIONS, SftAudit, Statistic, of_stored
from tests.records import DATA

HONEST = Statistic(positions=5000, outside=0, score=12.5, variance=6000.0)


def twin(outcomes: list[float], drawn: int) -> tuple[float, float]:
    """(log p + H, variance) of one position whose outcomes have these weights, outcome by outcome."""
    mass = [weight / math.fsum(outcomes) for weight in outcomes]
    entropy = -math.fsum(p * math.log(p) for p in mass if p > 0)
    variance = math.fsum(p * (math.log(p) + entropy) ** 2 for p in mass if p > 0)
    return (math.log(mass[drawn]) if mass[drawn] > 0 else -math.inf) + entropy, variance


def random_positions(count: int, *, seed: int = 0) -> tuple[list[list[float]], list[float], list[int]]:
    """Log-probs of 1 to 6 entries, log-probs of tails, and which entry was drawn, or -1 for none."""
    generator = np.random.default_rng(seed)
    entries, tails, drawn = [], [], []
    for _ in range(count):
        weights = generator.random(int(generator.integers(2, 8))) ** 3 + 1e-4
        logs = np.log(weights / weights.sum() * generator.uniform(0.97, 1.03))  # rounding has moved the sum
        entries.append([float(np.float32(value)) for value in logs[:-1]])
        tails.append(float(np.float32(logs[-1])))
        drawn.append(int(generator.integers(-1, len(logs) - 1)))
    return entries, tails, drawn


def audited(
    entries: list[list[float]], tails: list[float], drawn: list[int], temperature: float = 1.0, **changes: object
) -> Statistic:
    is_response = [number == chosen for row, chosen in zip(entries, drawn, strict=True) for number in range(len(row))]
    counted = np.array(changes.get("counted", [True] * len(entries)), np.bool_)
    return of_stored(
        np.array([len(row) for row in entries], np.uint16),
        np.array([value for row in entries for value in row], np.float32),
        np.array(tails, np.float32),
        np.array(is_response, np.bool_),
        counted,
        temperature,
    )


def test_at_temperature_1_the_tail_is_one_more_outcome() -> None:
    entries, tails, drawn = random_positions(20_000)  # several blocks
    rows = [
        twin([*map(math.exp, row), math.exp(tail)], chosen)
        for row, tail, chosen in zip(entries, tails, drawn, strict=True)
    ]
    found = audited(entries, tails, drawn)
    assert (found.positions, found.outside) == (20_000, 0)
    assert found.score == pytest.approx(math.fsum(score for score, _ in rows), abs=1e-6)
    assert found.variance == pytest.approx(math.fsum(variance for _, variance in rows), abs=1e-6)


@pytest.mark.parametrize("temperature", [0.6, 1.5])
def test_at_another_temperature_only_drawn_entries_count(temperature: float) -> None:
    entries, tails, drawn = random_positions(300)
    rows = [
        twin([math.exp(value / temperature) for value in row], chosen)
        for row, chosen in zip(entries, drawn, strict=True)
        if chosen >= 0
    ]
    found = audited(entries, tails, drawn, temperature)
    assert found.positions == len(rows) < 300
    assert found.score == pytest.approx(math.fsum(score for score, _ in rows), abs=1e-6)
    assert found.variance == pytest.approx(math.fsum(variance for _, variance in rows), abs=1e-6)


def test_a_token_that_the_policy_never_samples_is_outside() -> None:
    found = audited([[0.0, -math.inf], [0.0], [-1.0]], [-math.inf, -math.inf, math.log1p(-math.exp(-1))], [1, -1, 0])
    assert (found.positions, found.outside) == (3, 2)
    assert math.isfinite(found.score) and math.isfinite(found.variance)


def test_a_position_of_which_nothing_is_known_does_not_count() -> None:
    assert audited([[-math.inf]], [-math.inf], [0]).positions == 0
    assert audited([[-math.inf]], [0.0], [0], 0.5).positions == 0


def test_what_the_loss_mask_excludes_does_not_count() -> None:
    entries, tails, drawn = random_positions(4)
    some = audited(entries, tails, drawn, counted=[True, False, True, False])
    alone = audited(entries[::2], tails[::2], drawn[::2])
    assert some == alone


def test_no_positions_give_sums_of_nothing() -> None:
    assert audited([], [], []) == Statistic(positions=0, outside=0, score=0.0, variance=0.0)


def test_draws_from_grouped_outcomes_are_standard_normal() -> None:
    """Tokens are drawn from 40 ids, of which 5 are stored and 35 are the tail: z is standard normal all the same."""
    generator = np.random.default_rng(1)
    logits = np.sort(generator.normal(0, 2, (LEAST_POSITIONS, 40)))[:, ::-1]
    mass = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    entries, tails = np.log(mass[:, :5]).tolist(), np.log(mass[:, 5:].sum(axis=1)).tolist()
    cumulative = mass.cumsum(axis=1)
    z = []
    for _ in range(400):
        ids = (generator.random((LEAST_POSITIONS, 1)) > cumulative).sum(axis=1)
        z.append(audited(entries, tails, np.where(ids < 5, ids, -1).tolist()).z)
    assert abs(np.mean(z)) < 4 / 20 and 0.85 < np.std(z) < 1.15 and np.abs(z).max() < 4


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "consistent"),
        ({"score": 400.0}, "inconsistent"),
        ({"score": -400.0}, "inconsistent"),
        (
            {"positions": 100_000_000, "score": 500_000.0, "variance": 2e8},
            "consistent",
        ),  # z 35, yet 0.005 nat per token
        ({"outside": 6}, "inconsistent"),
        ({"outside": 5}, "consistent"),
        ({"positions": LEAST_POSITIONS - 1}, "too little"),
        ({"variance": 0.0}, "too little"),
    ],
)
def test_the_verdict_follows_from_the_sums(changes: dict[str, float], verdict: str) -> None:
    assert Statistic(**vars(HONEST) | changes).verdict == verdict


def test_sums_come_back_from_their_json_rounded() -> None:
    exact = Statistic(positions=3, outside=1, score=-1e-9, variance=1 / 3)
    assert Statistic.from_json(exact.sums(), where="x") == Statistic(
        positions=3, outside=1, score=0.0, variance=0.333333
    )
    audit = SftAudit(data=DATA, temperature=0.7, top_p=1.0, found=HONEST)
    assert SftAudit.from_json(audit.to_json(), where="x") == audit


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"positions": -1}, "`x` has no counts of positions"),
        ({"positions": True}, "`x` has no counts of positions"),
        ({"outside": 5001}, "`x` has no counts of positions"),
        ({"score": 1}, "`x.score` is not a sum"),
        ({"variance": -1.0}, "`x.variance` is not a sum"),
        ({"z": 1.0}, "`x` has unknown members: `z`"),
    ],
)
def test_a_json_value_that_is_no_statistic_is_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ArtifactError, match=said):
        Statistic.from_json(HONEST.sums() | changes, where="x")
