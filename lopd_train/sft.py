"""Supervised fine-tuning on a teacher's responses: the first half of the pipeline, and of teacher consistency.

The checkpoint says which teacher wrote its data, so that an artifact made from its rollouts can be held to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lopd_store.identity import identify
from lopd_store.provenance import by_domain, sft_of_data
from lopd_store.rollouts import RolloutsFile
from lopd_train import losses, measures
from lopd_train.batches import Batch
from lopd_train.checkpoint import Run, check_output
from lopd_train.config import SFT, TrainConfig
from lopd_train.data import Feed, rollouts_source
from lopd_train.head import Predictions, Sums
from lopd_train.runlog import OnProgress
from lopd_train.student import Student, limits
from lopd_train.trainer import RunResult, Term, fit


def train_sft(
    *,
    model: str | Path,
    data: str | Path | Mapping[str, str | Path],
    output: str | Path,
    config: TrainConfig = SFT,
    on_progress: OnProgress | None = None,
) -> RunResult:
    """Train a model on SFT data with cross-entropy; goes on where an interrupted run with this output stopped.

    `data` is a file, or one per domain, each of which may have another teacher.
    """
    output = Path(output)
    check_output(output)
    files = {domain: RolloutsFile(path) for domain, path in by_domain(data, "data").items()}
    base = identify(model)
    for file in files.values():
        file.require_tokenizer_of(base, "the model")
    feed = Feed(rollouts_source(*files.values()), limits(model, base), config=config)
    sft = tuple(sft_of_data(file.record, file.digest(), domain) for domain, file in files.items())
    paths = [str(file.path) for file in files.values()]
    config = config.resolve(feed.rollouts)
    run = Run(
        method="sft",
        config=config,
        model=str(model),
        base=base,
        data=paths if len(paths) > 1 else paths[0],
        data_digest=sft[0].data if len(sft) == 1 else None,
        sft=sft,
    )
    return fit(run, [Term(measure=cross_entropy, feed=feed, rollouts=config.batch_rollouts)], output, on_progress)


def cross_entropy(student: Student, batch: Batch) -> Sums:
    """-log q(x_j), and what there is to watch, summed over the positions of a batch."""
    return student.sums(student.states(batch), batch, _measure)


def _measure(predicted: Predictions, piece: Batch) -> Sums:
    return {"loss": losses.cross_entropy(predicted.sampled).sum(), **measures.measure(predicted, piece)}
