"""Where else the metrics go when asked: TensorBoard, Weights & Biases or trackio, each by its own library.

    with tracking("tensorboard", output, config) as on_metrics:
        on_metrics(1, {"loss": 0.5})

metrics.jsonl is written in any case, and it alone is made whole again when a run goes on after a crash: a tracker may
show some steps twice. A run that goes on is the same tracked run.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from lopd_store.durable import write_durably
from lopd_store.errors import InputError
from lopd_train import TrainConfig
from lopd_train.world import from_environment

from . import console

Tracker = Literal["tensorboard", "wandb", "trackio"]
_PROJECT = "lopd"
OnMetrics = Callable[[int, Mapping[str, Any]], None]
_Opened = tuple[OnMetrics, Callable[[], object]]  # what takes metrics, what ends it


@contextmanager
def tracking(tracker: Tracker | None, output: Path, config: TrainConfig) -> Iterator[OnMetrics | None]:
    """What to call with the metrics of each step; the tracker is opened by the first of them."""
    if tracker is None or not from_environment().is_first:
        yield None
        return
    if find_spec(tracker) is None:
        raise InputError(f"`--track {tracker}` needs `{tracker}`", hint=f"pip install {tracker}")
    opened: list[_Opened] = []

    def on_metrics(step: int, metrics: Mapping[str, Any]) -> None:
        with console.libraries_on_stderr():
            if not opened:
                folder = output.with_name(output.name + ".training") / "tracking"
                opened.append(_OPEN[tracker](folder, _name(folder, output), step, config))
            opened[0][0](step, metrics)

    try:
        yield on_metrics
    finally:
        if opened:
            with console.libraries_on_stderr():
                opened[0][1]()


def _name(folder: Path, output: Path) -> str:
    """The name of a run, the same when it goes on and no other run's."""
    folder.mkdir(exist_ok=True)
    if not (folder / "name").is_file():
        write_durably(folder / "name", f"{output.name}-{secrets.token_hex(4)}".encode())
    return (folder / "name").read_text(encoding="utf-8")


def _tensorboard(folder: Path, name: str, step: int, config: TrainConfig) -> _Opened:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder), purge_step=step)

    def track(step: int, metrics: Mapping[str, Any]) -> None:
        for metric, value in metrics.items():
            writer.add_scalar(metric, value, step)
        writer.flush()

    return track, writer.close


def _wandb(folder: Path, name: str, step: int, config: TrainConfig) -> _Opened:
    import wandb

    run = wandb.init(project=_PROJECT, id=name, name=name, config=dict(config.to_json()), resume="allow")
    return lambda step, metrics: run.log(dict(metrics), step=step), run.finish


def _trackio(folder: Path, name: str, step: int, config: TrainConfig) -> _Opened:
    import trackio

    trackio.init(project=_PROJECT, name=name, config=dict(config.to_json()), resume="allow")
    return lambda step, metrics: trackio.log(dict(metrics), step=step), trackio.finish


_OPEN = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
