"""docs/sharing.md, done as it says: one lab pushes, the other finds, pulls and trains."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import lopd_store
from tests.commands import run_command
from tests.hub.server import HubServer

TEXT = (Path(__file__).parents[2] / "docs" / "sharing.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE)
COMMANDS = [line for language, block in BLOCKS if not language for line in block.splitlines()]
PROGRAMS = [block for language, block in BLOCKS if language == "python"]
SETTINGS = "--steps 1 --batch-rollouts 4 --eval-fraction 0 --device cpu --allow-unknown-sft-teacher"


@pytest.fixture
def here(artifact: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The directory in which the artifact is called `artifact`, with a cache of its own."""
    monkeypatch.chdir(artifact.parent)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return artifact.parent


def test_the_commands_of_the_page_run_one_after_the_other(hub: HubServer, here: Path, student_dir: Path) -> None:
    assert len(COMMANDS) == 10
    for line in COMMANDS:
        for name, value in {
            "OWNER/NAME": "acme/art",
            "OWNER": "acme",
            "STUDENT": str(student_dir),
            "sha256:…": lopd_store.open("artifact").fingerprint,
        }.items():
            line = line.replace(name, value)
        program, *arguments = (line + (f" {SETTINGS}" if " opd " in line else "")).split()
        ran = run_command(program, *arguments)
        assert ran.code == 0, f"{line}\n{ran.stderr}"
        if " list " in line or " search " in line:
            assert "hf://acme/art@lopd-" in ran.stdout
    assert lopd_store.verify("pulled").ok and lopd_store.verify("taste").partial
    trained, streamed = (Path(name, "model.safetensors").read_bytes() for name in ("trained", "streamed"))
    assert trained == streamed


@pytest.mark.system
@pytest.mark.parametrize("program", PROGRAMS, ids=["open", "load_dataset", "to_dataset"])
def test_the_programs_of_the_page_run(
    hub: HubServer, hub_env: dict[str, str], here: Path, tmp_path: Path, program: str
) -> None:
    lopd_store.push("artifact", "acme/art")
    ran = subprocess.run(
        [sys.executable, "-c", program.replace("OWNER/NAME", "acme/art")],
        env=hub_env | {"HF_DATASETS_CACHE": str(tmp_path / "datasets"), "XDG_CACHE_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
