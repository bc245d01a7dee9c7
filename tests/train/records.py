"""Small records made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

import lopd_store
from lopd_store.topk import TopK
from lopd_train import TrainConfig, opd
from lopd_train.batches import Record
from lopd_train.data import Feed, Limits, Source, artifact_source
from lopd_train.student import Student
from lopd_train.trainer import Term, Trainer


def record(
    prompt: Sequence[int],
    response: Sequence[int],
    *,
    row: int = 0,
    mask: Sequence[bool] | None = None,
    sampled_logprobs: Sequence[float] | None = None,
    topk: TopK | None = None,
) -> Record:
    """A rollout; every position counts unless a mask says otherwise."""
    return Record(
        row=row,
        token_ids=np.array([*prompt, *response], np.uint32),
        prompt_length=len(prompt),
        loss_mask=np.ones(len(response), np.bool_) if mask is None else np.array(mask, np.bool_),
        sampled_logprobs=None if sampled_logprobs is None else np.array(sampled_logprobs, np.float32),
        topk=topk,
    )


def ragged_topk(rows: Sequence[Sequence[tuple[int, float]]], tails: Sequence[float]) -> TopK:
    """A TopK from (id, log-prob) pairs per position."""
    return TopK(
        counts=np.array([len(row) for row in rows], np.uint16),
        ids=np.array([id for row in rows for id, _ in row], np.uint32),
        logprobs=np.array([logprob for row in rows for _, logprob in row], np.float32),
        tail_logprobs=np.array(tails, np.float32),
    )


def records_of(artifact: Path) -> list[Record]:
    """Every rollout of an artifact."""
    source = artifact_source(lopd_store.open(artifact))
    return [item for part in source.sizes for item in source.read(part)]


def source_of(*parts: Sequence[Record]) -> Source:
    """Parts made by hand."""
    sizes = {number: len(part) for number, part in enumerate(parts)}
    return Source(where="records", sizes=sizes, inputs=dict.fromkeys(sizes, 0), read=lambda number: list(parts[number]))


def trainer_of(student: Student, feed: Feed, directory: Path) -> Trainer:
    """A trainer on what the student's settings minimise."""
    term = Term(measure=partial(opd.measure, student.config), feed=feed, rollouts=student.config.batch_rollouts)
    return Trainer(student, [term], directory)


def feed_of(records: Sequence[Record], config: TrainConfig, held_out: Sequence[Record] = ()) -> Feed:
    """These rollouts to train on, and those held out."""
    limits = Limits(vocab_size=1 << 20, context_length=None)
    feed = Feed(source_of(records), limits, config=replace(config, eval_fraction=0))
    feed.held_out = list(held_out)
    return feed
