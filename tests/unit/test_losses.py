"""Losses against float64 twins that hold the whole distribution."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from lopd_train import losses
from lopd_train.losses import Categories
from tests.unit import dense_losses as twin
from tests.unit.dense_losses import Floats

VOCABULARY = 7
STORED = [[2], [0, 6, 3], [5, 1], list(range(VOCABULARY))]  # ids per position
TARGETS = [2, 5, 0, 3]
POSITIONS = len(STORED)
SETTINGS: list[tuple[str, Callable[[Categories, Categories], Tensor], Callable[[Floats, Floats], float]]] = [
    ("reverse", losses.reverse_kl, lambda q, p: twin.kl(q, p)),
    ("forward", losses.forward_kl, lambda q, p: twin.kl(p, q)),
    ("jsd 0.5", lambda q, p: losses.jsd(q, p, 0.5), lambda q, p: twin.jsd(p, q, 0.5)),
    ("jsd 0.1", lambda q, p: losses.jsd(q, p, 0.1), lambda q, p: twin.jsd(p, q, 0.1)),
]
DIVERGENCES = pytest.mark.parametrize(
    ("loss", "dense"), [pair for _, *pair in SETTINGS], ids=[name for name, *_ in SETTINGS]
)


def logits(seed: int) -> Floats:
    return np.asarray(3 * np.random.default_rng(seed).standard_normal((POSITIONS, VOCABULARY)))


def categories(logits: Tensor) -> Categories:
    """What is stored of dense logits [positions, vocabulary]."""
    positions = torch.tensor([row for row, ids in enumerate(STORED) for _ in ids])
    ids = torch.tensor([id for row in STORED for id in row])
    logprobs, outside = torch.log_softmax(logits, dim=-1), torch.ones_like(logits, dtype=torch.bool)
    outside[positions, ids] = False
    rest = torch.where(outside, logprobs, -1e4).logsumexp(dim=-1)
    tail = torch.where(outside.any(dim=-1), rest, -torch.inf)
    return Categories(logprobs=logprobs[positions, ids], tail=tail, positions=positions)


def at_targets(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(TARGETS)[:, None])[:, 0]


def leaf(values: Floats) -> Tensor:
    return torch.from_numpy(values.copy()).requires_grad_()


def assert_close(actual: Tensor, expected: Floats, tolerance: float) -> None:
    torch.testing.assert_close(actual.detach(), torch.from_numpy(expected), rtol=tolerance, atol=tolerance)


def assert_agrees(
    loss: Callable[[Tensor], Tensor], dense: Callable[[Floats], Floats], at: Floats, tolerance: float = 1e-7
) -> None:
    """Values [positions] and the gradient of their weighted sum by the logits are those of the twin."""
    weights = np.linspace(-1, 2, POSITIONS)
    student = leaf(at)
    values = loss(student)
    assert_close(values, dense(at), 1e-10)
    (actual,) = torch.autograd.grad((values * torch.from_numpy(weights)).sum(), student)
    assert_close(actual, twin.gradient(lambda moved: float((dense(moved) * weights).sum()), at), tolerance)


# Over the stored distribution


@DIVERGENCES
def test_a_divergence_has_value_and_gradient_of_the_merged_categories(
    loss: Callable[[Categories, Categories], Tensor], dense: Callable[[Floats, Floats], float]
) -> None:
    teacher = logits(1)

    def expected(student: Floats) -> Floats:
        pairs = zip(student, teacher, STORED, strict=True)
        return np.array(
            [dense(twin.merged(twin.softmax(q), ids), twin.merged(twin.softmax(p), ids)) for q, p, ids in pairs]
        )

    assert_agrees(lambda q: loss(categories(q), categories(torch.from_numpy(teacher))), expected, logits(0))


@pytest.mark.parametrize("gap", [0, 100])  # between the stored ids and the others
@DIVERGENCES
def test_at_a_temperature_a_divergence_is_over_the_stored_ids_alone(
    loss: Callable[[Categories, Categories], Tensor], dense: Callable[[Floats, Floats], float], gap: float
) -> None:
    teacher, away, temperature = logits(1), logits(0), 2.5
    for row, ids in enumerate(STORED):
        away[row, ids] -= gap

    def actual(student: Tensor) -> Tensor:
        both = (categories(student), categories(torch.from_numpy(teacher)))
        return loss(*(values.tempered(temperature) for values in both))

    def expected(student: Floats) -> Floats:
        return np.array(
            [
                dense(*(twin.softened(twin.softmax(row), ids, temperature) for row in rows))
                for *rows, ids in zip(student, teacher, STORED, strict=True)
            ]
        )

    assert_agrees(actual, expected, away)


@DIVERGENCES
def test_a_divergence_of_a_student_equal_to_the_teacher_is_zero_and_flat(
    loss: Callable[[Categories, Categories], Tensor], dense: Callable[[Floats, Floats], float]
) -> None:
    student = leaf(logits(2))
    values = loss(categories(student), categories(torch.from_numpy(logits(2))))
    assert_close(values, np.zeros(POSITIONS), 1e-12)
    assert_close(torch.autograd.grad(values.sum(), student)[0], np.zeros((POSITIONS, VOCABULARY)), 1e-12)


def test_reverse_kl_of_what_is_stored_is_a_lower_bound_of_that_over_the_whole_vocabulary() -> None:
    student, teacher = logits(3), logits(4)
    stored = losses.reverse_kl(*(categories(torch.from_numpy(values)) for values in (student, teacher)))
    whole = [twin.kl(twin.softmax(q), twin.softmax(p)) for q, p in zip(student, teacher, strict=True)]
    assert all(0 < part < all_of_it for part, all_of_it in zip(stored.tolist()[:-1], whole[:-1], strict=True))
    assert stored[-1].item() == pytest.approx(whole[-1])  # there all of the vocabulary is stored


@DIVERGENCES
def test_a_student_that_has_left_the_stored_tokens_is_far_away_and_pulled_back(
    loss: Callable[[Categories, Categories], Tensor], dense: Callable[[Floats, Floats], float]
) -> None:
    teacher, away = logits(18), logits(18)
    for row, ids in enumerate(STORED[:-1]):
        teacher[row, ids] += 6
        away[row, ids] -= 6
    student, stored = leaf(away), categories(torch.from_numpy(teacher))
    there = categories(student)
    alone = torch.zeros(POSITIONS, dtype=torch.float64).index_add(
        0, there.positions, there.logprobs.exp() * (there.logprobs - stored.logprobs)
    )
    assert bool((alone[:-1] < 0).all())  # reverse KL of the stored tokens alone: clamped, it would say nothing
    values = loss(there, stored)
    (gradient,) = torch.autograd.grad(values.sum(), student)
    assert bool((values[:-1] > 0.05).all())
    for row, ids in enumerate(STORED[:-1]):
        assert float(gradient[row, ids].sum()) < -1e-5  # a step downhill gives the stored tokens more


@DIVERGENCES
def test_a_student_that_has_all_but_ruled_a_token_out_is_pulled_back_as_the_equation_says(
    loss: Callable[[Categories, Categories], Tensor], dense: Callable[[Floats, Floats], float]
) -> None:
    teacher, away = logits(19), logits(20)
    for row, ids in enumerate(STORED):
        away[row, ids[0]] -= 100

    def expected(student: Floats) -> Floats:
        pairs = zip(student, teacher, STORED, strict=True)
        return np.array(
            [dense(twin.merged(twin.softmax(q), ids), twin.merged(twin.softmax(p), ids)) for q, p, ids in pairs]
        )

    assert_agrees(lambda q: loss(categories(q), categories(torch.from_numpy(teacher))), expected, away, 1e-6)


def test_the_divergence_of_jensen_and_shannon_leads_from_forward_to_reverse_kl() -> None:
    student, teacher = (categories(torch.from_numpy(logits(seed))) for seed in (5, 6))
    tiny = 1e-6
    near_forward, near_reverse = (
        losses.jsd(student, teacher, tiny) / tiny,
        losses.jsd(student, teacher, 1 - tiny) / tiny,
    )
    torch.testing.assert_close(near_forward, losses.forward_kl(student, teacher), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(near_reverse, losses.reverse_kl(student, teacher), rtol=1e-3, atol=1e-6)
    assert bool((losses.jsd(student, teacher, 0.5) <= math.log(2)).all())


def test_normalising_takes_away_what_rounding_added() -> None:
    stored = categories(torch.from_numpy(logits(7)))
    moved = Categories(logprobs=stored.logprobs - 0.03, tail=stored.tail - 0.03, positions=stored.positions)
    torch.testing.assert_close(moved.normalised().logprobs, stored.logprobs)
    torch.testing.assert_close(moved.normalised().tail, stored.tail)


def one(logprobs: list[float], tail: float) -> Categories:
    return Categories(
        logprobs=torch.tensor(logprobs).requires_grad_(),
        tail=torch.tensor([tail]),
        positions=torch.zeros(len(logprobs), dtype=torch.int64),
    )


@DIVERGENCES
def test_a_divergence_stays_finite_where_one_side_rules_something_out(
    loss: Callable[[Categories, Categories], Tensor], dense: Callable[[Floats, Floats], float]
) -> None:
    half, quarter = math.log(0.5), math.log(0.25)
    for student, teacher in (
        (one([0.0], -math.inf), one([0.0], -math.inf)),
        (one([0.0], -math.inf), one([math.log(0.75)], quarter)),
        (one([math.log(0.75)], quarter), one([0.0], -math.inf)),
        (one([0.0, -math.inf], -math.inf), one([half, half], -math.inf)),
        (one([half, half], -math.inf), one([0.0, -math.inf], -math.inf)),
    ):
        value = loss(student, teacher)
        assert -1e-6 <= value.item() < 100
        assert bool(torch.autograd.grad(value.sum(), student.logprobs)[0].isfinite().all())


def test_a_position_without_entries_softens_to_nothing_and_costs_nothing() -> None:
    empty = Categories(
        logprobs=torch.tensor([-1.0, -2.0]).requires_grad_(),
        tail=torch.tensor([0.0, -3.0]),
        positions=torch.tensor([1, 1]),
    )
    soft = empty.tempered(2.0)
    assert losses.forward_kl(soft, soft)[0].item() == 0
    (gradient,) = torch.autograd.grad(soft.logprobs[0], empty.logprobs)
    assert bool(gradient.isfinite().all())


# At the sampled token


@pytest.mark.parametrize("power", [None, 0.5, 5.0])
@pytest.mark.parametrize("clip", [None, 0.2])
def test_the_sampled_objective_has_the_gradient_of_a_constant_advantage(
    power: float | None, clip: float | None
) -> None:
    student, teacher = logits(8), logits(9)
    q, p = (
        np.array([twin.softmax(row)[x] for row, x in zip(rows, TARGETS, strict=True)]) for rows in (student, teacher)
    )
    advantage = np.log(p / q) if power is None else p**power - q**power
    advantage = advantage if clip is None else np.clip(advantage, -clip, clip)

    def actual(values: Tensor) -> Tensor:
        found = losses.advantages(at_targets(values), torch.from_numpy(np.log(p)), power=power, clip=clip)
        assert_close(found, advantage, 1e-12)
        return losses.sampled(at_targets(values), found)

    def expected(values: Floats) -> Floats:
        return np.array(
            [-a * np.log(twin.softmax(row)[x]) for a, row, x in zip(advantage, values, TARGETS, strict=True)]
        )

    student_leaf = leaf(student)
    (found,) = torch.autograd.grad(actual(student_leaf).sum(), student_leaf)
    assert_close(found, twin.gradient(lambda moved: float(expected(moved).sum()), student), 1e-7)


def test_a_power_advantage_is_bounded_keeps_its_sign_and_tends_to_the_difference_of_the_logs() -> None:
    student, teacher = torch.tensor([-50.0, -0.1, -3.0]), torch.tensor([-0.5, -60.0, -3.5])
    plain, bounded = losses.advantages(student, teacher), losses.advantages(student, teacher, power=5.0)
    assert torch.equal(plain.sign(), bounded.sign())
    assert bool((bounded.abs() <= 1).all())
    small = losses.advantages(student.double(), teacher.double(), power=1e-7) / 1e-7
    torch.testing.assert_close(small, plain.double(), rtol=1e-4, atol=1e-4)


def test_the_sampled_objective_is_in_expectation_the_gradient_of_reverse_kl() -> None:
    student, teacher = leaf(logits(10)[:1]), torch.log_softmax(torch.from_numpy(logits(11)[0]), dim=-1)
    q = torch.log_softmax(student, dim=-1)[0]
    expected = twin.gradient(lambda at: twin.kl(twin.softmax(at[0]), teacher.exp().numpy()), logits(10)[:1])
    mean = (q.detach().exp() * losses.sampled(q, losses.advantages(q, teacher))).sum()
    assert_close(torch.autograd.grad(mean, student)[0], expected, 1e-7)


def test_advantages_carry_no_gradient_and_are_zero_where_both_agree() -> None:
    logprobs = torch.tensor([-0.5, 0.0], requires_grad=True)
    for power in (None, 5.0):
        difference = losses.advantages(logprobs, torch.tensor([-0.5, 0.0]), power=power)
        assert not difference.requires_grad
        assert difference.tolist() == [0.0, 0.0]


def test_a_teacher_logprob_of_zero_is_a_certainty_and_not_a_gap() -> None:
    student = torch.tensor([-2.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(losses.sampled(student, losses.advantages(student, torch.tensor([0.0]))), student)
    assert gradient.item() == -2.0


def test_the_clipped_objective_begins_as_the_sampled_one() -> None:
    student, advantages = at_targets(leaf(logits(12))), torch.tensor([1.0, -1.0, 0.5, 0.0], dtype=torch.float64)
    plain, clipped = (
        torch.autograd.grad(values.sum(), student, retain_graph=True)[0]
        for values in (
            losses.sampled(student, advantages),
            losses.sampled_clipped(student, student.detach(), advantages, 0.2),
        )
    )
    torch.testing.assert_close(clipped, plain)


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"),
    [
        (1.3, 2.0, 0.0),  # far enough the way it should go
        (0.7, -2.0, 0.0),
        (0.7, 2.0, -0.7 * 2.0),  # the wrong way: pulled back in full
        (1.3, -2.0, 1.3 * 2.0),
        (1.1, 2.0, -1.1 * 2.0),
    ],
)
def test_the_clipped_objective_stops_where_the_ratio_has_moved_enough(
    ratio: float, advantage: float, slope: float
) -> None:
    old = torch.tensor([-2.0], dtype=torch.float64)
    student = (old + math.log(ratio)).requires_grad_()
    value = losses.sampled_clipped(student, old, torch.tensor([advantage], dtype=torch.float64), 0.2)
    expected = -min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
    assert value.item() == pytest.approx(expected)
    assert torch.autograd.grad(value, student)[0].item() == pytest.approx(slope)


def test_cross_entropy_is_the_negative_logprob() -> None:
    assert losses.cross_entropy(torch.tensor([-0.25, -1.0])).tolist() == [0.25, 1.0]


# Off-policy


def test_weighted_by_token_ratios_the_references_tokens_give_the_gradient_of_the_students() -> None:
    student, reference, teacher = leaf(logits(13)[:1]), logits(14)[0], logits(15)[0]
    q = torch.log_softmax(student, dim=-1)[0]
    r, p = (torch.log_softmax(torch.from_numpy(values), dim=-1) for values in (reference, teacher))
    weights = losses.token_ratios(q, r)
    assert not weights.requires_grad
    mean = (r.exp() * weights * losses.sampled(q, losses.advantages(q, p))).sum()  # over x ~ r
    expected = twin.gradient(lambda at: twin.kl(twin.softmax(at[0]), p.exp().numpy()), logits(13)[:1])
    assert_close(torch.autograd.grad(mean, student)[0], expected, 1e-7)


def test_ratios_are_capped_and_those_of_a_rollout_are_the_product_over_its_tokens() -> None:
    student, reference = torch.tensor([0.0, -1.0, -2.0]), torch.tensor([-3.0, -1.0, -1.5])
    assert losses.token_ratios(student, reference, cap=2.0).tolist() == pytest.approx([2.0, 1.0, math.exp(-0.5)])
    sums = torch.tensor([-0.5, 4.0])
    assert losses.sequence_ratios(sums).tolist() == pytest.approx([math.exp(-0.5), math.exp(4.0)])
    assert losses.sequence_ratios(sums, cap=2.0).tolist() == pytest.approx([math.exp(-0.5), 2.0])
    assert bool(losses.sequence_ratios(torch.tensor([1e6])).isfinite().all())


def test_the_effective_sample_size_counts_equal_weights_once_each_and_a_lone_one_once() -> None:
    def size(*weights: float) -> float:
        values = np.array(weights)
        return losses.effective_sample_size(float(values.mean()), float((values**2).mean()))

    assert size(0.3, 0.3, 0.3, 0.3) == pytest.approx(1)
    assert size(5, 0, 0, 0) == pytest.approx(1 / 4)
    assert size(0, 0) == 0
    assert size(1, 2, 3) == pytest.approx(36 / (3 * 14))


def test_drift_is_in_expectation_the_kl_from_the_reference_to_the_student_and_never_negative() -> None:
    q, r = (torch.log_softmax(torch.from_numpy(logits(seed)[0]), dim=-1) for seed in (16, 17))
    values = losses.drift(q, r)
    assert bool((values >= 0).all())
    assert float((r.exp() * values).sum()) == pytest.approx(twin.kl(r.exp().numpy(), q.exp().numpy()), rel=1e-9)
    assert losses.drift(r, r).tolist() == [0.0] * VOCABULARY
