"""The teacher asked again: whether stored log-probs are what it says, and whether the audit of its SFT data is.

Digests show that bytes did not change; only the teacher can show that they were right. How far two honest scorings may
differ is not guessed: the rollouts are scored twice, in other batch shapes, and the difference is the noise.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lopd_store import layout, models
from lopd_store.audit import audit_sft
from lopd_store.checks import Finding, finding
from lopd_store.digest import digest_file
from lopd_store.errors import InputError
from lopd_store.grid import Grid
from lopd_store.identity import identify
from lopd_store.manifest import Inputs, Manifest, Scoring
from lopd_store.noise import MOST_NOISE, score_twice
from lopd_store.reader import Artifact, StoredRollout
from lopd_store.rollouts import Rollout
from lopd_store.statistic import SftAudit
from lopd_store.teachers import RolloutScores, Teacher, load

_ENGINE = "transformers"  # whatever scored before: it runs everywhere
_BATCH_TOKENS = 4096
_NOISE_FACTOR = 4  # the largest of few differences understates the largest of many
_LEAST_NOISE = 1e-4  # nat


@dataclass(frozen=True, kw_only=True)
class Rescored:
    """What scoring some rollouts again showed; differences in nats."""

    rollouts: tuple[int, ...]
    noise: float  # largest difference between two scorings of the same log-prob
    difference: float  # largest difference from a stored log-prob, beyond its rounding
    findings: tuple[Finding, ...]

    def to_json(self) -> dict[str, Any]:
        """A JSON object, without the findings."""
        return {"rollouts": list(self.rollouts), "noise": self.noise, "difference": self.difference}


def rescore(
    artifact: Artifact,
    *,
    teacher: str | Path,
    count: int,
    seed: int | None = None,
    device: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Rescored:
    """Score `count` random rollouts of this teacher again; without a seed nobody can know beforehand which.

    A090: every stored log-prob is the teacher's within the rounding and the noise. `on_progress` hears (rollouts
    scored, in all), anew for each dtype. Raises InputError where the model is not a teacher of the artifact.
    """
    inputs = artifact.manifest.inputs
    here = {index: artifact.rollouts_of(index) for index in _taught_by(inputs, teacher)}
    if not count >= 1:
        raise InputError("`rescore` is out of range", expected="1 or more", actual=count)
    if (total := sum(map(len, here.values()))) == 0:
        raise InputError(f"`{artifact.place}` is a copy without rollouts that `{teacher}` has scored")
    chosen: dict[Scoring, list[int]] = {}
    for number in sorted(random.Random(seed).sample(range(total), min(count, total))):
        for index, rows in here.items():
            if number < len(rows):
                chosen.setdefault(inputs[index].scoring, []).append(rows[number])
                break
            number -= len(rows)
    found = []
    for scoring, rollouts in chosen.items():
        engine = load(
            _ENGINE,
            str(teacher),
            vocab_size=inputs[0].teacher.vocab_size,
            dtype=scoring.dtype,
            device=models.pick_device(device),
            batch_tokens=_BATCH_TOKENS,
        )
        found.append(_rescore(artifact, rollouts, engine, scoring, on_progress))
    return Rescored(
        rollouts=tuple(sorted(row for one in found for row in one.rollouts)),
        noise=max(one.noise for one in found),
        difference=max(one.difference for one in found),
        findings=tuple(finding for one in found for finding in one.findings),
    )


def _rescore(
    artifact: Artifact,
    chosen: Sequence[int],
    engine: Teacher,
    scoring: Scoring,
    on_progress: Callable[[int, int], None] | None,
) -> Rescored:
    """Compare these rollouts, which were scored in one way, with what the engine says."""
    encoding = artifact.manifest.encoding
    stored = [artifact.rollout(index) for index in chosen]
    scored, noise = score_twice(engine, [_rollout(one) for one in stored], encoding.k_max, on_rollouts=on_progress)
    tolerance = max(_NOISE_FACTOR * noise.largest, _LEAST_NOISE)
    if scoring.engine != _ENGINE:  # whose arithmetic differs by more than the shape of a batch
        tolerance = max(tolerance, MOST_NOISE.get(scoring.dtype, 1.0))
    findings, largest = [], 0.0
    for index, one, scores in zip(chosen, stored, scored, strict=True):
        excess = np.maximum(
            _excess(one.sampled_logprobs, scores.sampled_logprobs, encoding.sampled_grid),
            _topk_excess(one, scores, encoding.topk_grid),
        )
        largest = max(largest, _largest(excess))
        if len(excess) and not excess.max() <= tolerance:
            position = int(np.argmax(excess))
            findings.append(
                finding(
                    "A090",
                    f"rollout {index}",
                    f"position {position}: the teacher says another log-prob than the stored one",
                    f"a difference of at most {tolerance:.2g} nat beyond the rounding",
                    f"{excess[position]:.2g} nat",
                )
            )
    return Rescored(rollouts=tuple(chosen), noise=noise.largest, difference=largest, findings=tuple(findings))


def audit_again(
    manifest: Manifest,
    *,
    teacher: str | Path,
    sft_data: str | Path,
    device: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[SftAudit, tuple[Finding, ...]]:
    """Audit the SFT data under the teacher again.

    A091: it is what the manifest has, within what another engine can make of it. Raises InputError where model or file
    are not those of one input of the artifact, or it has no such audit.
    """
    audits = [(index, manifest.inputs[index].sft_audit) for index in _taught_by(manifest.inputs, teacher)]
    known = [(index, audit) for index, audit in audits if audit is not None]
    if not known:
        raise InputError("this artifact has no audit of SFT data", hint="it is made by `lopd-store build --sft-data`")
    digest = digest_file(Path(sft_data)).sha256
    asked = [(index, audit) for index, audit in known if audit.data == digest]
    if not asked:
        raise InputError(
            f"`{sft_data}` is not the SFT data that was audited",
            expected=" or ".join(audit.data for _, audit in known),
            actual=digest,
        )
    found = audit_sft(
        teacher=teacher,
        data=sft_data,
        dtype=manifest.inputs[asked[0][0]].scoring.dtype,
        device=models.pick_device(device),
        batch_tokens=_BATCH_TOKENS,
        on_progress=on_progress,
    )
    findings = []
    for index, stored in asked:
        same = (found.temperature, found.top_p) == (stored.temperature, stored.top_p)
        if not (same and found.found.is_near(stored.found)):
            place = f"{layout.MANIFEST}: inputs[{index}].sft_audit"
            shown = [str({**one.to_json(), "data": "…"}) for one in (found, stored)]
            findings.append(finding("A091", place, "the teacher finds something else in the SFT data", *shown))
    return found, tuple(findings)


def _taught_by(inputs: Sequence[Inputs], teacher: str | Path) -> list[int]:
    """Which of the inputs this model is the teacher of; raises InputError where it is of none."""
    identity = identify(teacher)
    if len(inputs) == 1:
        inputs[0].teacher.require(identity, f"`{teacher}` is not the teacher of this artifact")
    found = [index for index, one in enumerate(inputs) if not one.teacher.differences(identity)]
    if not found:
        raise InputError(
            f"`{teacher}` is none of the teachers of this artifact",
            expected=", ".join(f"{one.domain}: {one.teacher.name}, weights {one.teacher.weights}" for one in inputs),
            actual=f"{identity.name}, weights {identity.weights}",
        )
    return found


def _rollout(stored: StoredRollout) -> Rollout:
    return Rollout(
        prompt_ids=stored.prompt_ids,
        response_ids=stored.response_ids,
        loss_mask=stored.loss_mask,
        logprobs=None,
        prompt=None,
        response=None,
        finish_reason=None,
    )


def _excess(
    stored: npt.NDArray[np.float32], live: npt.NDArray[np.float32], grid: Grid | None
) -> npt.NDArray[np.float32]:
    """How much further than rounding explains stored log-probs are from live ones, in nats."""
    half = 0 if grid is None else grid.half_steps[grid.to_codes(stored)]
    with np.errstate(invalid="ignore"):
        difference = np.where(stored == live, 0, np.abs(stored - live))  # -inf is -inf
    return np.asarray(np.maximum(difference - half, 0), np.float32)


def _topk_excess(stored: StoredRollout, score: RolloutScores, grid: Grid | None) -> npt.NDArray[np.float32]:
    """The largest excess among the entries of each position; an id not likely now counts by the least likely one."""
    excess = np.zeros(len(stored.response_ids), np.float32)
    topk = stored.topk
    if topk is None or not len(topk.ids):
        return excess
    rows = topk.positions
    ids, logprobs = score.candidates.ids[rows], score.candidates.logprobs[rows]  # [entries, columns]
    same = ids == topk.ids[:, None]
    found = same.any(axis=1)
    live = np.where(same, logprobs, -np.inf).max(axis=1)
    live[~found] = np.minimum(topk.logprobs, logprobs.min(axis=1))[~found]
    np.maximum.at(excess, rows, _excess(topk.logprobs, live, grid))
    return excess


def _largest(values: npt.NDArray[np.float32]) -> float:
    return float(values.max(initial=0))
