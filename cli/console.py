"""The one module that prints: answers to stdout, everything else to stderr.

Progress shows a rate and an estimate; where stderr is not a terminal it is a line every half minute. Colour is
decoration: without it nothing is lost. What comes from files of others is printed without its control characters.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from io import TextIOWrapper
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text
from rich.tree import Tree
from typer.exceptions import TyperException

import lopd_store
from lopd_store.errors import InputError, LopdError

_INTERRUPTED = 130
_LINE_EVERY_SECONDS = 30.0
_ANY_WIDTH = 100_000  # lines are as long as they need to be
_stderr = Console(stderr=True, highlight=False, soft_wrap=True)


def run(app: typer.Typer, *, at_once: bool = False) -> NoReturn:
    """Run a command line and leave with its exit code: 0 fine, 1 wrong, 2 usage, 3 could not tell, 130 interrupted.

    It leaves `at_once` where the interpreter's own end is not to be waited for.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # like stderr: what it cannot show is no reason to fail
    if not _stderr.is_interactive:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # they would fill a log
    try:
        command = typer.main.get_command(app)
        _name_no_type_of_flags(command)
        code = command(standalone_mode=False) or 0
    except LopdError as error:
        fail(error)
        code = error.exit_code
    except TyperException as error:
        code = _fail_usage(error)
    except (OSError, MemoryError) as error:
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        hint = "make room and run the same command again" if full else None
        fail(LopdError(str(error) or type(error).__name__, hint=hint))
        code = 3
    except KeyboardInterrupt:
        code = _INTERRUPTED
    if code == _INTERRUPTED:
        note("interrupted; run the same command again, and it goes on where it can")
    if at_once:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def show_version(wanted: bool) -> None:
    """What `--version` does."""
    if wanted:
        say(f"lopd {lopd_store.__version__}")
        raise typer.Exit


def fail(error: LopdError) -> None:
    """Print an error: where, expected, actual, hint."""
    code = f"\\[{error.code}]" if error.code else ""
    _stderr.print(f"[bold red]error{code}[/]: {escape(_printable(str(error)))}")


def note(text: str) -> None:
    """A line for people, on stderr."""
    _stderr.print(escape(_printable(text)))


def warn(text: str) -> None:
    """Something that is wrong and stops nothing yet, on stderr."""
    _stderr.print(f"[bold yellow]warning[/]: {escape(_printable(text))}")


def answer(value: Any) -> None:
    """The answer of `--json`: one JSON value on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def say(text: str) -> None:
    """The answer in words, on stdout."""
    print(_printable(text))


def table(rows: Sequence[Sequence[object]], *, header: Sequence[str] = ()) -> None:
    """A table on stdout; without a header it is a list of names and values. Lines are as long as they need to be."""
    cells = [[_printable(str(cell), "") for cell in row] for row in ([header] if header else []) + list(rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def chain(links: Sequence[Sequence[str]]) -> None:
    """Things that each came of the one before, some lines each, on stdout as a tree."""
    root = at = Tree("", hide_root=True)
    for lines in links:
        at = at.add(Text("\n".join(_printable(line, "") for line in lines)))
    Console(file=sys.stdout, width=_ANY_WIDTH, highlight=False).print(root)


@contextmanager
def libraries_on_stderr() -> Iterator[None]:
    """What libraries print in here is no answer of ours."""
    with redirect_stdout(sys.stderr):
        yield


class Meter:
    """Progress of one piece of work; `update` it with how much is done."""

    def __init__(self, description: str, unit: str, bar: Progress | None, *, visible: bool = True) -> None:
        self._description, self._unit, self._bar = description, unit, bar
        self._task = None if bar is None else bar.add_task(description, total=None, visible=visible, words="…")
        self._first: tuple[float, float] | None = None  # when the first update came, and how much was done by then
        self._also: tuple[float, str] | None = None  # likewise, of something else that is counted
        self._last_line = time.monotonic()

    def beside(self, description: str) -> Meter:
        """Progress of other work at the same time, counted in the same unit, and shown from its first update on."""
        return Meter(description, self._unit, self._bar, visible=False)

    def update(
        self, done: float, total: float | None = None, text: str = "", also: tuple[float, str] | None = None
    ) -> None:
        """Say how much is done, of how much, with a few words more where there are any.

        `also` is how much is done in another unit, whose rate is shown too.
        """
        now = time.monotonic()
        self._first = self._first or (now, done)
        self._also = self._also or also
        if also is not None and self._also is not None and now > self._first[0]:
            rate = (also[0] - self._also[0]) / (now - self._first[0])
            text = ", ".join([f"{_amount(rate, also[1])}/s", *([text] if text else [])])
        if self._bar is not None and self._task is not None:
            self._bar.start()
            words = escape(self._words(now, done, total, text))
            self._bar.update(self._task, completed=done, total=total, visible=True, words=words)
            if self._bar.finished:
                self._bar.stop()  # what comes next may have a bar of its own
        elif now - self._last_line >= _LINE_EVERY_SECONDS:
            self._last_line = now
            note(f"{self._description}: {self._words(now, done, total, text)}")

    def _words(self, now: float, done: float, total: float | None, text: str) -> str:
        """For example `1,200 of 4,800 positions, 350 positions/s, 0:10 left`."""
        assert self._first is not None
        since, before = self._first
        words = [_amount(done, self._unit)]
        if total is not None:
            begun = words[0] if self._unit == "bytes" else f"{done:,.0f}"
            words = [f"{begun} of {_amount(total, self._unit)}"]
        if (rate := (done - before) / (now - since) if now > since else 0) > 0:
            words.append(f"{_amount(rate, self._unit)}/s")
            if total is not None and done < total:
                words.append(f"{_duration((total - done) / rate)} left")
        return ", ".join([*words, text] if text else words)


@contextmanager
def progress(description: str, unit: str, *, at_once: bool = True) -> Iterator[Meter]:
    """A progress bar on a terminal, a line now and then elsewhere; it waits for the first update unless `at_once`."""
    if not _stderr.is_interactive:
        yield Meter(description, unit, None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[words]}"))
    bar = Progress(*columns, console=_stderr, transient=True)
    if at_once:
        bar.start()
    try:
        yield Meter(description, unit, bar)
    finally:
        bar.stop()


def _name_no_type_of_flags(command: Any) -> None:
    """In the help: `--json`, which takes no value, and not `--json <bool>`."""
    for option in command.params:
        if getattr(option, "is_flag", False):
            option.metavar = ""
    for below in getattr(command, "commands", {}).values():
        _name_no_type_of_flags(below)


def _fail_usage(error: TyperException) -> int:
    """Print what typer says about the command line in the form of our own errors."""
    command = getattr(getattr(error, "ctx", None), "command_path", "")
    if message := error.format_message():  # none where a bare command has printed its help
        fail(InputError(message, hint=f"see `{command} --help`" if command else None))
    return error.exit_code


def _amount(number: float, unit: str) -> str:
    """`12.3 MB` for bytes, else the number with its unit."""
    if unit != "bytes":
        return f"{number:,.0f} {unit}" if number >= 10 else f"{number:.3g} {unit}"
    for name in ("bytes", "kB", "MB", "GB"):
        if number < 1000 or name == "GB":
            break
        number /= 1000
    return f"{number:,.0f} {name}" if name == "bytes" else f"{number:,.1f} {name}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _printable(text: str, allowed: str = "\n") -> str:
    """The text with control characters spelled out, so that a name in a file cannot drive the terminal."""
    return "".join(char if char.isprintable() or char in allowed else repr(char)[1:-1] for char in text)
