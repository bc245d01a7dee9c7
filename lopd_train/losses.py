"""What training minimises and what it is measured by: pure functions of log-probs, each with its equation and source.

q is the student, p the teacher, r the reference policy that sampled the rollouts; x_j is the token at position j, and
every distribution is over that token given everything before it. Losses are per position: the trainer sums them and
divides by the positions of the whole optimiser step. Positions whose loss mask is false never come here:
`batches.collate` leaves them out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Stands in for the log-prob of something impossible: exp of it is as good as 0, and 0 times it is 0, not NaN.
LOG_TINY = math.log(torch.finfo(torch.float32).tiny)


# At the sampled token; every argument is [positions].


def advantages(student: Tensor, teacher: Tensor, *, power: float | None = None, clip: float | None = None) -> Tensor:
    """A_j = log p(x_j) - log q(x_j), without gradient; on the student's own rollouts its mean estimates -KL(q || p).

    With `power` a: A_j = p(x_j)^a - q(x_j)^a, of the same sign and never outside [-1, 1]; divided by a it tends to the
    difference of the logs as a goes to 0. With `clip` c: A_j is cut to [-c, c].
    Sources: arXiv 2604.13010, section on Lightning OPD; PowerOPD, arXiv 2606.17199, in the form of its authors' code.
    """
    student = student.detach()
    values = teacher - student if power is None else (power * teacher).exp() - (power * student).exp()
    return values if clip is None else values.clamp(-clip, clip)


def sampled(student: Tensor, advantages: Tensor) -> Tensor:
    """The objective of Lightning OPD: -A_j log q(x_j), where A is a constant.

    On rollouts of the student its gradient is an unbiased estimate of that of KL(q || p). The value means little;
    watch the mean of A. Source: arXiv 2604.13010, section on Lightning OPD.
    """
    return -advantages * student


def sampled_clipped(student: Tensor, old: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """-min(w_j A_j, clamp(w_j, 1 - c, 1 + c) A_j) with w_j = q(x_j) / old(x_j), for many updates on one batch.

    A token that has moved by the factor 1 + c the way its advantage points gives no gradient any more; at w = 1 the
    gradient is that of `sampled`. Source: PPO, arXiv 1707.06347, equation 7.
    """
    ratios = _exp(student - old)
    return -torch.minimum(ratios * advantages, ratios.clamp(1 - clip, 1 + clip) * advantages)


def cross_entropy(student: Tensor) -> Tensor:
    """-log q(x_j), in nats."""
    return -student


# Over the stored distribution.


@dataclass(frozen=True, kw_only=True)
class Categories:
    """A distribution at each position: its stored tokens, and everything else as one more category; natural logs."""

    logprobs: Tensor  # [entries]
    tail: Tensor  # [positions]
    positions: Tensor  # [entries], the position that each entry belongs to

    def normalised(self) -> Categories:
        """The same with terms that sum to one: rounding to the grid moves the stored sum by a few per cent."""
        return self._minus(self.tail.exp().index_add(0, self.positions, self.logprobs.exp()).log())

    def tempered(self, temperature: float) -> Categories:
        """The stored tokens at another temperature, renormalised over themselves; the tail is lost.

        Its mass is known at temperature 1 alone: elsewhere it depends on how it is spread, which nobody stored.
        """
        logits = _numbers(self.logprobs) / temperature
        nothing = torch.full_like(self.tail, -torch.inf)
        peaks = _numbers(nothing.scatter_reduce(0, self.positions, logits.detach(), "amax"))
        sums = torch.zeros_like(nothing).index_add(0, self.positions, (logits - peaks[self.positions]).exp())
        tempered = Categories(logprobs=logits, tail=nothing, positions=self.positions)
        return tempered._minus(sums.clamp(min=torch.finfo(sums.dtype).tiny).log() + peaks)

    def _minus(self, log_total: Tensor) -> Categories:
        entries = self.logprobs - log_total[self.positions]
        return Categories(logprobs=entries, tail=self.tail - log_total, positions=self.positions)

    def _finite(self) -> Categories:
        return Categories(logprobs=_numbers(self.logprobs), tail=_numbers(self.tail), positions=self.positions)


def _numbers(logprobs: Tensor) -> Tensor:
    """The same with a number for what is impossible; what is next to impossible keeps its gradient."""
    return logprobs.masked_fill(logprobs.isneginf(), LOG_TINY)


def reverse_kl(student: Categories, teacher: Categories) -> Tensor:  # [positions]
    """KL(q || p) = sum_i q_i (log q_i - log p_i) + q_tail (log q_tail - log p_tail), in nats.

    By the log-sum inequality it is a lower bound of the KL over the whole vocabulary. The tail belongs to it: without,
    it is least where the student has left the stored tokens. A tail of -inf counts as the least mass float32 knows.
    Source: arXiv 2604.13010, where the sum is over the whole vocabulary.
    """
    return _kl(student._finite(), teacher._finite())


def forward_kl(student: Categories, teacher: Categories) -> Tensor:  # [positions]
    """KL(p || q) = sum_i p_i (log p_i - log q_i) + p_tail (log p_tail - log q_tail), in nats: covers every mode of p.

    Source: knowledge distillation, arXiv 1503.02531, up to the entropy of p, which has no gradient.
    """
    return _kl(teacher._finite(), student._finite())


def jsd(student: Categories, teacher: Categories, beta: float) -> Tensor:  # [positions]
    """JSD_b(p || q) = b KL(p || m) + (1 - b) KL(q || m) with m = b p + (1 - b) q, in nats; bounded.

    Divided by b it tends to forward KL as b goes to 0; divided by 1 - b, to reverse KL as b goes to 1.
    Source: GKD, arXiv 2306.13649, section 2.
    """
    q, p = student._finite(), teacher._finite()
    middle = Categories(
        logprobs=torch.logaddexp(p.logprobs + math.log(beta), q.logprobs + math.log1p(-beta)),
        tail=torch.logaddexp(p.tail + math.log(beta), q.tail + math.log1p(-beta)),
        positions=p.positions,
    )
    return beta * _kl(p, middle) + (1 - beta) * _kl(q, middle)


def _kl(p: Categories, q: Categories) -> Tensor:
    """sum_i p_i (log p_i - log q_i) over all categories of a position."""
    entries = p.logprobs.exp() * (p.logprobs - q.logprobs)
    return (p.tail.exp() * (p.tail - q.tail)).index_add(0, p.positions, entries)


# Off-policy: the rollouts are the reference policy's, and the student has moved on.


def token_ratios(student: Tensor, reference: Tensor, cap: float = math.inf) -> Tensor:  # [positions]
    """w_j = min(q(x_j) / r(x_j), cap), without gradient: weighs tokens, not the prefixes they came after.

    Source: truncated importance sampling, Ionides 2008, doi 10.1198/106186008X320456.
    """
    return _exp(student.detach() - reference).clamp(max=cap)


def sequence_ratios(log_ratios: Tensor, cap: float = math.inf) -> Tensor:  # [rollouts]
    """w = min(prod_j q(x_j) / r(x_j), cap), from the sums of log q - log r over the positions of each rollout.

    Without the cap the expectation over the student's own rollouts, prefixes included. Source: as `token_ratios`.
    """
    return _exp(log_ratios.detach()).clamp(max=cap)


def effective_sample_size(mean: float, mean_of_squares: float) -> float:
    """(sum w)^2 / (n sum w^2), from the means of w and of w^2: 1 for equal weights, 1 / n for one alone.

    Source: Kong 1992, technical report 348, University of Chicago.
    """
    return mean * mean / mean_of_squares if mean_of_squares > 0 else 0.0


def drift(student: Tensor, reference: Tensor) -> Tensor:  # [positions]
    """w_j - 1 - log w_j with w_j = q(x_j) / r(x_j): never negative, and in expectation over x ~ r it is KL(r || q).

    Source: J. Schulman, Approximating KL divergence, 2020, estimator k3.
    """
    log_ratios = student.detach() - reference
    return _exp(log_ratios) - 1 - log_ratios


def _exp(log_ratios: Tensor) -> Tensor:
    return log_ratios.clamp(max=-LOG_TINY / 4).exp()  # 3e9: its square is finite, and so are sums of them
