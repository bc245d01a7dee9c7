"""What a long run has finished, a line of JSON each, so that it goes on when it was killed.

    with Journal(Path("rollouts.parquet.generating"), settings) as journal:
        journal.append([...]); list(journal.rows()); journal.remove()

The first line says what is being done, and a run that would do anything else is refused. A line that was torn off in
the middle counts as not written.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lopd_store import strictjson
from lopd_store.errors import InputError


class Journal:
    """A file of rows that is appended to, for one run at a time."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self._path = path
        self._file = path.open("a+b")
        try:
            self._begin(strictjson.canonical(settings) + b"\n")
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._ends)

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep rows; they are on the disk when this returns."""
        end = self._ends[-1] if self._ends else self._start
        for row in rows:
            line = json.dumps(row, separators=(",", ":"), allow_nan=False).encode() + b"\n"
            self._file.write(line)
            end += len(line)
            self._ends.append(end)
        self._file.flush()
        os.fsync(self._file.fileno())

    def keep(self, count: int) -> None:
        """Forget all but the first rows."""
        del self._ends[count:]
        self._file.truncate(self._ends[-1] if self._ends else self._start)

    def rows(self) -> Iterator[Any]:
        """Every row in order."""
        with self._path.open("rb") as file:
            file.seek(self._start)
            for number in range(len(self)):
                yield strictjson.loads(file.readline(), where=f"{self._path}, row {number}")

    def remove(self) -> None:
        """Remove the file: the run is over."""
        self._path.unlink()

    def _begin(self, settings: bytes) -> None:
        """Lock the file and find its rows, or write the first line."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another run writes `{self._path}`", hint="wait for it, or stop it") from error
        self._start, self._ends = len(settings), list[int]()
        self._file.seek(0)
        first = self._file.readline()
        if not first.endswith(b"\n"):
            self._file.truncate(0)
            self._file.write(settings)
            self._file.flush()
        elif first != settings:
            found, wanted = strictjson.loads(first, where=str(self._path)), json.loads(settings)
            changed = [name for name in wanted if not isinstance(found, dict) or found.get(name) != wanted[name]]
            raise InputError(
                f"`{self._path}` was begun with other settings",
                expected="the same " + ", ".join(f"`{name}`" for name in changed),
                actual="they changed since",
                hint=f"go on with the old settings, or remove `{self._path}` to begin anew",
            )
        else:
            end = self._start
            for line in self._file:
                if not line.endswith(b"\n"):
                    break
                end += len(line)
                self._ends.append(end)
            self.keep(len(self._ends))
