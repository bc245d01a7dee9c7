"""What is kept on the way: states to go on from, models to look at, and a command that looks at them."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

import lopd_train
from lopd_train import Progress, TrainConfig, checkpoint, student
from lopd_train.data import Cursor
from lopd_train.trainer import make_optimizer


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """A disk on which no file gets longer than this."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_state_before_it_whole(reference: Path, config: TrainConfig, tmp_path: Path) -> None:
    loaded = student.load(reference, config)
    optimizer = make_optimizer(loaded.model, config)

    def save(step: int) -> None:
        checkpoint.save_state(tmp_path, step, [Cursor(taken=step)], loaded, optimizer)

    save(1)
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter += 1
    with room_for(20_000), pytest.raises(OSError, match="File too large"):
        save(2)
    assert [path.name for path in tmp_path.iterdir()] == ["state-1"]
    assert checkpoint.load_state(tmp_path, loaded, optimizer) == (1, [Cursor(taken=1)])
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())


def test_a_full_disk_leaves_the_models_that_were_kept_and_no_half_of_one(
    reference: Path, config: TrainConfig, tmp_path: Path
) -> None:
    loaded, kept = student.load(reference, replace(config, keep_checkpoints=2)), tmp_path / "checkpoints"
    checkpoint.keep_model(tmp_path, 1, loaded, {})
    with room_for(20_000), pytest.raises((OSError, SafetensorError), match="File too large"):
        checkpoint.keep_model(tmp_path, 2, loaded, {})
    assert [path.name for path in kept.iterdir()] == ["step-1"]
    (kept / "step-2.unfinished").mkdir()  # a kill leaves it
    checkpoint.keep_model(tmp_path, 3, loaded, {})
    assert {path.name for path in kept.iterdir()} == {"step-1", "step-3"}
    AutoModelForCausalLM.from_pretrained(kept / "step-3")


def test_the_last_models_and_the_best_are_kept_and_load(
    artifact: Path, reference: Path, config: TrainConfig, tmp_path: Path
) -> None:
    # The learning rate falls to nothing and starts far too high, so that the first checkpoint may or may not be best.
    run = replace(config, eval_every=1, checkpoint_every=1, keep_checkpoints=2, learning_rate=1.0)
    output = lopd_train.train(artifact=artifact, student=reference, output=tmp_path / "opd", config=run).output
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["eval_reverse_kl"] for line in lines if "eval_reverse_kl" in line and line["step"]}
    best = min(scores, key=lambda step: scores[step])
    assert best < 5  # else it would be there in any case
    assert {path.name for path in (output / "checkpoints").iterdir()} == {f"step-{best}", "step-5", "step-6"}
    last, final = (AutoModelForCausalLM.from_pretrained(path) for path in (output / "checkpoints/step-6", output))
    assert all(torch.equal(a, b) for a, b in zip(last.parameters(), final.parameters(), strict=True))
    assert not list(output.glob("state*"))


def test_a_command_sees_each_checkpoint_and_may_fail(
    artifact: Path, reference: Path, config: TrainConfig, tmp_path: Path
) -> None:
    heard: list[Progress] = []
    command = f"ls $LOPD_CHECKPOINT/model.safetensors && echo $LOPD_STEP >> {tmp_path}/steps; test $LOPD_STEP != 4"
    run = replace(config, eval_fraction=0, checkpoint_every=2, eval_command=command)
    result = lopd_train.train(
        artifact=artifact, student=reference, output=tmp_path / "opd", config=run, on_progress=heard.append
    )
    assert (tmp_path / "steps").read_text().split() == ["2", "4", "6"]
    assert [progress.note for progress in heard if progress.note] == [
        f"`{command}` left with exit code 1 after step 4; training goes on"
    ]
    assert result.steps == 6
    assert [path.name for path in (result.output / "checkpoints").iterdir()] == ["step-6"]


def test_a_command_does_not_take_itself_for_a_process_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "8", "MASTER_ADDR": "host", "TORCHELASTIC_RUN_ID": "none"}
    for name, value in {**said, "CUDA_VISIBLE_DEVICES": "0"}.items():
        monkeypatch.setenv(name, value)
    assert checkpoint.run_command(f"env > {tmp_path}/seen", tmp_path / "step-2", 2) == 0
    seen = dict(line.partition("=")[::2] for line in (tmp_path / "seen").read_text().splitlines())
    assert not said.keys() & seen.keys()
    assert seen.items() >= {"LOPD_STEP": "2", "CUDA_VISIBLE_DEVICES": "0", "PATH": os.environ["PATH"]}.items()


def test_metrics_are_handed_on_as_they_are_written(
    artifact: Path, reference: Path, config: TrainConfig, tmp_path: Path
) -> None:
    heard: list[Progress] = []
    result = lopd_train.train(
        artifact=artifact,
        student=reference,
        output=tmp_path / "opd",
        config=config,
        on_progress=heard.append,
    )
    lines = (result.output / "metrics.jsonl").read_text().splitlines()
    assert [progress.line for progress in heard if progress.line] == [json.loads(line) for line in lines]
