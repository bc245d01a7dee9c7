"""What to watch while the student trains, and the gauge that says when its rollouts are used up.

    advantage               mean of log p - log q at the sampled tokens; rises towards 0 as the student learns
    reverse_kl              KL(q || p): over the stored top-k and tail where they are read, else estimated at the
                            sampled tokens
    cross_entropy           of the tokens that are there
    entropy                 of the student; falls to 0 where it collapses
    coverage                share of the student's mass that lies on the stored tokens
    teacher_coverage        share of the teacher's, which a temperature takes for all of it
    drift                   estimate of KL(r || q), nats per token, of the reference policy r that sampled the rollouts
    effective_sample_size   share of the rollouts that counts, under the ratios q / r or the weights in use

All are means over positions. On rollouts that were trained on before, they flatter: believe the held-out ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lopd_train import losses
from lopd_train.batches import Batch
from lopd_train.head import Predictions, Sums
from lopd_train.runlog import Metrics
from lopd_train.student import Student

# Up to these, and at least these: why is in docs/training.md.
_CLOSE_DRIFT, _FAR_DRIFT = 0.02, 0.1
_CLOSE_SIZE, _FAR_SIZE = 0.9, 0.5


@torch.no_grad()
def measure(
    predicted: Predictions,
    piece: Batch,
    weights: Tensor | None = None,  # [positions], of the loss
) -> Sums:
    """The sums over some positions of everything that can be told of them."""
    student, teacher, reference = predicted.sampled, piece.sampled_logprobs, piece.reference_logprobs
    sums = {"entropy": predicted.entropy.sum(), "cross_entropy": losses.cross_entropy(student).sum()}
    ratios = None
    if reference is not None:
        reference = reference.clamp(min=losses.LOG_TINY)  # a metric stays a number where a token was impossible
        ratios = losses.token_ratios(student, reference)
        sums["drift"] = losses.drift(student, reference).sum()
    if teacher is not None:
        gaps = losses.advantages(student, teacher.clamp(min=losses.LOG_TINY))
        sums["advantage"] = gaps.sum()
        sums["reverse_kl"] = -(gaps if ratios is None else ratios * gaps).sum()
    if predicted.topk is not None and piece.topk is not None:
        sums["reverse_kl"] = losses.reverse_kl(predicted.topk, piece.topk.teacher).sum()
        sums["coverage"] = -predicted.topk.tail.expm1().sum()
        sums["teacher_coverage"] = -piece.topk.teacher.tail.expm1().sum()
    counted = ratios if weights is None else weights
    if counted is not None:
        sums |= {"weight": counted.sum(), "weight_squared": (counted * counted).sum()}
    return sums


def of_batch(student: Student, batch: Batch) -> Sums:
    """The sums of `measure` over all positions of a batch."""
    return student.sums(student.states(batch), batch, measure)


def finish(means: dict[str, float]) -> dict[str, float]:
    """The metrics of a step from the means over its positions."""
    if "weight" not in means:
        return means
    size = losses.effective_sample_size(means.pop("weight"), means.pop("weight_squared"))
    return {**means, "effective_sample_size": size}


def gauge(metrics: Metrics) -> str | None:
    """How far the student has left the distribution that its rollouts come from, in words; None where nobody knows."""
    drift, size = metrics.get("drift"), metrics.get("effective_sample_size")
    if drift is None or size is None:
        return None
    if drift <= _CLOSE_DRIFT and size >= _CLOSE_SIZE:
        return "close to its rollouts"
    if drift <= _FAR_DRIFT and size >= _FAR_SIZE:
        return "drifting from its rollouts"
    return "far from its rollouts: new ones are worth their price"
