"""What processes that a build starts have in common."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

HELD_BACK = """
import multiprocessing, signal
from lopd_store.processes import interrupts_held_back

def tell():
    print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []), flush=True)

if __name__ == "__main__":
    for _ in range(2):
        process = multiprocessing.get_context("spawn").Process(target=tell)
        with interrupts_held_back():
            process.start()
        process.join()
    tell()
"""
IMPORTS = """
import multiprocessing
from lopd_store.processes import require_main_guard
"""
BUILD = """
require_main_guard()
process = multiprocessing.get_context("spawn").Process(target=print)
process.start()
process.join()
"""


def run(script: str, path: Path) -> subprocess.CompletedProcess[str]:
    path.write_text(script)
    return subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=60, check=True)


def test_no_process_that_is_started_with_interrupts_held_back_sees_one(tmp_path: Path) -> None:
    assert run(HELD_BACK, tmp_path / "script.py").stdout == "True\nTrue\nFalse\n"


@pytest.mark.parametrize("guard", [True, False])
def test_a_script_that_would_build_again_in_every_process_is_told_so(guard: bool, tmp_path: Path) -> None:
    build = "if __name__ == '__main__':" + textwrap.indent(BUILD, "    ") if guard else BUILD
    ran = run(IMPORTS + build, tmp_path / "script.py")
    assert ("put what the script does under `if __name__ == " in ran.stderr) != guard
    assert ("Traceback" in ran.stderr) != guard
