"""The one module that prints: answers to stdout, everything else to stderr.

Progress shows a rate and an estimate; where stderr is not a terminal it is a line every half minute. Colour is
decoration: without it nothing is lost.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from lopd_store.errors import LopdError

_PIPE_WIDTH = 160  # columns where stdout is a file or a pipe
_LINE_EVERY_SECONDS = 30.0
_errors = Console(stderr=True, highlight=False, soft_wrap=True)
_answers = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else _PIPE_WIDTH)


def run(app: typer.Typer) -> NoReturn:
    """Run a command line and leave with its exit code: 0 fine, 1 wrong, 2 usage, 3 could not tell, 130 interrupted."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        code = app(standalone_mode=False) or 0
    except LopdError as error:
        fail(error)
        code = error.exit_code
    except KeyboardInterrupt:
        note("interrupted; run the same command again to go on")
        code = 130
    except (OSError, MemoryError) as error:
        _errors.print(f"[bold red]error[/]: {escape(str(error) or type(error).__name__)}")
        code = 3
    except Exception as error:  # noqa: BLE001 - the one handler; typer's own errors end here too
        code = _typer_exit(error)
    sys.exit(code)


def fail(error: LopdError) -> None:
    """Print an error: where, expected, actual, hint."""
    code = f"\\[{error.code}]" if error.code else ""
    _errors.print(f"[bold red]error{code}[/]: {escape(str(error))}")


def note(text: str) -> None:
    """A line for people, on stderr."""
    _errors.print(escape(text))


def answer(value: Any) -> None:
    """The answer of `--json`: one JSON value on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def say(text: str) -> None:
    """The answer in words, on stdout."""
    _answers.print(escape(text))


def table(rows: Sequence[Sequence[object]], *, header: Sequence[str] = ()) -> None:
    """A table on stdout; without a header it is a list of names and values."""
    grid = Table(show_header=bool(header), box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in header or [""] * len(rows[0]):
        grid.add_column(name, overflow="fold")
    for row in rows:
        grid.add_row(*(escape(str(cell)) for cell in row))
    _answers.print(grid)


class Meter:
    """Progress of one piece of work; `update` it with how much is done."""

    def __init__(self, description: str, unit: str, bar: Progress | None) -> None:
        self._description, self._unit, self._bar = description, unit, bar
        self._task = None if bar is None else bar.add_task(description, total=None, unit=unit, text="")
        self._started = self._last_line = time.monotonic()

    def update(self, done: float, total: float | None = None, text: str = "") -> None:
        """Say how much is done, of how much, with a few words more where there are any."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total, text=escape(text))
            return
        now = time.monotonic()
        if now - self._last_line >= _LINE_EVERY_SECONDS:
            self._last_line = now
            rate = done / (now - self._started)
            left = f", {_duration((total - done) / rate)} left" if total and rate else ""
            whole = f" of {total:,.0f}" if total else ""
            note(f"{self._description}: {done:,.0f}{whole} {self._unit}, {rate:,.1f}/s{left} {text}".rstrip())


@contextmanager
def progress(description: str, unit: str) -> Iterator[Meter]:
    """A progress bar on a terminal, a line now and then elsewhere."""
    if not _errors.is_terminal:
        yield Meter(description, unit, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=_errors, transient=True) as bar:
        yield Meter(description, unit, bar)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f} {task.fields['unit']}/s" if task.speed else "")


def _typer_exit(error: Exception) -> int:
    """Exit code of what typer raises; anything else is a bug and keeps its traceback."""
    if hasattr(error, "show") and hasattr(error, "exit_code"):  # a usage error
        error.show()
        return int(error.exit_code)
    if isinstance(error, typer.Exit):
        return int(error.exit_code)
    if isinstance(error, typer.Abort):
        return 130
    raise error


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
