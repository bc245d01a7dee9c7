"""What a run leaves on disk, and how it goes on after being stopped.

    OUTPUT.training/            while it runs
        run.json                what the run is: settings, inputs, verdict of the gate, versions
        metrics.jsonl
        state-25/               what it takes to resume after step 25: weights, optimiser, place in the data
        checkpoints/step-25/    a model of that step, where such are kept
    OUTPUT/                     once it is finished: the same without the state, and a model as `save_pretrained`
        lopd-provenance.json    writes it, with the record that ties it to its data,
        README.md               and a card for people

Everything is written under another name first and renamed, so a crash at any moment leaves the state before it whole.
A state is written by all processes of a run, each its shards, and read by however many there are next time.
"""

from __future__ import annotations

import copy
import os
import platform
import shutil
import subprocess
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from transformers import AutoModelForCausalLM

from lopd_store import strictjson
from lopd_store.durable import becoming, sync_directory, write_durably
from lopd_store.errors import InputError
from lopd_store.gate import State
from lopd_store.identity import ModelIdentity, identify
from lopd_store.manifest import Manifest
from lopd_store.models import PROVENANCE_FILE, without_bars
from lopd_store.provenance import CheckpointRecord, Method, SftProvenance
from lopd_train import lora
from lopd_train.card import MODEL_CARD, render_model_card
from lopd_train.config import FREE_TO_CHANGE, TrainConfig
from lopd_train.data import Cursor
from lopd_train.student import Student
from lopd_train.world import TORCHRUN, World

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
_CHECKPOINTS = "checkpoints"
_PLACE_FILE = "place.json"  # in a state: where in its steps and data the run is
# What may differ between a run and its resumption: where things lie, and the settings that say so.
_PLACES = {"inputs.model.path", "inputs.model.identity.name", "inputs.data.path", "inputs.sft_data.path"}
_NOT_COMPARED = _PLACES | {f"config.{name}" for name in FREE_TO_CHANGE}
_TRAINED_ALONE = state_dict.StateDictOptions(ignore_frozen_params=True, strict=False)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run is: equal runs train equal models."""

    method: Method
    config: TrainConfig  # resolved
    model: str  # where the base lies
    base: ModelIdentity
    data: str | list[str]  # where the artifact or the SFT data lies, in the order of `sft`
    data_digest: str | None  # of the one file, or the artifact's fingerprint
    sft: tuple[SftProvenance, ...]  # of the model that will come out
    sft_data: str | None = None  # what is mixed in, where it lies
    sft_data_digest: str | None = None
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
                "sft_data": {"path": self.sft_data, "digest": self.sft_data_digest},
                "sft": [one.to_json() for one in self.sft],
            },
            "verdict": self.verdict,
            "overrides": list(self.overrides),
        }


def check_output(output: Path) -> None:
    """Refuse an output that exists, before anything is read."""
    if output.exists():
        raise InputError(
            f"`{output}` exists",
            hint="choose another `--output`; to train a finished run further, make it the model of a new run",
        )


def begin(run: Run, directory: Path, world: World) -> None:
    """Make the directory ready for the run, new or the same one interrupted; another one's is refused."""
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
    world.gather(None)  # until all have compared
    if world.is_first:
        directory.mkdir(parents=True, exist_ok=True)
        write_durably(path, strictjson.pretty({**wanted, "versions": _versions()}))
    world.gather(None)


def save_state(
    directory: Path, step: int, cursors: Sequence[Cursor], student: Student, optimizer: torch.optim.Optimizer
) -> None:
    """Keep what it takes to go on after `step`; the state before it stays until this one is whole."""
    state, unfinished, world = directory / f"state-{step}", directory / "state.unfinished", student.world
    if world.is_first:
        shutil.rmtree(unfinished, ignore_errors=True)
    world.gather(None)
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # that a process is alone
            save(_tensors(student, optimizer), checkpoint_id=unfinished)
    except CheckpointException as error:  # holds what went wrong in each process
        raise next(iter(error.failures.values()))[0] from error
    finally:
        if world.is_first and not (unfinished / ".metadata").exists():
            shutil.rmtree(unfinished, ignore_errors=True)  # it may have filled the disk
    if world.is_first:
        place = {"step": step, "cursors": list(map(asdict, cursors))}
        write_durably(unfinished / _PLACE_FILE, strictjson.pretty(place))
        shutil.rmtree(state, ignore_errors=True)
        unfinished.rename(state)
        sync_directory(directory)
        for other in _states(directory):
            if other != state:
                shutil.rmtree(other)
    world.gather(None)


def load_state(directory: Path, student: Student, optimizer: torch.optim.Optimizer) -> tuple[int, list[Cursor]]:
    """Take up the saved state, if there is one; returns the steps that are done, and where the data is."""
    if not (states := _states(directory)):
        return 0, []
    place = strictjson.loads((states[-1] / _PLACE_FILE).read_bytes(), where=str(states[-1] / _PLACE_FILE))
    tensors = _tensors(student, optimizer)
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that a process is alone
        load(tensors, checkpoint_id=states[-1])
    state_dict.set_state_dict(student.model, optimizer, **tensors, options=_TRAINED_ALONE)
    return int(place["step"]), [Cursor(**cursor) for cursor in place["cursors"]]


def keep_model(directory: Path, step: int, student: Student, scores: Mapping[int, float]) -> Path:
    """Write the model of a step; of the others, the last ones and the one with the lowest score stay."""
    kept = directory / _CHECKPOINTS
    path, weights = kept / f"step-{step}", whole_weights(student)
    if student.world.is_first:
        with becoming(path) as unfinished:
            write_model(student, weights, unfinished)
        steps = sorted(map(_number, kept.glob("step-*[0-9]")))
        best = min((step for step in steps if step in scores), key=lambda step: scores[step], default=None)
        stay = {f"step-{step}" for step in (*steps[-student.config.keep_checkpoints :], best)}
        for other in kept.iterdir():  # also what a kill has left unfinished
            if other.name not in stay:
                shutil.rmtree(other)
    student.world.gather(None)
    return path


def run_command(command: str, model: Path, step: int) -> int:
    """The exit code of a shell command that is told where the model of a step is; what it prints goes to stderr."""
    # A process alone: one that took itself for the first of this run's would wait for the others.
    environment = {name: value for name, value in os.environ.items() if not TORCHRUN.fullmatch(name)}
    environment |= {"LOPD_CHECKPOINT": str(model), "LOPD_STEP": str(step)}
    return subprocess.run(command, shell=True, env=environment, stdout=2, check=False).returncode


def finish(run: Run, student: Student, directory: Path, output: Path) -> None:
    """Write the model and its provenance beside the run's files, and give the whole its name."""
    weights = whole_weights(student)
    if student.world.is_first:
        write_model(student, weights, directory)
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
        card = render_model_card(record, run.config, run.artifact, run.sft_data_digest)
        write_durably(directory / MODEL_CARD, card.encode())
        for path in filter(Path.is_file, directory.iterdir()):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        directory.rename(output)
        sync_directory(output.parent)
        for state in output.glob("state*"):
            shutil.rmtree(state)
    student.world.gather(None)


def whole_weights(student: Student) -> dict[str, torch.Tensor]:
    """The weights to export, by name, on the CPU, in the arithmetic's dtype; sharded, in the first process alone."""
    options = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)
    found = state_dict.get_model_state_dict(student.model, options=options)
    weights = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
    dtype = getattr(torch, student.config.dtype)
    return {name: value.to(dtype) for name, value in lora.merge(weights, student.config).items()}


def write_model(student: Student, weights: Mapping[str, torch.Tensor], directory: Path) -> None:
    """A directory as `save_pretrained` writes it."""
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(copy.deepcopy(student.model.config))
    plain.load_state_dict(weights, assign=True)
    plain.tie_weights()
    plain.generation_config = student.model.generation_config
    with without_bars():
        plain.save_pretrained(directory)
    student.tokenizer.save_pretrained(directory)


def _tensors(student: Student, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What is trained, as `set_state_dict` takes it: by names that do not depend on how many processes there are."""
    model, moments = state_dict.get_state_dict(student.model, optimizer, options=_TRAINED_ALONE)
    return {"model_state_dict": model, "optim_state_dict": moments}


def _states(directory: Path) -> list[Path]:
    """The whole states, the last one last; a crash may have left two."""
    return sorted(directory.glob("state-*"), key=_number)


def _number(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


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
