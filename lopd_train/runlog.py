"""What a run says while it runs: a line of metrics.jsonl per step and per evaluation, and a call per micro-batch.

    {"step": 0, "eval_reverse_kl": 0.71, "eval_tokens": 5210}
    {"step": 1, "loss": -0.52, "advantage": -0.70, "tokens": 90112, "learning_rate": 2e-06, "grad_norm": 0.9, …}

Every value is a mean over the positions that count in the loss, of which there were `tokens`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lopd_store.durable import write_durably

Metrics = Mapping[str, Any]
_PREFIX = "eval_"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run is. Printing it is the caller's business."""

    activity: str  # in words
    done: int  # rollouts trained on
    total: int
    step: int
    steps: int
    metrics: Metrics  # of the last step
    note: str | None = None  # to be said once


OnProgress = Callable[[Progress], None]
OnMetrics = Callable[[int, Metrics], None]  # what metrics.jsonl gets


class RunLog:
    """metrics.jsonl, opened after `step` steps: what a crashed run wrote beyond them is dropped."""

    def __init__(self, path: Path, *, step: int, writes: bool = True, on_metrics: OnMetrics | None = None) -> None:
        self._path, self._writes, self._on_metrics = path, writes, on_metrics
        kept = [line for line in _read(path) if line["step"] <= step]
        measured = [_without_prefix(line) for line in kept]
        self._evaluated = {line["step"]: measures for line, measures in zip(kept, measured, strict=True) if measures}
        if writes:
            write_durably(path, b"".join(_render(line) for line in kept))

    def scores(self, measure: str) -> dict[int, float]:
        """A measure of every evaluation that has it, by step."""
        return {step: values[measure] for step, values in self._evaluated.items() if measure in values}

    def write(self, step: int, metrics: Metrics) -> None:
        """Append a line; it is on disk before any checkpoint that follows it."""
        if not self._writes:
            return
        if self._on_metrics is not None:
            self._on_metrics(step, metrics)
        with self._path.open("ab") as file:
            file.write(_render({"step": step, **metrics}))
            file.flush()
            os.fsync(file.fileno())

    def write_evaluation(self, step: int, measures: Metrics) -> None:
        """Append the line of an evaluation, and remember it."""
        self.write(step, {_PREFIX + name: value for name, value in measures.items()})
        self._evaluated[step] = measures

    @property
    def evaluations(self) -> list[Metrics]:
        """The measures of every evaluation, in order."""
        return list(self._evaluated.values())


def _read(path: Path) -> list[dict[str, Any]]:
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:  # the line that a crash cut short; nothing can follow it
            break
    return lines


def _without_prefix(line: Metrics) -> Metrics:
    return {name.removeprefix(_PREFIX): value for name, value in line.items() if name.startswith(_PREFIX)}


def _render(line: Metrics) -> bytes:
    return (json.dumps(line, allow_nan=False) + "\n").encode()
