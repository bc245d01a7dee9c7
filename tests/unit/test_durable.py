"""A file that is written is whole or not there."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from lopd_store.durable import becoming, making, sync_directory, write_durably
from lopd_store.errors import InputError


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


@pytest.mark.parametrize("is_directory", [False, True])
def test_what_is_written_under_another_name_appears_at_the_end_or_not_at_all(
    tmp_path: Path, is_directory: bool
) -> None:
    def write(place: Path) -> None:
        if is_directory:
            place.mkdir()
        (place / "file" if is_directory else place).write_bytes(b"new")

    with pytest.raises(KeyboardInterrupt), becoming(tmp_path / "made") as unfinished:
        write(unfinished)
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    write(tmp_path / "made.unfinished")  # what a kill leaves
    with becoming(tmp_path / "made") as unfinished:
        write(unfinished)
        assert not (tmp_path / "made").exists()
    (made,) = tmp_path.iterdir()
    assert (made / "file" if is_directory else made).read_bytes() == b"new"


def test_two_who_make_the_same_do_it_one_after_the_other(tmp_path: Path) -> None:
    begun, said = threading.Event(), list[str]()

    def make_too() -> None:
        begun.set()
        try:
            with making(tmp_path / "made") as unfinished:
                unfinished.write_bytes(b"another's")
        except InputError as error:
            said.append(str(error))

    with making(tmp_path / "made") as unfinished, unfinished.open("wb") as file:
        file.write(b"the ")
        file.flush()
        other = threading.Thread(target=make_too)
        other.start()
        assert begun.wait(10)
        other.join(0.2)
        assert unfinished.read_bytes() == b"the "
        file.write(b"first's")
    other.join(10)
    assert said == [f"`{tmp_path / 'made'}` exists\n\nhint: choose another `--output`, or move it away"]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"made": b"the first's"}
