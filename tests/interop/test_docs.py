"""The commands and the code of docs/export.md run as they stand there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.commands import run_command

TEXT = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
    return [block for kind, block in found if kind == language]


@pytest.fixture
def exported(
    sealed: Path, unknown: Path, teacher_dir: Path, student_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command of the page, in its order, in an empty directory."""
    monkeypatch.chdir(tmp_path)
    places = {"ARTIFACT": sealed, "UNKNOWN": unknown, "TEACHER": teacher_dir, "SFT": student_dir}
    lines = [line for block in blocks("") for line in block.splitlines()]
    assert len(lines) == 6
    for line in lines:
        program, *arguments = (str(places.get(word, word)) for word in shlex.split(line))
        ran = run_command(program, *arguments)
        assert ran.code == 0, f"{line}\n{ran.stderr}"


@pytest.mark.usefixtures("exported")
def test_the_commands_run_and_the_record_is_where_the_page_says(capsys: pytest.CaptureFixture[str]) -> None:
    code, _ = blocks("python")
    exec(compile(code, "docs/export.md", "exec"), {})
    assert re.fullmatch(r"sha256:[0-9a-f]{64} consistent \[\]\n", capsys.readouterr().out)


@pytest.mark.system
@pytest.mark.usefixtures("exported")
def test_the_code_for_datasets_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    found: dict[str, object] = {}
    exec(compile(blocks("python")[1], "docs/export.md", "exec"), found)
    rows = found["rows"]
    assert rows.column_names[:2] == ["prompt_ids", "completion_ids"]  # type: ignore[attr-defined]
