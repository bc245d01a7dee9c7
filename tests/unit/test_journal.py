"""The journal of a long run: what is on the disk counts, what is torn does not, and other settings are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from lopd_store.errors import InputError
from lopd_store.journal import Journal

SETTINGS = {"seed": 1, "stop": ["\n"]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a journal of three rows lies."""
    path = tmp_path / "journal"
    with Journal(path, SETTINGS) as journal:
        journal.append([{"row": 0}])
        journal.append([{"row": 1}, {"row": 2}])
    return path


def test_rows_are_there_when_it_is_opened_again(path: Path) -> None:
    with Journal(path, SETTINGS) as journal:
        assert list(journal.rows()) == [{"row": 0}, {"row": 1}, {"row": 2}]
        journal.append([{"row": 3}])
        assert len(list(journal.rows())) == len(journal) == 4


def test_a_torn_line_counts_as_not_written_wherever_it_is_torn(path: Path) -> None:
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with Journal(path, SETTINGS) as journal:
            before = max(0, whole[:cut].count(b"\n") - 1)
            assert [row["row"] for row in journal.rows()] == list(range(before))
            journal.append([{"row": "next"}])
            assert list(journal.rows())[-1] == {"row": "next"}


def test_rows_that_are_not_kept_are_forgotten(path: Path) -> None:
    with Journal(path, SETTINGS) as journal:
        journal.keep(1)
        journal.append([{"row": "other"}])
        assert list(journal.rows()) == [{"row": 0}, {"row": "other"}]
    assert path.read_bytes().count(b"\n") == 3


def test_other_settings_are_refused_by_name_and_change_nothing(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"begun with other settings\n  expected  the same `seed`\n(?s:.)*begin anew"):
        Journal(path, {**SETTINGS, "seed": 2})
    assert path.read_bytes() == before


def test_two_runs_do_not_write_one_journal(path: Path) -> None:
    with Journal(path, SETTINGS), pytest.raises(InputError, match="another run writes"):
        Journal(path, SETTINGS)
