"""Commands run as a user types them, in this process or in one of their own.

    ran = run_command("lopd-store", "verify", artifact, "--json")
    assert (ran.code, ran.stderr) == (0, "")
    assert ran.json["ok"]

In this process a command costs no start of Python and torch; everything from the command line to the exit code is the
real thing. `run_process` is for what only a process has: signals, an environment, workers.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

MODULES = {"lopd-store": "lopd_cli.store", "lopd-train": "lopd_cli.train"}


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What a command left behind."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        """The answer of `--json`, which must be all of stdout."""
        return json.loads(self.stdout)


def run_command(program: str, *arguments: object) -> Ran:
    """Run a command in this process."""
    stdout, stderr = io.StringIO(), io.StringIO()
    app, run = import_module(MODULES[program]).app, import_module("lopd_cli.console").run
    with (
        mock.patch.object(sys, "argv", [program, *map(str, arguments)]),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        try:
            run(app)
        except SystemExit as ended:
            code = ended.code
    assert isinstance(code, int)
    return Ran(code=code, stdout=stdout.getvalue(), stderr=_without_progress(stderr.getvalue()))


def interrupt_command(program: str, *arguments: object, when: Callable[[], bool]) -> Ran:
    """Run a command in this process and press Ctrl-C as soon as `when()`."""

    def press() -> None:
        while not when() and not ended.is_set():
            time.sleep(0.005)
        if not ended.is_set():
            os.kill(os.getpid(), signal.SIGINT)

    ended = threading.Event()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=press)
    thread.start()
    try:
        return run_command(program, *arguments)
    finally:
        ended.set()
        thread.join()
        signal.signal(signal.SIGINT, before)


def run_process(program: str, *arguments: object, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Ran:
    """Run an installed command in a process of its own."""
    done = subprocess.run(
        command_line(program, *arguments), env=env, cwd=cwd, capture_output=True, text=True, timeout=300
    )
    return Ran(code=done.returncode, stdout=done.stdout, stderr=_without_progress(done.stderr))


def command_line(program: str, *arguments: object) -> list[str]:
    """The argument list of an installed command."""
    return [str(Path(sys.executable).with_name(program)), *map(str, arguments)]


def interrupt_process(
    program: str, *arguments: object, when: Callable[[], bool], env: Mapping[str, str] | None = None
) -> Ran:
    """Run an installed command and press Ctrl-C as soon as `when()`; it must leave no process behind."""
    process = subprocess.Popen(
        command_line(program, *arguments),
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C reaches every process of a group, and this test is none of them
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job would ignore it
    )
    deadline = time.monotonic() + 300
    while not when():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=300)
    wait_for_the_end_of(process.pid)
    return Ran(code=process.returncode, stdout=stdout, stderr=_without_progress(stderr))


def wait_for_the_end_of(group: int) -> None:
    """Return once no process of this group runs; a dead one that nobody has asked about does not count."""
    deadline = time.monotonic() + 30
    while _is_running(group):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _is_running(group: int) -> bool:
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                return True
    return False


def _without_progress(stderr: str) -> str:
    """What was said but for progress, whose lines appear only where the machine is slow."""
    lines = stderr.splitlines(keepends=True)
    return "".join(line for line in lines if not re.match(r"(generate|build|verify|push|pull|sft|opd): [0-9]", line))
