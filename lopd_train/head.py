"""The head, read in chunks of positions: predictions and their gradients without [positions, vocabulary] logits.

    sums = chunked_sums(logits, states, batch, lambda predicted, piece: {"loss": -predicted.sampled.sum()})
    sums["loss"].backward()

Whatever is summed over positions gets its gradient by states and weights chunk by chunk on the way forward, while the
logits of the chunk are there. So nothing is kept, nothing is computed twice, and `backward` only scales what is known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lopd_train.batches import Batch
from lopd_train.losses import Categories

MIN_CHUNK = 512  # positions; below it, adding up the gradient by the weights costs more than computing it

Sums = dict[str, Tensor]  # what -> its sum over the positions of a batch


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What the student says at some positions, in nats; all of it is differentiable."""

    sampled: Tensor  # [positions], log-probs of the targets
    topk: Categories | None  # log-probs at the stored ids, and of everything else together
    logsumexp: Tensor  # [positions], of the logits
    entropy: Tensor  # [positions], of the whole distribution


Measure = Callable[[Predictions, Batch], Sums]  # of some positions; what it calls `loss` gets a gradient


def chunked_sums(
    logits: Callable[[Tensor], Tensor],  # states [n, width] -> logits [n, vocabulary], float32 or wider
    states: Tensor,  # [positions, width]
    batch: Batch,
    measure: Measure,
    *,
    weights: Sequence[Tensor] = (),  # what else `logits` depends on
    chunk: int = MIN_CHUNK,  # positions
) -> Sums:
    """The sums of a measure over all positions of a batch; where gradients are on, `loss` has one, to be used once."""
    trained = torch.is_grad_enabled()
    wanted = [tensor for tensor in weights if trained and tensor.requires_grad]
    by_states, by_weights = torch.empty_like(states), list[Tensor]()
    totals: Sums = {}
    for start in range(0, len(states), chunk):
        piece = batch.slice(start, min(start + chunk, len(states)))
        part = states[start : start + chunk].detach().requires_grad_(trained)
        values = logits(part)
        with torch.autocast(states.device.type, enabled=False):  # reductions in the precision of the logits
            sums = measure(predict(values, piece), piece)
        del values  # so that they are gone once their gradient is known
        if trained:
            by_states[start : start + chunk], *more = torch.autograd.grad(sums["loss"], (part, *wanted))
            more = [gradient.to(torch.promote_types(gradient.dtype, torch.float32)) for gradient in more]
            added = [total.add_(gradient) for total, gradient in zip(by_weights, more, strict=False)]
            by_weights = added or more
        for name, value in sums.items():
            totals[name] = totals.get(name, 0) + value.detach()
    if trained:
        gradients = [by_states, *by_weights]
        totals["loss"] = _Differentiated.apply(totals["loss"], gradients, states, *wanted)  # type: ignore[no-untyped-call]
    return totals


def predict(
    logits: Tensor,  # [positions, vocabulary]
    batch: Batch,
) -> Predictions:
    """The predictions that a batch asks for."""
    topk = batch.topk
    nothing = batch.targets[:0]
    rows, ids = (nothing, nothing) if topk is None else (topk.teacher.positions, topk.ids)
    sampled, entries, tail, logsumexp, entropy = _Predict.apply(logits, batch.targets, rows, ids)  # type: ignore[no-untyped-call]
    return Predictions(
        sampled=sampled,
        topk=None if topk is None else Categories(logprobs=entries, tail=tail, positions=rows),
        logsumexp=logsumexp,
        entropy=entropy,
    )


class _Predict(torch.autograd.Function):
    """From logits z [n, vocabulary] with m = softmax z and L = logsumexp z, and from one target and some ids per row:

        sampled = z_x - L            entry_i = z_i - L            H = L - sum_v m_v z_v
        tail = log sum over the ids that are not given of m_v, so it is exact where it is small, too.

    The gradient by z_v is m_v (g_L - g_sampled - sum_i g_i - g_tail - g_H (log m_v + H)), and besides g_sampled at the
    target, g_i at id i, and g_tail m_v / exp(tail) at the ids that are not given. By hand it takes one pass over the
    vocabulary and half the time of autograd.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, rows: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        mass = logits.softmax(dim=-1)
        total = logits.amax(dim=-1) - mass.amax(dim=-1).log()
        entropy = total - torch.linalg.vecdot(mass, logits)
        inside = mass[rows, ids]
        mass[rows, ids] = 0
        outside = mass.sum(dim=-1) if len(ids) else torch.ones_like(total)
        mass[rows, ids] = inside
        ctx.save_for_backward(logits, mass, targets, rows, ids, total, entropy, outside)
        ctx.set_materialize_grads(False)
        sampled = logits.gather(1, targets[:, None])[:, 0] - total
        return sampled, logits[rows, ids] - total[rows], outside.log(), total, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, mass, targets, rows, ids, total, entropy, outside = ctx.saved_tensors
        inside = mass[rows, ids]
        by_sampled, by_entries, by_tail, by_total = (
            torch.zeros_like(value) if gradient is None else gradient
            for gradient, value in zip(gradients, (total, inside, total, total), strict=False)
        )
        shared = (by_total - by_sampled - by_tail).index_add(0, rows, -by_entries)
        at_tail = by_tail / outside.clamp(min=torch.finfo(outside.dtype).tiny)
        by_logits = mass * (shared + at_tail)[:, None]
        by_logits[rows, ids] = inside * shared[rows] + by_entries
        by_logits.scatter_add_(1, targets[:, None], by_sampled[:, None])
        if (by_entropy := gradients[-1]) is not None:
            by_logits -= by_entropy[:, None] * mass * (logits + (entropy - total)[:, None])
        return by_logits, None, None, None


class _Differentiated(torch.autograd.Function):
    """A number whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, by_value: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # they are scaled in place, so there is no second time
        return None, None, *(gradient.mul_(by_value) for gradient in gradients)
