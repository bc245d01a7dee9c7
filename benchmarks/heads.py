"""The head at the size of a real vocabulary: in chunks, and as anybody would write it, with all logits at once."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lopd_store.topk import TopK
from lopd_train import losses
from lopd_train.batches import Batch, Record, collate
from lopd_train.head import Predictions, Sums, chunked_sums
from lopd_train.losses import Categories

COPIES = 5  # of full logits that autograd holds at its worst


class Case:
    """States, a head and what a teacher said; reverse KL over its top-k and tail is what is minimised."""

    def __init__(self, positions: int, vocabulary: int, width: int, k: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.states = torch.randn(positions, width, generator=generator).requires_grad_()
        self.weight = (torch.randn(vocabulary, width, generator=generator) / width**0.5 * 4).requires_grad_()
        self.batch = batch(positions, vocabulary, k)

    def chunked(self) -> float:
        """With the trainer's head."""

        def measure(predicted: Predictions, piece: Batch) -> Sums:
            assert predicted.topk is not None and piece.topk is not None
            return {"loss": losses.reverse_kl(predicted.topk, piece.topk.teacher).sum()}

        return self._done(chunked_sums(self._logits, self.states, self.batch, measure, weights=[self.weight])["loss"])

    def full(self) -> float:
        """With all logits at once; the tail is 1 minus the rest, which is cheaper and less exact than ours."""
        topk = self.batch.topk
        assert topk is not None
        logits = self._logits(self.states)
        at_ids = logits[topk.teacher.positions, topk.ids] - logits.logsumexp(dim=-1)[topk.teacher.positions]
        inside = torch.zeros_like(topk.teacher.tail).index_add(0, topk.teacher.positions, at_ids.exp())
        student = Categories(
            logprobs=at_ids, tail=torch.log1p(-inside.clamp(max=1 - 1e-6)), positions=topk.teacher.positions
        )
        return self._done(losses.reverse_kl(student, topk.teacher).sum())

    def _logits(self, states: Tensor) -> Tensor:
        return torch.nn.functional.linear(states, self.weight)

    def _done(self, loss: Tensor) -> float:
        torch.autograd.grad(loss, (self.states, self.weight))
        return loss.item()


def batch(positions: int, vocabulary: int, k: int) -> Batch:
    """One rollout whose teacher named random tokens."""
    random = np.random.default_rng(0)
    logprobs = np.sort(np.log(random.dirichlet(np.ones(k + 1), positions).astype(np.float32)))[:, ::-1]
    topk = TopK(
        counts=np.full(positions, k, np.uint16),
        ids=np.stack([random.choice(vocabulary, k, replace=False) for _ in range(positions)])
        .flatten()
        .astype(np.uint32),
        logprobs=np.ascontiguousarray(logprobs[:, :k]).flatten(),
        tail_logprobs=np.ascontiguousarray(logprobs[:, k]),
    )
    record = Record(
        row=0,
        token_ids=random.integers(0, vocabulary, positions + 1).astype(np.uint32),
        prompt_length=1,
        loss_mask=np.ones(positions, np.bool_),
        sampled_logprobs=np.full(positions, -1, np.float32),
        topk=topk,
    )
    return collate([record], "cpu")


def once(how: str, *size: int) -> float:
    """Seconds of loss and gradients, for a process whose memory is looked at."""
    case = Case(*size)
    started = time.perf_counter()
    getattr(case, how)()
    return time.perf_counter() - started


def nothing(*size: int) -> None:
    """What both need before they begin."""
    Case(*size)


def fitting(positions: int, vocabulary: int) -> int:
    """As many positions, of so many, as have room with full logits, a handful of copies of them."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    room = int(0.8 * free) // (COPIES * 4 * vocabulary)
    return min(positions, max(512, room // 512 * 512))
