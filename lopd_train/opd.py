"""Offline on-policy distillation (Lightning OPD, arXiv 2604.13010): train the student from a sealed artifact.

The student's own rollouts were scored once by the teacher. Each step reads the teacher's log-prob of each sampled
token, compares it with what the student gives that token now, and moves the student by the difference. Before any of
it the gate must find that the teacher is the one behind the student's SFT data.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import lopd_store
from lopd_store import gate
from lopd_store.errors import InputError
from lopd_store.identity import identify
from lopd_store.provenance import sft_of_data
from lopd_store.reader import Artifact
from lopd_store.rollouts import RolloutsFile
from lopd_train import losses, measures
from lopd_train.batches import Batch
from lopd_train.checkpoint import Run, check_output
from lopd_train.config import OPD, TrainConfig
from lopd_train.data import Feed, Limits, artifact_source, rollouts_source
from lopd_train.head import Predictions, Sums
from lopd_train.runlog import OnProgress
from lopd_train.sft import cross_entropy
from lopd_train.student import Student, limits
from lopd_train.trainer import RunResult, Term, fit


def train_opd(
    *,
    artifact: str | Path,
    student: str | Path,
    output: str | Path,
    sft_data: str | Path | None = None,
    config: TrainConfig = OPD,
    overrides: Collection[str] = (),
    on_progress: OnProgress | None = None,
) -> RunResult:
    """Train a student on an artifact; goes on where an interrupted run with this output stopped.

    With `sft_data`, a step minimises the mean loss over the positions of its rollouts plus `sft_weight` times the mean
    cross-entropy over those of `sft_rollouts` rows of that file, which must be the same teacher's. Raises
    ConsistencyError where the gate refuses and `overrides` (names in `lopd_store.gate.OVERRIDES`) do not cover it;
    what they covered is recorded in the run and in the checkpoint.
    """
    output = Path(output)
    check_output(output)
    if (sft_data is None) != (config.sft_weight == 0):
        raise InputError("`sft_data` and `sft_weight` go together", hint="`--sft-data FILE --sft-weight 0.1`")
    opened = lopd_store.open(artifact)
    inputs, base = opened.manifest.inputs, identify(student)
    verdict = gate.judge(inputs, base)
    overridden = gate.enforce(verdict, overrides)
    reads = limits(student, base)
    feed = _feed(opened, reads, config)
    config = config.resolve(feed.rollouts)
    terms = [Term(measure=partial(measure, config), feed=feed, rollouts=config.batch_rollouts)]
    mixed = None if sft_data is None else RolloutsFile(sft_data)
    if mixed is not None:
        mixed.require_tokenizer_of(base, "the student")
        sft = sft_of_data(mixed.record, mixed.digest())
        verdicts = [gate.judge([replace(one, sft=sft)], base) for one in inputs]
        of_data = min(verdicts, key=lambda verdict: len(verdict.findings))  # one of the teachers must have written it
        overridden = tuple(sorted({*overridden, *gate.enforce(of_data, overrides)}))
        feed = Feed(rollouts_source(mixed), reads, config=replace(config, eval_fraction=0))
        rollouts = min(config.sft_rollouts, feed.rollouts)
        terms += [Term(measure=cross_entropy, feed=feed, rollouts=rollouts, weight=config.sft_weight)]
    run = Run(
        method="opd",
        config=config,
        model=str(student),
        base=base,
        data=str(artifact),
        data_digest=opened.fingerprint,
        sft_data=None if mixed is None else str(mixed.path),
        sft_data_digest=None if mixed is None else mixed.digest(),
        sft=tuple(replace(one.sft, domain=one.domain) for one in inputs),
        verdict=verdict.state,
        overrides=overridden,
        artifact=opened.manifest,
    )
    return fit(run, terms, output, on_progress)


def _feed(artifact: Artifact, reads: Limits, config: TrainConfig) -> Feed:
    """The rollouts of an artifact, which has everything that these settings read."""
    if not artifact.view.has_topk and (config.objective != "sampled" or config.eval_fraction > 0):
        raise InputError(
            f"`{artifact.place}` is a copy without top-k, so reverse KL cannot be computed",
            hint="pull the whole artifact, or pass `--objective sampled --eval-fraction 0`",
        )
    feed = Feed(artifact_source(artifact), reads, config=config)
    settings = ("correction", "ratio_clip", "reference_kl_weight")
    used = [name for name in settings if getattr(config, name) not in ("none", None, 0)]
    if used and not feed.has_reference:
        raise InputError(
            f"`{artifact.place}` has no log-probs of the reference policy",
            expected=f"reference log-probs, for `{'`, `'.join(used)}`",
            hint="`lopd-store generate` keeps them with the rollouts, and `build` takes them over",
        )
    return feed


def measure(config: TrainConfig, student: Student, batch: Batch) -> Sums:
    """The loss that these settings ask for, and what there is to watch, summed over the positions of a batch."""
    states = student.states(batch)
    weights = _rollout_weights(config, student, states, batch) if config.correction == "sequence" else None
    return student.sums(states, batch, partial(_measure, config, weights))


def _measure(config: TrainConfig, of_rollouts: Tensor | None, predicted: Predictions, piece: Batch) -> Sums:
    """The loss and what there is to watch, summed over some positions: w (objective + a KL(q || r)) - b log q."""
    weights = None if of_rollouts is None else of_rollouts[piece.rollouts]
    if config.correction == "token":
        assert piece.reference_logprobs is not None
        weights = losses.token_ratios(predicted.sampled, piece.reference_logprobs, config.correction_cap)
    values = _objective(config, predicted, piece)
    if config.reference_kl_weight:
        values = values + config.reference_kl_weight * _reference_kl(predicted, piece)
    if weights is not None:
        values = weights * values
    if config.cross_entropy_weight:
        values = values + config.cross_entropy_weight * losses.cross_entropy(predicted.sampled)
    return {"loss": values.sum(), **measures.measure(predicted, piece, weights)}


def _objective(config: TrainConfig, predicted: Predictions, piece: Batch) -> Tensor:  # [positions]
    if config.objective == "sampled":
        assert piece.sampled_logprobs is not None
        power, clip = config.advantage_power, config.advantage_clip
        advantages = losses.advantages(predicted.sampled, piece.sampled_logprobs, power=power, clip=clip)
        if config.ratio_clip is None:
            return losses.sampled(predicted.sampled, advantages)
        assert piece.reference_logprobs is not None
        return losses.sampled_clipped(predicted.sampled, piece.reference_logprobs, advantages, config.ratio_clip)
    assert predicted.topk is not None and piece.topk is not None
    student, teacher = predicted.topk, piece.topk.teacher
    if config.temperature != 1:
        student, teacher = student.tempered(config.temperature), teacher.tempered(config.temperature)
    if config.objective == "jsd":
        return losses.jsd(student, teacher, config.jsd_beta)
    return (losses.reverse_kl if config.objective == "reverse_kl" else losses.forward_kl)(student, teacher)


def _reference_kl(predicted: Predictions, piece: Batch) -> Tensor:  # [positions]
    """KL(q || r): over the stored union where there is one, else with the gradient of `losses.sampled`."""
    if predicted.topk is not None and piece.topk is not None and piece.topk.reference is not None:
        return losses.reverse_kl(predicted.topk, piece.topk.reference)
    assert piece.reference_logprobs is not None
    return losses.sampled(predicted.sampled, losses.advantages(predicted.sampled, piece.reference_logprobs))


@torch.no_grad()
def _rollout_weights(config: TrainConfig, student: Student, states: Tensor, batch: Batch) -> Tensor:  # [rollouts]
    """The truncated ratio of each rollout; takes the head once more, since it must be known before the loss."""

    def log_ratios(predicted: Predictions, piece: Batch) -> Sums:
        assert piece.reference_logprobs is not None
        gaps = predicted.sampled - piece.reference_logprobs
        return {"log_ratios": gaps.new_zeros(len(batch.rows)).index_add(0, piece.rollouts, gaps)}

    return losses.sequence_ratios(student.sums(states, batch, log_ratios)["log_ratios"], config.correction_cap)
