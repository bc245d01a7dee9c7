"""The float64 twin of scoring: one rollout at a time, whole logits, no cache, no batch, written from the glossary."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM

from lopd_store.rollouts import Rollout

Floats = npt.NDArray[np.float64]


class DenseTeacher:
    """The plain model in float64."""

    def __init__(self, directory: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()

    def logprobs(self, rollout: Rollout) -> Floats:
        """[positions, output width]: row j is the distribution over response token j given everything before it."""
        ids = [*rollout.prompt_ids.tolist(), *rollout.response_ids.tolist()]
        with torch.no_grad():
            logits = self._model(input_ids=torch.tensor([ids])).logits[0].numpy()
        rows = [logits[len(rollout.prompt_ids) + j - 1] for j in range(len(rollout.response_ids))]
        return np.array([log_softmax(row) for row in rows]).reshape(len(rows), logits.shape[1])


def log_softmax(logits: Floats) -> Floats:
    """Log-probs of one row of logits."""
    shifted = logits - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


def best(logprobs: Floats, k: int, vocab_size: int) -> list[int]:
    """The k most likely ids below `vocab_size` of one row: by log-prob descending, then id ascending."""
    return sorted(range(vocab_size), key=lambda id: (-logprobs[id], id))[:k]


def tail(logprobs: Floats, kept: list[int]) -> float:
    """Log of the mass outside the kept ids of one row."""
    rest = np.delete(logprobs, kept)
    if rest.size == 0 or rest.max() == -np.inf:
        return -np.inf
    return float(rest.max() + np.log(np.exp(rest - rest.max()).sum()))


def entropy(logprobs: Floats) -> float:
    """Entropy of one row in nats."""
    mass = np.exp(logprobs)
    return float(-(mass * np.where(mass > 0, logprobs, 0)).sum())


def adaptive_k(logprobs: Floats, *, k_min: int, k_max: int, coverage: float, vocab_size: int) -> int:
    """The smallest k whose mass reaches the coverage, at least k_min, at most k_max; coverage 1 is fixed k."""
    k_max = min(k_max, vocab_size)
    if coverage == 1:
        return k_max
    mass = 0.0
    for k, id in enumerate(best(logprobs, k_max, vocab_size), start=1):
        mass += float(np.exp(logprobs[id]))
        if mass >= coverage and k >= k_min:
            return k
    return k_max
