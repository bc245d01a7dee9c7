"""Each tracker is read back by its own library."""

from __future__ import annotations

import json
import sqlite3
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from lopd_store.errors import InputError
from lopd_train import OPD

tracking: Any = import_module("lopd_cli.track").tracking

METRICS = [(1, {"loss": 0.5, "grad_norm": 2.0}), (2, {"loss": 0.25, "grad_norm": 1.0}), (2, {"eval_reverse_kl": 0.125})]


def track(tracker: str, output: Path, metrics: list[tuple[int, dict[str, float]]]) -> Path:
    directory = output.with_name(f"{output.name}.training")
    directory.mkdir(parents=True, exist_ok=True)
    with tracking(tracker, output, OPD) as on_metrics:
        assert on_metrics is not None
        for step, values in metrics:
            on_metrics(step, values)
    return directory / "tracking"


def test_nothing_is_tracked_that_nobody_asked_for(tmp_path: Path) -> None:
    with tracking(None, tmp_path / "opd", OPD) as on_metrics:
        assert on_metrics is None


def test_a_tracker_that_is_not_installed_is_named_before_the_run_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lopd_cli.track.find_spec", lambda name: None)
    with (
        pytest.raises(InputError, match=r"`--track wandb` needs `wandb`\n\nhint: pip install wandb"),
        tracking("wandb", tmp_path / "opd", OPD),
    ):
        pytest.fail("it began")


@pytest.mark.system
def test_tensorboard_shows_the_metrics_of_both_halves_of_a_run(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track("tensorboard", tmp_path / "opd", METRICS[:1])
    folder = track("tensorboard", tmp_path / "opd", METRICS[1:])
    events = EventAccumulator(str(folder)).Reload()
    found = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert found == {
        "loss": [(1, 0.5), (2, 0.25)],
        "grad_norm": [(1, 2.0), (2, 1.0)],
        "eval_reverse_kl": [(2, 0.125)],
    }


@pytest.mark.system
def test_trackio_keeps_the_metrics_of_both_halves_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    folder = track("trackio", tmp_path / "opd", METRICS[:1])
    track("trackio", tmp_path / "opd", METRICS[1:])
    assert capsys.readouterr().out == ""  # stdout is for the answer
    with sqlite3.connect(tmp_path / "trackio/lopd.db") as base:
        rows = base.execute("select run_name, step, metrics from metrics order by id").fetchall()
    name = (folder / "name").read_text()
    assert [(run, step, json.loads(values)) for run, step, values in rows] == [(name, *some) for some in METRICS]


@pytest.mark.system
def test_wandb_keeps_the_metrics_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    folder = track("wandb", tmp_path / "opd", METRICS)
    assert capsys.readouterr().out == ""
    name = (folder / "name").read_text()
    (file,) = tmp_path.glob(f"wandb/offline-*/run-{name}.wandb")
    wanted, deadline = (b"loss", b"grad_norm", b"eval_reverse_kl", b"0.125"), time.monotonic() + 30
    while not all(word in file.read_bytes() for word in wanted):  # its own process may still be writing
        assert time.monotonic() < deadline
        time.sleep(0.1)
