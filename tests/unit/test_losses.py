"""Losses against float64 twins that hold the whole distribution."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lopd_train.losses import advantages, cross_entropy, reverse_kl_topk, sampled_objective

WIDTH, VOCABULARY, POSITIONS = 5, 7, 6


def float64(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def token_logprobs(states: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax(states @ head.T, dim=-1).gather(1, targets[:, None])[:, 0]


def test_sampled_objective_has_the_gradient_that_is_derived_by_hand() -> None:
    states, head = float64(POSITIONS, WIDTH, seed=0), float64(VOCABULARY, WIDTH, seed=1)
    teacher = -float64(POSITIONS, seed=2).abs()
    targets = torch.tensor([0, 6, 3, 3, 1, 2])
    states.requires_grad_()
    head.requires_grad_()
    sampled_objective(token_logprobs(states, head, targets), teacher).backward()  # type: ignore[no-untyped-call]

    with torch.no_grad():
        mass = torch.softmax(states @ head.T, dim=-1)
        advantage = teacher - mass.gather(1, targets[:, None])[:, 0].log()
        # d(-A log q(x)) / d logits = A (q - onehot(x)), as A is held constant.
        by_logits = advantage[:, None] * (mass - torch.nn.functional.one_hot(targets, VOCABULARY))
        torch.testing.assert_close(states.grad, by_logits @ head)
        torch.testing.assert_close(head.grad, by_logits.T @ states)


def test_sampled_objective_is_in_expectation_the_gradient_of_reverse_kl() -> None:
    logits, teacher = float64(1, VOCABULARY, seed=3), torch.log_softmax(float64(VOCABULARY, seed=4), dim=-1)

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, logits)[0]

    logits.requires_grad_()
    student = torch.log_softmax(logits, dim=-1)[0]
    kl = gradient((student.exp() * (student - teacher)).sum())
    mass = student.detach().exp()
    by_token = [
        mass[x] * gradient(sampled_objective(torch.log_softmax(logits, dim=-1)[0, x : x + 1], teacher[x : x + 1]))
        for x in range(VOCABULARY)
    ]
    torch.testing.assert_close(torch.stack(by_token).sum(dim=0), kl)


def test_advantages_carry_no_gradient_and_are_zero_where_both_agree() -> None:
    logprobs = torch.tensor([-0.5, 0.0], requires_grad=True)
    difference = advantages(logprobs, torch.tensor([-0.5, 0.0]))
    assert not difference.requires_grad
    assert difference.tolist() == [0.0, 0.0]


def test_a_teacher_logprob_of_zero_is_a_certainty_and_not_a_gap() -> None:
    student = torch.tensor([-2.0], requires_grad=True)
    sampled_objective(student, torch.tensor([0.0])).backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    assert student.grad.item() == -2.0


def test_cross_entropy_is_the_negative_sum() -> None:
    assert cross_entropy(torch.tensor([-0.25, -1.0])).item() == 1.25


def ragged(student: Tensor, teacher: Tensor, stored: list[list[int]]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The arguments of reverse_kl_topk from dense log-probs [positions, vocabulary]."""
    positions = torch.tensor([row for row, ids in enumerate(stored) for _ in ids], dtype=torch.long)
    ids = torch.tensor([id for row in stored for id in row], dtype=torch.long)
    outside = torch.ones_like(student, dtype=torch.bool)
    outside[positions, ids] = False
    tails = [torch.where(outside, logprobs.exp(), 0).sum(dim=-1).log() for logprobs in (student, teacher)]
    return student[positions, ids], tails[0], teacher[positions, ids], tails[1], positions


def dense(seed: int) -> Tensor:
    return torch.log_softmax(3 * float64(3, VOCABULARY, seed=seed), dim=-1)


def test_reverse_kl_over_the_whole_vocabulary_is_the_dense_one() -> None:
    student, teacher = dense(5), dense(6)
    actual = reverse_kl_topk(*ragged(student, teacher, [list(range(VOCABULARY))] * 3))
    torch.testing.assert_close(actual, (student.exp() * (student - teacher)).sum(dim=-1))


def test_reverse_kl_of_ragged_topk_is_that_of_the_merged_categories() -> None:
    student, teacher, stored = dense(7), dense(8), [[2], [0, 6, 3], [5, 1]]
    actual = reverse_kl_topk(*ragged(student, teacher, stored))
    for row, ids in enumerate(stored):
        q, p = student[row].exp().tolist(), teacher[row].exp().tolist()
        others = set(range(VOCABULARY)) - set(ids)
        merged = [(q[i], p[i]) for i in ids] + [(sum(q[i] for i in others), sum(p[i] for i in others))]
        assert actual[row].item() == pytest.approx(sum(a * math.log(a / b) for a, b in merged), rel=1e-12)
        assert 0 < actual[row].item() < (student[row].exp() * (student[row] - teacher[row])).sum().item()


def test_reverse_kl_has_the_gradient_of_the_merged_categories() -> None:
    logits, teacher, stored = float64(3, VOCABULARY, seed=12), dense(13), [[2], [0, 6, 3], [5, 1]]
    logits.requires_grad_()
    student = torch.log_softmax(logits, dim=-1)
    (actual,) = torch.autograd.grad(reverse_kl_topk(*ragged(student, teacher, stored)).sum(), logits)
    with torch.no_grad():  # d KL / d logit_v = q_v (r_v - sum_u q_u r_u), r = log of the ratio of v's category
        q = student.exp()
        ratio = torch.zeros_like(q)
        for row, ids in enumerate(stored):
            others = [v for v in range(VOCABULARY) if v not in ids]
            ratio[row, ids] = (student - teacher)[row, ids]
            ratio[row, others] = (q[row, others].sum() / teacher[row, others].exp().sum()).log()
        torch.testing.assert_close(actual, q * (ratio - (q * ratio).sum(dim=-1, keepdim=True)))


def test_reverse_kl_of_a_student_equal_to_the_teacher_is_zero() -> None:
    teacher = dense(9)
    torch.testing.assert_close(
        reverse_kl_topk(*ragged(teacher, teacher, [[1], [2, 3], [0, 4, 5]])), torch.zeros(3, dtype=torch.float64)
    )


def test_reverse_kl_does_not_depend_on_the_sum_that_rounding_gave_the_teacher() -> None:
    student, student_tail, teacher, tail, positions = ragged(dense(10), dense(11), [[0, 1], [2], [3, 4, 5]])
    expected = reverse_kl_topk(student, student_tail, teacher, tail, positions)
    moved = reverse_kl_topk(student, student_tail, teacher - 0.03, tail - 0.03, positions)
    torch.testing.assert_close(moved, expected)


def test_reverse_kl_stays_finite_where_a_tail_has_no_mass() -> None:
    nothing, some = torch.tensor([-math.inf]), torch.tensor([math.log(0.25)])
    one, positions = torch.tensor([0.0]), torch.tensor([0])
    assert reverse_kl_topk(one, nothing, one, nothing, positions).item() == 0.0
    assert reverse_kl_topk(one, nothing, torch.tensor([math.log(0.75)]), some, positions).item() > 0
    surprised = reverse_kl_topk(torch.tensor([math.log(0.75)]), some, one, nothing, positions).item()
    assert 10 < surprised < 100


def test_reverse_kl_stays_finite_where_the_student_rules_out_a_stored_token() -> None:
    student, teacher = torch.tensor([0.0, -math.inf]), torch.tensor([math.log(0.5), math.log(0.5)])
    nothing, positions = torch.tensor([-math.inf]), torch.tensor([0, 0])
    assert reverse_kl_topk(student, nothing, teacher, nothing, positions).item() == pytest.approx(math.log(2))
