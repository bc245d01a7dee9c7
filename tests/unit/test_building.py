"""A build in progress: one builder at a time, several jobs with a share each, no room on the disk, Ctrl-C."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lopd_store
from lopd_store import layout, scoring, workers
from lopd_store.builder import Settings
from lopd_store.building import Share, locked
from lopd_store.digest import digest_contents
from lopd_store.durable import UNFINISHED
from lopd_store.errors import ArtifactError, DataError, InputError, UnavailableError
from lopd_store.handout import Progress
from lopd_store.plan import Plan
from lopd_store.scoring import DoneNote, ScoredPart
from tests.artifacts import random_pairs, save_rollouts
from tests.commands import run_command
from tests.unit.conftest import PART_POSITIONS

ANOTHER = (
    rf"another build works on `.*`\n  actual    process {os.getpid()} on {re.escape(socket.gethostname())}, since "
)


@pytest.fixture
def options(teacher_dir: Path, rollouts_path: Path) -> dict[str, Any]:
    """What makes the artifact of `sealed`: four parts."""
    return {"teacher": teacher_dir, "rollouts": rollouts_path, "k_max": 40, "part_positions": PART_POSITIONS}


def fingerprint(directory: Path) -> str:
    return lopd_store.open(directory).fingerprint


# One builder


def test_a_second_builder_is_refused_and_told_who_the_first_is(options: dict[str, Any], tmp_path: Path) -> None:
    with (
        locked(layout.building_directory(tmp_path / "a")),
        pytest.raises(InputError, match=ANOTHER + r".*\n\nhint: wait for it, or stop it: a build that was killed"),
    ):
        lopd_store.build(**options, output=tmp_path / "a")
    lopd_store.build(**options, output=tmp_path / "a")


@pytest.mark.parametrize(
    ("first", "second", "fits"),
    [("1/2", "2/2", True), ("1/2", "1/2", False), (None, "1/2", False), ("1/2", None, False), (None, None, False)],
)
def test_only_different_shares_are_worked_on_at_once(
    tmp_path: Path, first: str | None, second: str | None, fits: bool
) -> None:
    one, other = (None if text is None else Share.parse(text) for text in (first, second))
    with locked(tmp_path, one):
        if fits:
            with locked(tmp_path, other):
                return
        with pytest.raises(InputError, match=ANOTHER), locked(tmp_path, other):
            pass


def test_a_killed_builder_leaves_no_lock(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, signal; from lopd_store.building import locked\n"
        f"with locked(pathlib.Path({str(tmp_path)!r})): os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert "process" in (tmp_path / "lock.all").read_text()
    with locked(tmp_path):
        pass


# Shares


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "a/b", "1/2/3", "-1/2", "1/1000000"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="is not a share of the parts\n  expected  I/N, from 1/N to N/N"):
        Share.parse(text)


def test_the_shares_have_every_part_once() -> None:
    for of in (1, 2, 3, 7):
        parts = sorted(number for index in range(1, of + 1) for number in Share(index=index, of=of).parts(5))
        assert parts == list(range(5))


def test_jobs_that_share_a_directory_make_the_artifact_of_one(
    options: dict[str, Any], sealed: Path, tmp_path: Path
) -> None:
    output = tmp_path / "a"
    first = lopd_store.build_share("1/2", output=output, **options)
    assert (first.parts, first.missing) == ((0, 2), (1, 3))
    assert lopd_store.build_share("2/2", output=output, **options).missing == ()
    assert lopd_store.merge(output=output).fingerprint == fingerprint(sealed)
    assert sorted(path.name for path in output.iterdir()) == sorted(path.name for path in sealed.iterdir())


def test_jobs_on_machines_that_share_nothing_make_the_artifact_of_one(
    options: dict[str, Any], sealed: Path, tmp_path: Path
) -> None:
    places = [
        lopd_store.build_share(f"{i}/3", output=tmp_path / f"machine-{i}" / "a", **options).building for i in (1, 2, 3)
    ]
    assert lopd_store.merge(*places, output=tmp_path / "a").fingerprint == fingerprint(sealed)
    assert lopd_store.verify(tmp_path / "a").ok


def test_what_was_damaged_since_it_was_written_never_appears(options: dict[str, Any], tmp_path: Path) -> None:
    output = tmp_path / "a"
    building = lopd_store.build_share("1/1", output=output, **options).building
    path = building / layout.part_file(1, layout.TOPK)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(ArtifactError, match=r"00001\.topk\.zarr\.zip`: digest differs") as refused:
        lopd_store.build(output=output, **options)
    assert not output.exists()
    assert refused.value.hint == f"remove `{building}/done/NNNNN.json` of the part, to score it again"
    (building / "done" / "00001.json").unlink()
    assert lopd_store.verify(lopd_store.build(output=output, **options).path).ok


@pytest.mark.parametrize(
    "seal", [lopd_store.build, lambda output, **_: lopd_store.merge(output=output)], ids=["build", "merge"]
)
def test_what_breaks_a_rule_under_honest_digests_never_appears(
    seal: Callable[..., lopd_store.Artifact], options: dict[str, Any], tmp_path: Path
) -> None:
    output = tmp_path / "a"
    building = lopd_store.build_share("1/1", output=output, **options).building
    data = (building / layout.part_file(1, layout.ROLLOUTS)).read_bytes()  # of other rollouts
    (building / layout.part_file(0, layout.ROLLOUTS)).write_bytes(data)
    path = building / "done" / "00000.json"
    note = DoneNote.from_json(json.loads(path.read_text()), where="note")
    files = note.files | {layout.ROLLOUTS: digest_contents(data)}
    path.write_text(json.dumps(replace(note, files=files).to_json()))
    with pytest.raises(ArtifactError, match=r"00000\.rollouts\.parquet`: there is not one row per rollout"):
        seal(output=output, **options)
    assert not output.exists()


def test_a_stray_file_is_named_and_a_half_written_one_removed(options: dict[str, Any], tmp_path: Path) -> None:
    output = tmp_path / "a"
    parts = lopd_store.build_share("1/1", output=output, **options).building / layout.PARTS
    for name in ("stray", f"00000.topk.zarr.zip.0{UNFINISHED}"):
        (parts / name).write_bytes(b"")
    with pytest.raises(ArtifactError, match="a file that the manifest does not list") as refused:
        lopd_store.merge(output=output)
    assert refused.value.hint == f"remove `{parts / 'stray'}`"
    (parts / "stray").unlink()
    assert lopd_store.verify(lopd_store.merge(output=output).path).ok


def test_a_merge_names_the_command_that_makes_what_is_missing(
    options: dict[str, Any], sealed: Path, tmp_path: Path
) -> None:
    output = tmp_path / "a"
    lopd_store.build_share("1/2", output=output, **options)
    with (layout.building_directory(output) / "lock.2-of-2").open("w"):
        pass  # as the other job leaves it that was killed before it had done anything
    with pytest.raises(DataError, match=r"is not whole\n  expected  4 parts\n  actual    2 missing: 1, 3\n") as refused:
        lopd_store.merge(output=output)
    assert refused.value.hint is not None
    introduction, command = refused.value.hint.split("\n")
    assert introduction == "score what is missing:" and command.endswith("--part 2/2")
    program, *arguments = shlex.split(command)
    assert run_command(program, *arguments).code == 0
    assert lopd_store.merge(output=output).fingerprint == fingerprint(sealed)


def test_a_merge_refuses_parts_of_another_plan(options: dict[str, Any], tmp_path: Path) -> None:
    one = lopd_store.build_share("1/2", output=tmp_path / "one", **options).building
    two = lopd_store.build_share("2/2", output=tmp_path / "two", **options | {"k_max": 39}).building
    with pytest.raises(
        InputError, match=r"two.building` was begun with another plan\n  expected  `encoding.selection.k"
    ):
        lopd_store.merge(one, two, output=tmp_path / "a")
    shutil.copy(two / "done" / "00001.json", one / "done")
    with pytest.raises(DataError, match=r"part 1 of .* was scored under another plan"):
        lopd_store.merge(one, output=tmp_path / "a")


def test_a_merge_refuses_a_file_that_changed_on_its_way(options: dict[str, Any], tmp_path: Path) -> None:
    one = lopd_store.build_share("1/1", output=tmp_path / "one", **options).building
    path = one / layout.part_file(2, layout.TOPK)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DataError, match=r"00002\.topk\.zarr\.zip` is not what was written(?s:.)*hint: copy it again"):
        lopd_store.merge(one, output=tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_there_is_nothing_to_merge_where_nothing_was_scored(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no build in progress at `.*a\.building`"):
        lopd_store.merge(output=tmp_path / "a")


# No room


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system refuses to write a larger file, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_disk_without_room_loses_nothing_that_is_done(
    options: dict[str, Any], tmp_path: Path, processes: int
) -> None:
    output, part_positions = tmp_path / "a", 60
    lengths = [(3, 10)] * 6 + [(30, 200)]  # the last part has larger files than the first
    rollouts = save_rollouts(tmp_path / "r.parquet", random_pairs(lengths), logprob=-1.5)
    options |= {"rollouts": rollouts, "part_positions": part_positions, "coverage": 1.0}
    whole = lopd_store.build(**options, output=tmp_path / "whole")
    small, large = (
        sorted(whole.path.glob(f"parts/0000{part}.*"), key=lambda p: p.stat().st_size)[-1] for part in (0, 1)
    )
    with (
        files_of_at_most((small.stat().st_size + large.stat().st_size) // 2),
        pytest.raises(
            UnavailableError, match=r"no room for `.*a\.building`\n(?s:.)*hint: make room and run the same"
        ) as full,
    ):
        lopd_store.build(**options, workers=processes, output=output)
    assert full.value.exit_code == 3
    building = layout.building_directory(output)
    assert [path.name for path in (building / "done").iterdir()] == ["00000.json"]
    assert not list(building.rglob("*.unfinished"))
    assert lopd_store.build(**options, output=output).fingerprint == whole.fingerprint


# Writing behind the teacher


def test_a_part_is_written_while_the_next_one_is_scored(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    next_is_scored, waited = threading.Event(), list[bool]()

    def wait_and_keep(plan: Plan, building: Path, scored: ScoredPart) -> DoneNote:
        if scored.number == 0:
            waited.append(next_is_scored.wait(60))
        return scoring.keep_part(plan, building, scored)

    def hear(progress: Progress) -> None:
        done = tmp_path / "a.building" / "done"
        if progress.positions > options["part_positions"] and done.is_dir() and not list(done.iterdir()):
            next_is_scored.set()

    monkeypatch.setattr(workers, "keep_part", wait_and_keep)
    lopd_store.build(**options, output=tmp_path / "a", on_progress=hear)
    assert waited == [True]


def test_an_error_in_writing_stops_the_build_at_the_next_rollout(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(plan: Plan, building: Path, scored: ScoredPart) -> DoneNote:
        raise OSError(errno.ENOSPC, "no room")

    heard: list[Progress] = []
    monkeypatch.setattr(workers, "keep_part", fail)
    with pytest.raises(UnavailableError, match="no room for"):
        lopd_store.build(**options, output=tmp_path / "a", on_progress=heard.append)
    assert heard[-1].rollouts < heard[-1].all_rollouts


def test_a_worker_gives_a_part_back_once_it_has_scored_the_next(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    building = lopd_store.build_share("2/2", output=tmp_path / "a", **options).building  # parts 1 and 3
    plan = Settings(**options).plan()
    counts = multiprocessing.Array("q", 3)
    with workers.Writer(plan, building) as writer:
        monkeypatch.setattr(workers, "_worker", {"plan": plan, "writer": writer, "on_bad": "fail", "counts": counts})
        given = [workers._work(0), workers._work(2), workers._end_writing(), workers._end_writing()]
    assert [[number for number, _ in parts] for parts in given] == [[], [0], [2], []]
    assert counts[0] == sum(plan.parts[number].rollouts for number in (0, 2))
    assert (
        lopd_store.merge(output=tmp_path / "a").fingerprint
        == lopd_store.build(**options, output=tmp_path / "b").fingerprint
    )


# Ctrl-C


def press_ctrl_c(times: int) -> Any:
    """A progress callback that presses Ctrl-C as many times once the second rollout of the first part is scored."""
    pressed: list[Progress] = []

    def press(progress: Progress) -> None:
        if progress.rollouts == 1:
            while len(pressed) < times:
                pressed.append(progress)
                os.kill(os.getpid(), signal.SIGINT)

    return press


@pytest.fixture
def python_hears_ctrl_c() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("python_hears_ctrl_c")
@pytest.mark.parametrize(("times", "done"), [(1, 1), (2, 0)])
def test_ctrl_c_finishes_the_part_in_hand_and_the_second_one_does_not(
    options: dict[str, Any], sealed: Path, tmp_path: Path, times: int, done: int
) -> None:
    output, heard = tmp_path / "a", list[str]()
    with pytest.raises(KeyboardInterrupt):
        lopd_store.build(**options, output=output, on_progress=press_ctrl_c(times), on_note=heard.append)
    assert len(list((layout.building_directory(output) / "done").iterdir())) == done
    assert heard == ["finishing what is in hand; Ctrl-C again stops at once, and loses it"] * (times == 1)
    assert lopd_store.build(**options, output=output).fingerprint == fingerprint(sealed)
