"""The noise of an engine: how far two scorings of the same rollouts differ by the shape of their batches alone.

A log-prob is a sum whose order depends on the batch that it is computed in, so no two engines, machines or batch sizes
agree in the last bits. What that amounts to is measured, not guessed: before a build, so that a broken engine costs
seconds instead of days, and when an artifact is scored again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lopd_store.errors import DataError
from lopd_store.rollouts import Rollout
from lopd_store.teachers import RolloutScores, Teacher

PROBED = 4  # rollouts that a build scores twice
# Nats that the log-prob of one token may change; single tokens of a half-precision model do by tenths.
MOST_NOISE = {"float32": 0.01, "bfloat16": 1.0, "float16": 1.0}


@dataclass(frozen=True, kw_only=True)
class Noise:
    """How far two scorings of the sampled log-probs differ, in nats."""

    positions: int
    largest: float
    mean: float

    def to_json(self) -> dict[str, Any]:
        """A JSON object with one member per field."""
        return dict(vars(self))

    def require(self, most: float) -> None:
        """Raise DataError where the largest difference is above `most` nats."""
        if not self.largest <= most:
            raise DataError(
                "the engine does not repeat itself: the same rollouts in other batches have other log-probs",
                expected=f"a difference of at most {most:g} nat",
                actual=f"{self.largest:.3g} nat, {self.mean:.3g} on average, in {self.positions} positions",
                hint="try `--dtype float32`; `--max-noise` accepts it",
            )


def probe(teacher: Teacher, rollouts: Sequence[Rollout], k: int, *, most: float | None) -> Noise:
    """Score a few rollouts twice; raises DataError where they differ by more than `most` nats, or its default."""
    some = [rollout for rollout in rollouts if len(rollout.response_ids)][:PROBED]
    _, noise = score_twice(teacher, some, k)
    noise.require(MOST_NOISE[teacher.scoring.dtype] if most is None else most)
    return noise


def score_twice(
    teacher: Teacher,
    rollouts: Sequence[Rollout],
    k: int,
    *,
    on_rollouts: Callable[[int, int], None] | None = None,
) -> tuple[list[RolloutScores], Noise]:
    """The scores of rollouts that share their batches, and the noise: each is scored again by itself.

    A single rollout shares the batch with a copy of its own. `on_rollouts` hears (rollouts scored, in all).
    """
    shared = list(rollouts) if len(rollouts) > 1 else 2 * list(rollouts)
    total, done = len(shared) + len(rollouts), 0

    def score(batch: Sequence[Rollout]) -> list[RolloutScores]:
        nonlocal done
        scores: dict[int, RolloutScores] = {}
        for index, found in teacher.score(batch, k):
            scores[index] = found
            done += 1
            if on_rollouts is not None:
                on_rollouts(done, total)
        return [scores[index] for index in range(len(batch))]

    together = score(shared)[: len(rollouts)]
    alone = [score([rollout])[0] for rollout in rollouts]
    pairs = [(a.sampled_logprobs, b.sampled_logprobs) for a, b in zip(together, alone, strict=True)]
    with np.errstate(invalid="ignore"):  # -inf is -inf; what is not a number is for those to name who use the scores
        differences = np.concatenate(
            [np.zeros(0), *(np.where(a == b, 0, np.nan_to_num(np.abs(a - b))) for a, b in pairs)]
        )
    noise = Noise(
        positions=len(differences),
        largest=float(differences.max(initial=0)),
        mean=float(differences.mean()) if len(differences) else 0.0,
    )
    return together, noise
