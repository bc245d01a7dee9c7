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
    line: Metrics | None = None  # what metrics.jsonl just got
    note: str | None = None  # to be said once


OnProgress = Callable[[Progress], None]


class RunLog:
    """metrics.jsonl, opened after `step` steps: what a crashed run wrote beyond them is dropped."""

    def __init__(self, path: Path, *, step: int, writes: bool = True) -> None:
        self._path, self._writes = path, writes
        kept = [line for line in _read(path) if line["step"] <= step]
        self.evaluations = {line["step"]: found for line in kept if (found := _without_prefix(line))}  # by step
        if writes:
            write_durably(path, b"".join(map(_render, kept)))

    def write(self, step: int, metrics: Metrics) -> Metrics:
        """Append a line, and return it; it is on disk before any checkpoint that follows it."""
        line = {"step": step, **metrics}
        if self._writes:
            with self._path.open("ab") as file:
                file.write(_render(line))
                file.flush()
                os.fsync(file.fileno())
        return line

    def write_evaluation(self, step: int, measures: Metrics) -> Metrics:
        """Append the line of an evaluation, and remember it."""
        self.evaluations[step] = measures
        return self.write(step, {_PREFIX + name: value for name, value in measures.items()})


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
