from __future__ import annotations

import json
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

SETTINGS = "--steps 2 --batch-rollouts 4 --eval-fraction 0.2 --device cpu --betas 0.9 0.95"


def lopd_train(command: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of a command line."""
    monkeypatch.setattr(sys, "argv", ["lopd-train", *command.split()])
    (script,) = entry_points(group="console_scripts", name="lopd-train")
    with pytest.raises(SystemExit) as raised:
        script.load()()
    return int(raised.value.code or 0)


def test_sft_answers_in_json(
    student_dir: Path,
    sft_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = f"sft --model {student_dir} --data {sft_data} --output {tmp_path / 'sft'} --json {SETTINGS}"
    assert lopd_train(command, monkeypatch) == 0
    answer = json.loads(capsys.readouterr().out)
    assert set(answer) == {"output", "steps", "first_eval", "last_eval"}
    assert (answer["output"], answer["steps"]) == (str(tmp_path / "sft"), 2)
    settings = json.loads((tmp_path / "sft/run.json").read_text())["config"]
    assert (settings["betas"], settings["schedule"]) == ([0.9, 0.95], "cosine")


def test_opd_says_what_came_out(
    artifact: Path,
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = f"opd --artifact {artifact} --student {reference} --output {tmp_path / 'opd'} {SETTINGS}"
    assert lopd_train(command, monkeypatch) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path / 'opd'}: 2 steps\nheld-out reverse kl: " in out


def test_the_gate_refuses_with_exit_code_1_and_names_the_way_around_it(
    artifact: Path,
    student_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = f"opd --artifact {artifact} --student {student_dir} --output {tmp_path / 'opd'} {SETTINGS}"
    assert lopd_train(command, monkeypatch) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "pass `--allow-inconsistent-teacher`" in captured.err
    assert lopd_train(f"{command} --allow-inconsistent-teacher", monkeypatch) == 0


@pytest.mark.parametrize(
    "command",
    [
        "sft --model nowhere --data nothing.parquet --output out",
        "opd --artifact nowhere --student nowhere --output out",
        "opd --artifact a --student b --output out --learning-rate -1",
        "opd --artifact a --student b --output out --schedule linear",
        "opd --student b --output out",
    ],
)
def test_bad_usage_exits_with_2(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert lopd_train(command, monkeypatch) == 2
    assert not list(tmp_path.iterdir())
