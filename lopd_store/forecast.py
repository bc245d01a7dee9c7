"""What a build will cost and give, from a few of its rollouts, before it is paid for.

    estimate(teacher="teacher", rollouts="rollouts.parquet").choices

Some rollouts, spread evenly over the file, are scored by the real teacher and packed as a build would pack them, whole
and in half; the line through the two sizes is what every further position costs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lopd_store.builder import Settings
from lopd_store.errors import InputError
from lopd_store.handout import load_teacher, torch_threads
from lopd_store.manifest import Scoring
from lopd_store.plan import Plan
from lopd_store.rollouts import Rollout, RolloutsFile
from lopd_store.scoring import part_files, score_part
from lopd_store.survey import OnSurveyed
from lopd_store.teachers import RolloutScores


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What one `k_max` would store."""

    k_max: int
    mean_k: float
    mass: float  # stored, on average
    reached: float  # share of the positions where the coverage is reached
    bytes_per_position: float
    bytes: int  # of the whole artifact


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a build will cost and give."""

    rollouts: int
    skipped: int
    tokens: int
    positions: int
    parts: int
    probed_rollouts: int
    probed_positions: int
    tokens_per_second: float  # of one worker on this machine
    positions_per_second: float  # likewise, at the file's own ratio of prompts to responses
    hours: float  # of one worker like this
    coverage: float
    choices: tuple[Choice, ...]  # by k_max, the one that was asked for among them


def estimate(*, probe: int = 32, on_surveyed: OnSurveyed | None = None, **options: Any) -> Forecast:
    """Score `probe` rollouts and say what a `build` with these `options` will cost and give."""
    if probe < 2:
        raise InputError("`probe` is out of range", expected="2 or more", actual=probe)
    settings = Settings(**options)
    plan = settings.plan(on_surveyed)
    rollouts = _spread(plan, probe)
    k_max = plan.encoding.k_max
    with torch_threads(plan.threads):
        teacher = load_teacher(plan)
        warm = dict(list(rollouts.items())[:1])
        score_part(plan, teacher, 0, _ignore, rollouts=warm, on_bad=settings.on_bad_rollout)
        started = time.monotonic()
        scores = dict(teacher.score(list(rollouts.values()), 2 * k_max))
        seconds = time.monotonic() - started
    tokens, positions = sum(part.tokens for part in plan.parts), sum(part.positions for part in plan.parts)
    probed = sum(len(rollout.token_ids) for rollout in rollouts.values())
    replay = _Replay([scores[index] for index in range(len(rollouts))], teacher.context_length)
    k_maxes = sorted({k for k in (k_max // 8, k_max // 4, k_max // 2, k_max, 2 * k_max) if k >= 1})
    return Forecast(
        rollouts=sum(part.rollouts for part in plan.parts),
        skipped=len(plan.skipped),
        tokens=tokens,
        positions=positions,
        parts=len(plan.parts),
        probed_rollouts=len(rollouts),
        probed_positions=sum(len(rollout.response_ids) for rollout in rollouts.values()),
        tokens_per_second=round(probed / seconds, 1),
        positions_per_second=round(probed / seconds * positions / tokens, 1),
        hours=round(tokens / (probed / seconds) / 3600, 3),
        coverage=plan.encoding.coverage,
        choices=tuple(_choose(replace(settings, k_max=k), plan, replay, rollouts, positions) for k in k_maxes),
    )


class _Replay:
    """A teacher that says again what the real one has said."""

    scoring = Scoring(engine="replay", dtype="float32")

    def __init__(self, scores: Sequence[RolloutScores], context_length: int | None) -> None:
        self._scores, self.context_length = scores, context_length

    def score(self, rollouts: Sequence[Rollout], k: int) -> Iterator[tuple[int, RolloutScores]]:
        """The scores of the first rollouts."""
        yield from zip(range(len(rollouts)), self._scores, strict=False)


def _choose(settings: Settings, plan: Plan, replay: _Replay, rollouts: dict[int, Rollout], positions: int) -> Choice:
    plan = replace(plan, encoding=settings.encoding())
    sizes = []
    for count in (len(rollouts) // 2, len(rollouts)):
        some = dict(list(rollouts.items())[:count])
        scored = score_part(plan, replay, 0, _ignore, rollouts=some)
        files = part_files(plan, scored)
        sizes.append((scored.part.counts.positions, sum(map(len, files.values()))))
    (fewer, less), (more, size) = sizes
    slope = (size - less) / max(more - fewer, 1)
    total = slope * positions + max(size - slope * more, 0) * len(plan.parts)
    topk = scored.part.topk
    assert topk is not None
    mass = -np.expm1(topk.tail_logprobs.astype(np.float64))
    return Choice(
        k_max=settings.k_max,
        mean_k=round(len(topk.ids) / max(more, 1), 2),
        mass=round(float(mass.mean()) if more else 1.0, 5),
        reached=round(float((mass >= plan.encoding.coverage).mean()) if more else 1.0, 4),
        bytes_per_position=round(total / max(positions, 1), 1),
        bytes=round(total),
    )


def _spread(plan: Plan, count: int) -> dict[int, Rollout]:
    """Rollouts by their rows, evenly over the file, none that is skipped."""
    skipped = {bad.row for bad in plan.skipped}
    last = plan.parts[-1].stop - 1
    rows = sorted({round(row) for row in np.linspace(plan.parts[0].start, last, count).tolist()} - skipped)
    file = RolloutsFile(plan.rollouts_path)
    return {row: file.read(row, row + 1)[0] for row in rows}


def _ignore(tokens: int, positions: int) -> None:
    pass
