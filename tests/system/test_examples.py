"""What the README and the examples promise, done as they say it."""

from __future__ import annotations

import re
from importlib import util
from pathlib import Path

import pytest

import lopd_store
from tests.commands import run_command
from tests.hub.server import HubServer

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def readme_block(beginning: str) -> str:
    """The code block of the README that begins like this."""
    (block,) = re.findall(rf"```\w*\n({re.escape(beginning)}.*?)```", README, flags=re.DOTALL)
    return str(block)


def test_the_quickstart_runs_from_prompts_to_a_trained_student(
    teacher_dir: Path, student_dir: Path, prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = util.spec_from_file_location("quickstart", ROOT / "examples" / "quickstart.py")
    assert spec is not None and spec.loader is not None
    quickstart = util.module_from_spec(spec)
    spec.loader.exec_module(quickstart)
    quickstart.main(str(teacher_dir), str(student_dir), str(prompts_file), tmp_path, tokens=24, steps=4)
    assert "held-out reverse KL: " in capsys.readouterr().out
    assert (tmp_path / "opd" / "model.safetensors").is_file()
    assert lopd_store.verify(tmp_path / "artifact").ok


def test_the_readmes_commands_run_one_after_the_other(
    hub: HubServer,
    teacher_dir: Path,
    student_dir: Path,
    prompts_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"TEACHER": teacher_dir, "STUDENT": student_dir, "prompts.jsonl": prompts_file, "OWNER": "acme"}
    for line in readme_block("lopd-store generate").strip().splitlines():
        for name, value in names.items():
            line = line.replace(name, str(value))
        if "sha256:…" in line:
            line = line.replace("sha256:…", lopd_store.open("artifact").fingerprint)
        if " generate " in line:
            line += " --max-response-tokens 24"  # the tiny models have a context of 256
        program, *arguments = line.split()
        ran = run_command(program, *arguments)
        assert ran.code == 0, f"{line}\n{ran.stderr}"
    assert (tmp_path / "trained" / "lopd-provenance.json").is_file()


def test_the_commands_of_the_tour_are_ones_that_exist() -> None:
    for line in readme_block("$ source .venv").strip().splitlines()[1:]:
        program, command, *_ = line.removeprefix("$ ").split()
        assert run_command(program, command, "--help").code == 0, line


def test_the_commands_of_the_guide_to_training_run(
    sealed: Path, teacher_dir: Path, student_dir: Path, prompts_file: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data.parquet"
    lopd_store.generate(model=teacher_dir, prompts=prompts_file, output=data, max_response_tokens=8)
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    commands = re.findall(r"^lopd-train opd .*$", text, flags=re.MULTILINE)
    assert len(commands) > 5
    for line in commands:
        line = (
            line.replace("ARTIFACT", str(sealed))
            .replace("SFT", str(student_dir))
            .replace("FILE", str(data))
            .replace("configs/", f"{ROOT}/configs/")
        )
        line = re.sub(r"--output (\w+)", rf"--output {tmp_path}/\1", line)
        program, *arguments = line.split()
        ran = run_command(program, *arguments, "--steps", "1", "--eval-fraction", "0.2", "--device", "cpu")
        assert ran.code == 0, f"{line}\n{ran.stderr}"
        assert "the student is " in ran.stdout
