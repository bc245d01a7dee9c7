"""What training minimises and what it is measured by: pure functions of log-probs, each with its equation.

Sums run over the positions given; the trainer divides by the positions of the whole optimiser step. Positions
whose loss mask is false never come here: `batches.collate` leaves them out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Stands in for the log-prob of something impossible: exp of it is as good as 0, and 0 times it is 0, not NaN.
_LOG_TINY = math.log(torch.finfo(torch.float32).tiny)


def sampled_objective(
    student_logprobs: Tensor,  # [positions], of the sampled tokens
    teacher_logprobs: Tensor,  # [positions], of the same tokens
) -> Tensor:
    """The objective of Lightning OPD, summed: -sum_j A_j log p_student(x_j), A_j = log p_T(x_j) - log p_student(x_j).

    No gradient flows through the advantage A, so on rollouts of the student itself the gradient is an unbiased
    estimate of that of the reverse KL(student || teacher). The value means little; watch the mean of A.
    Source: arXiv 2604.13010, section on Lightning OPD.
    """
    return -(advantages(student_logprobs, teacher_logprobs) * student_logprobs).sum()


def advantages(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """A_j = log p_T(x_j) - log p_student(x_j), without gradient; its mean estimates -KL(student || teacher)."""
    return teacher_logprobs - student_logprobs.detach()


def cross_entropy(student_logprobs: Tensor) -> Tensor:
    """-sum_j log p_student(x_j) over the tokens of a response, in nats."""
    return -student_logprobs.sum()


def reverse_kl_topk(
    student_logprobs: Tensor,  # [entries], at the stored ids
    student_tail: Tensor,  # [positions], log of the student's mass outside the stored ids
    teacher_logprobs: Tensor,  # [entries], as stored
    teacher_tail: Tensor,  # [positions], as stored
    entry_positions: Tensor,  # [entries], the position that each entry belongs to
) -> Tensor:  # [positions]
    """Reverse KL(student || teacher) per position over the stored top-k and one tail bucket, in nats.

    KL = sum_i q_i (log q_i - log p_i) + q_tail (log q_tail - log p_tail), where q is the student's and p the
    teacher's. By the log-sum inequality it is a lower bound of the KL over the whole vocabulary. The tail was
    measured, but rounding to the grid moves the sum of a position's k + 1 stored terms by a few per cent, so they
    are first normalised to sum to one. A teacher's tail of -inf counts as the smallest mass that float32 knows.
    """
    log_p, log_p_tail = teacher_logprobs, teacher_tail.clamp(min=_LOG_TINY)
    log_q, log_q_tail = student_logprobs.clamp(min=_LOG_TINY), student_tail.clamp(min=_LOG_TINY)
    log_total = log_p_tail.exp().index_add(0, entry_positions, log_p.exp()).log()
    kl_tail = log_q_tail.exp() * (log_q_tail - log_p_tail + log_total)
    kl_entries = log_q.exp() * (log_q - log_p + log_total[entry_positions])
    return kl_tail.index_add(0, entry_positions, kl_entries)
