"""What a run leaves on disk, and how it goes on after being stopped.

    OUTPUT.training/            while it runs
        run.json                what the run is: settings, inputs, verdict of the gate, versions
        metrics.jsonl
        state.pt                what it takes to resume: weights, optimiser, step, random state
    OUTPUT/                     once it is finished: the same without the state, and a model as `save_pretrained`
        lopd-provenance.json    writes it, with the record that ties it to its data,
        README.md               and a card for people

Everything is written under another name first and renamed, so a crash at any moment leaves the state before it whole.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lopd_store import strictjson
from lopd_store.durable import sync_directory, write_durably
from lopd_store.errors import InputError
from lopd_store.gate import State
from lopd_store.identity import ModelIdentity, identify
from lopd_store.manifest import Manifest
from lopd_store.models import PROVENANCE_FILE, without_bars
from lopd_store.provenance import CheckpointRecord, Method, SftProvenance
from lopd_train.card import MODEL_CARD, render_model_card
from lopd_train.config import FREE_TO_CHANGE, TrainConfig
from lopd_train.student import Student

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
_STATE_FILE = "state.pt"
# What may differ between a run and its resumption: where things lie, and the settings that say so.
_NOT_COMPARED = {"inputs.model.path", "inputs.model.identity.name", "inputs.data.path"}
_NOT_COMPARED |= {f"config.{name}" for name in FREE_TO_CHANGE}


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run is: equal runs train equal models."""

    method: Method
    config: TrainConfig  # resolved
    model: str  # where the base lies
    base: ModelIdentity
    data: str  # where the SFT data or the artifact lies
    data_digest: str  # of the file, or the artifact's fingerprint
    sft: SftProvenance  # of the model that will come out
    verdict: State | None = None  # of the gate
    overrides: tuple[str, ...] = ()
    artifact: Manifest | None = None  # of an opd run, for the model card

    def to_json(self) -> dict[str, Any]:
        """What run.json holds, beside versions."""
        return {
            "method": self.method,
            "config": self.config.to_json(),
            "inputs": {
                "model": {"path": self.model, "identity": self.base.to_json()},
                "data": {"path": self.data, "digest": self.data_digest},
                "sft": self.sft.to_json(),
            },
            "verdict": self.verdict,
            "overrides": list(self.overrides),
        }


def check_output(output: Path) -> None:
    """Refuse an output that exists, before anything is read."""
    if (output / RUN_FILE).is_file():
        raise InputError(
            f"`{output}` is a finished run",
            hint="choose another `--output`; to train it further, make it the model of a new run",
        )
    if output.exists():
        raise InputError(f"`{output}` exists", hint="choose another `--output`, or move it away")


def begin(run: Run, output: Path) -> Path:
    """The directory that the run works in, new or of the same run interrupted; another run's is refused."""
    directory = output.with_name(output.name + ".training")
    path, wanted = directory / RUN_FILE, run.to_json()
    if path.is_file():
        found = dict(_flat(strictjson.loads(path.read_bytes(), where=str(path))))
        for name, value in _flat(wanted):
            if name not in _NOT_COMPARED and found.get(name) != value:
                raise InputError(
                    f"`{directory}` holds an interrupted run with another `{name}`",
                    expected=found.get(name),
                    actual=value,
                    hint=f"go on as it was begun, or remove `{directory}` to begin anew",
                )
    directory.mkdir(parents=True, exist_ok=True)
    write_durably(path, strictjson.pretty({**wanted, "versions": _versions()}))
    return directory


def save_state(directory: Path, *, step: int, student: Student, optimizer: torch.optim.Optimizer) -> None:
    """Keep what it takes to go on after `step`; the state before it stays until this one is whole."""
    state = {
        "step": step,
        "model": student.model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    unfinished = directory / (_STATE_FILE + ".unfinished")
    try:
        with unfinished.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(directory / _STATE_FILE)
    finally:
        unfinished.unlink(missing_ok=True)


def load_state(directory: Path, *, student: Student, optimizer: torch.optim.Optimizer) -> int:
    """Take up the saved state, if there is one; returns the steps that are done."""
    path = directory / _STATE_FILE
    if not path.is_file():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    student.model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])
    if torch.cuda.is_available() and len(state["random_cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["random_cuda"])
    return int(state["step"])


def finish(run: Run, student: Student, directory: Path, output: Path) -> None:
    """Write the model and its provenance beside the run's files, and give the whole its name."""
    with without_bars():
        student.model.to(student.dtype).save_pretrained(directory)
    student.tokenizer.save_pretrained(directory)
    record = CheckpointRecord(
        status="recorded",
        method=run.method,
        model=replace(identify(directory), name=output.name),
        base=run.base,
        data=run.data_digest,
        sft=run.sft,
        overrides=run.overrides,
    )
    write_durably(directory / PROVENANCE_FILE, strictjson.pretty(record.to_json()))
    write_durably(directory / MODEL_CARD, render_model_card(record, run.config, run.artifact).encode())
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    directory.rename(output)
    sync_directory(output.parent)
    (output / _STATE_FILE).unlink(missing_ok=True)


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a JSON object by dotted names; lists are leaves."""
    for name, member in value.items():
        if isinstance(member, Mapping):
            yield from _flat(member, f"{prefix}{name}.")
        else:
            yield prefix + name, member


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("lopd", "torch", "transformers")}
    return {"python": platform.python_version(), **packages}
