"""Runs of several processes, and of one that is killed; each starts Python anew, so they are system tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.system

SETTINGS = (
    "--steps 6 --batch-rollouts 4 --learning-rate 1e-3 --eval-fraction 0.2 --eval-every 2 --device cpu "
    "--micro-batch-tokens 64 --checkpoint-every 3"
)
# Kills itself with what nobody can catch, in the middle of the step after so many.
KILLED = """
import os, signal, sys
from lopd_cli import train
import lopd_train.trainer as trainer
step = trainer.Trainer.backward
def backward(self, records, term):
    if self.step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, records, term)
trainer.Trainer.backward = backward
train.main()
"""


def opd(
    artifact: Path, reference: Path, output: Path, *options: str, processes: int = 1, killed: bool = False
) -> subprocess.CompletedProcess[str]:
    script = output.with_name("killed.py")
    script.write_text(KILLED)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [str(script)] if killed else ["-m", "lopd_cli.train"]
    where = ["opd", "--artifact", str(artifact), "--student", str(reference), "--output", str(output)]
    return subprocess.run(
        [sys.executable, *(torchrun if processes > 1 else []), *command, *where, *SETTINGS.split(), *options],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )


def metrics(directory: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


def assert_same_run(found: Path, expected: Path, *, turned: int = 0) -> None:
    """The same curve and, but for the order of sums, the same weights; `turned` of them may be a step of Adam away."""
    for line, wanted in zip(metrics(found), metrics(expected), strict=True):
        assert line == pytest.approx(wanted, rel=1e-3, abs=1e-4)
    one, two = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (found, expected))
    assert one.keys() == two.keys()
    gaps = torch.cat([(value - two[name]).abs().flatten() for name, value in one.items()])
    assert (gaps > 1e-4).sum() <= turned and gaps.max() < 1e-3


MIXED = "--objective reverse_kl --gradient-checkpointing --sft-data SFT_DATA --sft-weight 0.5 --sft-rollouts 3"


@pytest.fixture(scope="module", params=["", "--lora-rank 4", MIXED])
def options(request: pytest.FixtureRequest, sft_data: Path) -> list[str]:
    return str(request.param).replace("SFT_DATA", str(sft_data)).split()


def test_two_processes_give_the_curve_and_the_model_of_one(
    options: list[str], artifact: Path, reference: Path, tmp_path: Path
) -> None:
    one, two = (opd(artifact, reference, tmp_path / str(n), *options, processes=n) for n in (1, 2))
    assert (one.returncode, two.returncode) == (0, 0), two.stderr
    assert two.stdout.count("6 steps") == 1  # only the first process answers
    assert_same_run(tmp_path / "2", tmp_path / "1")
    assert json.loads((tmp_path / "2/lopd-provenance.json").read_text())["model"]["name"] == "2"


def test_two_processes_in_bfloat16_stay_near_one(artifact: Path, reference: Path, tmp_path: Path) -> None:
    outputs = [tmp_path / "1", tmp_path / "2"]
    for number, output in enumerate(outputs, 1):
        done = opd(artifact, reference, output, "--dtype", "bfloat16", processes=number)
        assert done.returncode == 0, done.stderr
    one, two = (
        [line["eval_reverse_kl"] for line in metrics(output) if "eval_reverse_kl" in line] for output in outputs
    )
    assert one[-1] != one[0]
    assert two == pytest.approx(one, rel=0.02)
    models = [AutoModelForCausalLM.from_pretrained(output) for output in outputs]
    assert {parameter.dtype for model in models for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 2), (2, 1)])
def test_a_killed_run_goes_on_with_as_many_processes_as_there_are(
    before: int, after: int, artifact: Path, reference: Path, tmp_path: Path
) -> None:
    assert opd(artifact, reference, tmp_path / "whole").returncode == 0
    killed = opd(artifact, reference, tmp_path / "opd", processes=before, killed=True)
    assert killed.returncode == (-signal.SIGKILL if before == 1 else 1)
    assert [path.name for path in (tmp_path / "opd.training").glob("state*")] == ["state-3"]
    assert opd(artifact, reference, tmp_path / "opd", processes=after).returncode == 0
    assert_same_run(tmp_path / "opd", tmp_path / "whole")
    if (before, after) == (1, 1):
        assert metrics(tmp_path / "opd") == metrics(tmp_path / "whole")
        weights = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("opd", "whole"))
        assert len(set(weights)) == 1


def test_a_batch_that_does_not_divide_by_the_processes_is_refused(
    artifact: Path, reference: Path, tmp_path: Path
) -> None:
    done = opd(artifact, reference, tmp_path / "opd", "--batch-rollouts", "5", processes=2)
    assert done.returncode == 1
    assert "the rollouts of a step do not divide by 2 processes\n  expected  a multiple of 2\n" in done.stderr
    assert not (tmp_path / "opd.training").exists()


def test_compiled_blocks_give_the_curve_of_plain_ones(artifact: Path, reference: Path, tmp_path: Path) -> None:
    for name, options in (("plain", []), ("compiled", ["--compile"])):
        assert opd(artifact, reference, tmp_path / name, *options).returncode == 0
    # Of one weight the first gradient is 2.6e-9, and 9.5e-9 compiled. Adam's epsilon is 1e-8, so its first step is
    # 0.21 or 0.49 of the learning rate of 1e-3.
    assert_same_run(tmp_path / "compiled", tmp_path / "plain", turned=3)
