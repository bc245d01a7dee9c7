"""What every command has in common: exit codes, usage errors, help, progress, and what goes to which stream."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer

import lopd_store
from lopd_store.errors import ArtifactError, DataError, InputError, LopdError, UnavailableError
from tests.commands import Ran, command_line, run_command, run_process

console: Any = import_module("lopd_cli.console")
COMMANDS = ("generate", "build", "verify", "inspect", "push", "pull", "identity")


def run_raising(error: BaseException) -> Ran:
    """Run a command line whose one command raises this."""
    app = typer.Typer()

    @app.command()
    def fail() -> None:
        raise error

    stdout, stderr = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        pytest.raises(SystemExit) as ended,
    ):
        patch.setattr(sys, "argv", ["lopd-store"])
        console.run(app)
    assert isinstance(ended.value.code, int)
    return Ran(code=ended.value.code, stdout=stdout.getvalue(), stderr=stderr.getvalue())


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ArtifactError("digest differs", code="A022"), 1, "error[A022]: digest differs\n"),
        (DataError("no good", expected="1", actual="2"), 1, "error: no good\n  expected  1\n  actual    2\n"),
        (InputError("not so", hint="but so"), 2, "error: not so\n\nhint: but so\n"),
        (UnavailableError("no answer"), 3, "error: no answer\n"),
        (LopdError("[red]not markup[/] \x1b[31mnot colour"), 1, "error: [red]not markup[/] \\x1b[31mnot colour\n"),
        (OSError(13, "Permission denied", "parts"), 3, "error: [Errno 13] Permission denied: 'parts'\n"),
        (
            OSError(28, "No space left on device", "parts"),
            3,
            "error: [Errno 28] No space left on device: 'parts'\n\nhint: make room and run the same command again\n",
        ),
        (MemoryError(), 3, "error: MemoryError\n"),
        (typer.Exit(1), 1, ""),
        (KeyboardInterrupt(), 130, "interrupted; run the same command again, and it goes on where it can\n"),
    ],
    ids=["artifact", "data", "input", "unavailable", "markup", "permission", "disk", "memory", "exit", "interrupt"],
)
def test_every_error_has_its_exit_code_and_its_text_on_stderr(error: BaseException, code: int, text: str) -> None:
    assert run_raising(error) == Ran(code=code, stdout="", stderr=text)


def test_ctrl_c_before_the_command_begins_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(app: typer.Typer) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(typer.main, "get_command", interrupt)
    assert (ran := run_raising(AssertionError())).code == 130 and ran.stderr.startswith("interrupted; ")


@pytest.mark.parametrize("program", ["store", "train"])
def test_ctrl_c_while_libraries_are_imported_is_no_traceback(program: str, tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt\n")
    begin = f"from lopd_cli import entry; entry.{program}()"
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", begin], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_raising(ZeroDivisionError())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("bild",), "error: No such command 'bild'. Did you mean 'build'?\n\nhint: see `lopd-store --help`\n"),
        (("build",), "error: Missing option '--teacher'.\n\nhint: see `lopd-store build --help`\n"),
        (
            ("build", "--teecher", "x"),
            "error: No such option: --teecher (Possible options: --teacher)\n\nhint: see `lopd-store build --help`\n",
        ),
        (("push", "artifact"), "error: Missing argument 'OWNER/NAME'.\n\nhint: see `lopd-store push --help`\n"),
    ],
)
def test_a_usage_error_looks_like_every_other_error(arguments: tuple[str, ...], text: str) -> None:
    assert run_command("lopd-store", *arguments) == Ran(code=2, stdout="", stderr=text)


def test_the_version_is_told() -> None:
    assert run_command("lopd-store", "--version") == Ran(code=0, stdout=f"lopd {lopd_store.__version__}\n", stderr="")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help_that_fits_a_screen(name: str) -> None:
    ran = run_command("lopd-store", name, "--help")
    assert (ran.code, ran.stderr) == (0, "")
    assert f"Usage: lopd-store {name}" in ran.stdout
    assert len(ran.stdout.splitlines()) <= 60
    assert run_command("lopd-store", name, "-h") == ran


def test_the_help_of_a_long_command_is_in_groups_and_shows_defaults() -> None:
    text = run_command("lopd-store", "build", "--help").stdout
    assert [text.index(heading) for heading in ("Options", "What is stored", "How it runs")] == sorted(
        text.index(heading) for heading in ("Options", "What is stored", "How it runs")
    )
    assert re.search(r"--coverage (.*\n){0,2}.*0\.99", text)


@pytest.mark.parametrize("command", [("lopd-store", "build"), ("lopd-train", "opd")])
def test_the_help_says_what_to_type_and_not_how_it_is_parsed(command: tuple[str, str]) -> None:
    text = run_command(*command, "--help").stdout
    of_help = r"--help .*<bool>"
    assert re.findall("<.*>", re.sub(of_help, "", text)) == []
    assert re.search(r"--json +Answer", text)


def test_a_table_is_as_wide_as_its_cells(capsys: pytest.CaptureFixture[str]) -> None:
    console.table([("a", "x" * 300, ""), ("bcd", "[bold]", "y")], header=("one", "two", "three"))
    assert capsys.readouterr().out.splitlines() == [
        "one  two" + " " * 299 + "three",
        "a    " + "x" * 300,
        "bcd  [bold]" + " " * 296 + "y",
    ]


def run_on_a_terminal(argv: list[str]) -> tuple[str, str]:
    """stdout, a pipe, and stderr, a terminal of 200 columns, of a process that ends well."""
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "200"}
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=theirs, env=env, text=True) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # how Linux says that the other side is closed
            while block := os.read(ours, 1 << 16):
                shown += block
        assert process.stdout is not None
        stdout = process.stdout.read()
    os.close(ours)
    assert process.returncode == 0, shown
    return stdout, re.sub(r"\x1b\[[0-9;]*m", "", shown.decode())


def test_a_bar_is_drawn_on_stderr_in_units_that_people_read_and_goes_away(sealed: Path) -> None:
    stdout, shown = run_on_a_terminal(command_line("lopd-store", "verify", sealed))
    assert stdout == run_command("lopd-store", "verify", sealed).stdout
    size = sum(file.stat().st_size for file in (sealed / "parts").iterdir())
    assert re.search(rf"verify ━+ {size / 1000:.1f} kB of {size / 1000:.1f} kB, [\d,.]+ [kMG]?B/s", shown)
    assert shown.endswith("\x1b[1A\x1b[2K")  # up one line, and erase it


def test_a_bar_shows_rate_estimate_and_more(sealed: Path) -> None:
    script = (
        "import time; from lopd_cli import console\n"
        "with console.progress('build', 'positions') as meter:\n"
        "    meter.update(0, 4800); time.sleep(0.3); meter.update(1200, 4800, '[part] 1'); time.sleep(0.3)\n"
    )
    _, shown = run_on_a_terminal([sys.executable, "-c", script])
    assert re.search(r"build ━+ …", shown)
    assert re.search(r"build ━+╺?━+ 1,200 of 4,800 positions, [\d,]+ positions/s, 0:01 left, \[part\] 1", shown)


def test_two_bars_are_shown_at_the_same_time(sealed: Path) -> None:
    script = (
        "import time; from lopd_cli import console\n"
        "with console.progress('verify', 'bytes') as meter:\n"
        "    beside = meter.beside('push'); meter.update(2, 4); time.sleep(0.3)\n"
        "    beside.update(1, 4); meter.update(4, 4); time.sleep(0.3); beside.update(4, 4)\n"
    )
    _, shown = run_on_a_terminal([sys.executable, "-c", script])
    assert re.search(r"verify ━+╺?━+ 2 bytes of 4 bytes *\r?[^p]*verify", shown)  # not shown before it begins
    assert re.search(r"verify ━+ 4 bytes of 4 bytes.*\r\npush ", shown)


def test_progress_is_silent_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("verify", "bytes") as meter:
        meter.update(5, 10)
    assert capsys.readouterr() == ("", "")


def test_a_log_hears_of_long_work_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "_LINE_EVERY_SECONDS", 0)
    with console.progress("sft", "rollouts") as meter:
        meter.update(0, 10)
        meter.update(5, 10, "loss 1.5")
    first, second = capsys.readouterr().err.splitlines()
    assert first == "sft: 0 of 10 rollouts"
    assert re.fullmatch(r"sft: 5 of 10 rollouts, [\d,]+ rollouts/s, 0:00 left, loss 1\.5", second)


def test_a_stdout_that_cannot_show_everything_shows_what_it_can(sealed: Path) -> None:
    ran = run_process("lopd-store", "inspect", sealed, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (ran.code, ran.stderr) == (0, "")
    assert ran.stdout == run_command("lopd-store", "inspect", sealed).stdout.replace("…", "\\u2026")


def test_one_thing_that_prints_is_the_console() -> None:
    sources = [*Path(lopd_store.__file__).parent.rglob("*.py"), *Path(console.__file__).parent.glob("*.py")]
    printing = [path.name for path in sources if re.search(r"^\s*print\(|sys\.std(out|err)\b", path.read_text(), re.M)]
    assert printing == ["console.py"]
