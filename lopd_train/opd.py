"""Offline on-policy distillation (Lightning OPD, arXiv 2604.13010): train the student from a sealed artifact.

The student's own rollouts were scored once by the teacher. Each step reads the teacher's log-prob of each sampled
token, compares it with what the student gives that token now, and moves the student by the difference. Before any of
it the gate must find that the teacher is the one behind the student's SFT data.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from torch import Tensor

import lopd_store
from lopd_store import gate
from lopd_store.errors import InputError
from lopd_store.identity import identify
from lopd_train import losses
from lopd_train.batches import Batch, hold_out, read_artifact
from lopd_train.checkpoint import Run, check_output
from lopd_train.config import OPD, TrainConfig
from lopd_train.runlog import OnProgress
from lopd_train.student import Student
from lopd_train.trainer import Objective, RunResult, Sums, fit


def train_opd(
    *,
    artifact: str | Path,
    student: str | Path,
    output: str | Path,
    config: TrainConfig = OPD,
    overrides: Collection[str] = (),
    on_progress: OnProgress | None = None,
) -> RunResult:
    """Train a student on an artifact; goes on where an interrupted run with this output stopped.

    Raises ConsistencyError where the gate refuses and `overrides` (names in `lopd_store.gate.OVERRIDES`) do not
    cover it; what they covered is recorded in the run and in the checkpoint.
    """
    output = Path(output)
    check_output(output)
    opened = lopd_store.open(artifact)
    inputs, base = opened.manifest.inputs, identify(student)
    verdict = gate.judge(inputs, base)
    overridden = gate.enforce(verdict, overrides)
    training, held_out = hold_out(read_artifact(opened), fraction=config.eval_fraction, seed=config.seed)
    whole = config.objective != "sampled"  # trains on the whole stored distribution
    if any(record.topk is None for record in ([*training, *held_out] if whole else held_out)):
        raise InputError(
            f"`{artifact}` is a copy without top-k, so reverse KL cannot be computed",
            hint="pull the whole artifact, or pass `--objective sampled --eval-fraction 0`",
        )
    run = Run(
        method="opd",
        config=config.resolve(len(training)),
        model=str(student),
        base=base,
        data=str(artifact),
        data_digest=opened.fingerprint,
        sft=inputs.sft,
        verdict=verdict.state,
        overrides=overridden,
        artifact=opened.manifest,
    )
    return fit(
        run,
        objective=OBJECTIVES[config.objective],
        training=training if whole else [replace(record, topk=None) for record in training],
        held_out=held_out,
        output=output,
        on_progress=on_progress,
    )


def _train_sampled(student: Student, batch: Batch) -> Sums:
    assert batch.sampled_logprobs is not None
    logprobs = student.token_logprobs(batch)
    return {
        "loss": losses.sampled_objective(logprobs, batch.sampled_logprobs),
        "advantage": losses.advantages(logprobs, batch.sampled_logprobs).sum(),
    }


def _train_reverse_kl(student: Student, batch: Batch) -> Sums:
    return {"loss": _reverse_kl(student, batch)}


def _evaluate(student: Student, batch: Batch) -> Sums:
    return {"reverse_kl": _reverse_kl(student, batch)}


def _reverse_kl(student: Student, batch: Batch) -> Tensor:
    assert batch.topk is not None
    logprobs, tail = student.topk_logprobs(batch)
    kl = losses.reverse_kl_topk(
        logprobs, tail, batch.topk.logprobs, batch.topk.tail_logprobs, entry_positions=batch.topk.positions
    )
    return kl.sum()


OBJECTIVES = {
    "sampled": Objective(train=_train_sampled, evaluate=_evaluate),
    "reverse_kl": Objective(train=_train_reverse_kl, evaluate=_evaluate),
}
