"""A file that is written is whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from lopd_store.durable import sync_directory, write_durably


def test_a_file_appears_whole_and_nothing_else_stays(tmp_path: Path) -> None:
    write_durably(tmp_path / "file", b"old")
    write_durably(tmp_path / "file", b"new")
    sync_directory(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"new"}


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    write_durably(tmp_path / "file", b"old")
    with pytest.raises(TypeError):
        write_durably(tmp_path / "file", "not bytes")  # type: ignore[arg-type]
    assert (tmp_path / "file").read_bytes() == b"old"
