"""The float64 twin of the losses: whole distributions in NumPy, a position at a time, written from the equations.

Gradients are central differences, so they share nothing with autograd either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from tests.unit.dense import log_softmax

Floats = npt.NDArray[np.float64]


def softmax(logits: Floats) -> Floats:
    """Probabilities of one row of logits."""
    return np.asarray(np.exp(log_softmax(logits)))


def merged(mass: Floats, kept: Sequence[int]) -> Floats:
    """The probabilities of the kept ids, and of all others together."""
    return np.array([*mass[list(kept)], np.delete(mass, list(kept)).sum()])


def softened(mass: Floats, kept: Sequence[int], temperature: float) -> Floats:
    """The kept ids at another temperature, among themselves."""
    powers = mass[list(kept)] ** (1 / temperature)
    return np.asarray(powers / powers.sum())


def kl(p: Floats, q: Floats) -> float:
    """KL(p || q) of two vectors of probabilities; what p rules out costs nothing."""
    possible = p > 0
    return float((p[possible] * np.log(p[possible] / q[possible])).sum())


def jsd(p: Floats, q: Floats, beta: float) -> float:
    """The generalised Jensen-Shannon divergence of teacher p and student q."""
    middle = beta * p + (1 - beta) * q
    return beta * kl(p, middle) + (1 - beta) * kl(q, middle)


def entropy(mass: Floats) -> float:
    """In nats."""
    return float(-(mass * np.log(mass)).sum())


def gradient(function: Callable[[Floats], float], at: Floats, *, step: float = 1e-5) -> Floats:
    """The derivative of a function by each number of an array."""
    result = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        moved = [at.copy(), at.copy()]
        moved[0][index] += step
        moved[1][index] -= step
        result[index] = (function(moved[0]) - function(moved[1])) / (2 * step)
    return result
