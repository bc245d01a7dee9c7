"""Artifacts made somewhere else: parts are sent once, the manifest last, and any machine goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lopd_store
from lopd_store import layout
from lopd_store.errors import ArtifactError, DataError, InputError, UnavailableError
from lopd_store.handout import Progress
from lopd_store.remote import Remote
from tests.commands import run_command
from tests.unit.conftest import PART_POSITIONS
from tests.unit.test_builder import files_of


@pytest.fixture
def options(teacher_dir: Path, rollouts_path: Path) -> dict[str, Any]:
    """What makes the artifact of `sealed`: four parts."""
    return {"teacher": teacher_dir, "rollouts": rollouts_path, "k_max": 40, "part_positions": PART_POSITIONS}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where the artifact goes."""
    return tmp_path / "store" / "a"


@pytest.fixture
def address(place: Path) -> str:
    """The same as an address."""
    return f"file://{place}"


@pytest.fixture(autouse=True)
def one_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory of a machine with an empty disk."""
    (tmp_path / "one").mkdir()
    monkeypatch.chdir(tmp_path / "one")
    return tmp_path / "one"


def go_to_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")


def stop_after(parts: int, place: Path) -> Any:
    """A progress callback that stops the build once so many parts were sent."""

    def stop(progress: Progress) -> None:
        if len(list((place / "done").glob("*"))) == parts:
            raise KeyboardInterrupt

    return stop


def test_what_is_there_is_what_would_be_here(
    options: dict[str, Any], sealed: Path, place: Path, address: str, one_machine: Path
) -> None:
    published = lopd_store.publish(output=address, **options)
    assert files_of(place) == files_of(sealed) and published.fingerprint == lopd_store.open(sealed).fingerprint
    assert {path.name for path in place.rglob("*.*")} == {path.name for path in sealed.rglob("*.*")}
    assert not list(one_machine.iterdir()) and lopd_store.verify(place).ok


def test_parts_leave_this_machine_when_they_are_done(
    options: dict[str, Any], place: Path, address: str, one_machine: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        lopd_store.publish(output=address, on_progress=stop_after(2, place), **options)
    assert len(list((place / "parts").iterdir())) == 6 and not (place / layout.MANIFEST).exists()
    here = {path.name[:5] for path in (one_machine / "a.building" / "parts").iterdir()}
    assert here <= {"00002"}  # the part in hand


def test_another_machine_scores_only_what_is_not_there(
    options: dict[str, Any], sealed: Path, place: Path, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        lopd_store.publish(output=address, on_progress=stop_after(2, place), **options)
    go_to_another_machine(tmp_path, monkeypatch)
    heard: list[Progress] = []
    lopd_store.publish(output=address, on_progress=heard.append, **options)
    assert heard[0].positions == 30 and files_of(place) == files_of(sealed)


def test_a_part_that_was_scored_and_not_sent_is_sent_first(
    options: dict[str, Any], sealed: Path, place: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down(remote: Remote, number: int) -> None:
        raise ConnectionError("the network is gone")

    with monkeypatch.context() as patch, pytest.raises(ConnectionError):
        patch.setattr(Remote, "send", break_down)
        lopd_store.publish(output=address, **options)
    heard: list[Progress] = []
    lopd_store.publish(output=address, on_progress=heard.append, **options)
    assert heard[0].positions == 10 and files_of(place) == files_of(sealed)


def test_shares_are_merged_where_they_are(
    options: dict[str, Any], sealed: Path, place: Path, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lopd_store.build_share("1/2", output=address, **options)
    with pytest.raises(DataError, match="2 missing: 1, 3"):
        lopd_store.merge_remote(address)
    go_to_another_machine(tmp_path, monkeypatch)
    lopd_store.build_share("2/2", output=address, **options)
    ran = run_command("lopd-store", "merge", "--output", address, "--json")
    assert ran.code == 0 and ran.json["fingerprint"] == lopd_store.open(sealed).fingerprint
    assert files_of(place) == files_of(sealed)


def test_another_plan_is_refused_there_too(
    options: dict[str, Any], address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lopd_store.build_share("1/2", output=address, **options)
    go_to_another_machine(tmp_path, monkeypatch)
    with pytest.raises(InputError, match=r"`file://.*` was begun with another plan\n  expected  `encoding.selection"):
        lopd_store.publish(output=address, **options | {"k_max": 39})
    assert not list(Path().iterdir())


def test_an_artifact_that_is_there_is_never_overwritten(options: dict[str, Any], place: Path, address: str) -> None:
    place.mkdir(parents=True)
    (place / layout.MANIFEST).write_text("{}")
    with pytest.raises(InputError, match=r"`file://.*` exists"):
        lopd_store.publish(output=address, **options)
    assert [path.name for path in place.iterdir()] == [layout.MANIFEST]


def test_a_part_that_was_lost_there_is_no_artifact(options: dict[str, Any], place: Path, address: str) -> None:
    lopd_store.build_share("1/1", output=address, **options)
    (place / layout.part_file(2, layout.TOPK)).unlink()
    with pytest.raises(ArtifactError, match=r"00002\.topk\.zarr\.zip` is not what was sent(?s:.)*actual    nothing"):
        lopd_store.merge_remote(address)
    assert not (place / layout.MANIFEST).exists()


@pytest.mark.parametrize("method", ["pipe_file", "cat_file", "ls"])
def test_storage_whose_client_has_errors_of_its_own_did_not_answer(
    options: dict[str, Any], address: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ReadTimeoutError(Exception):
        """Like botocore's, no OSError."""

    def time_out(*_: object, **__: object) -> None:
        raise ReadTimeoutError("read timeout on endpoint")

    monkeypatch.setattr("fsspec.implementations.local.LocalFileSystem." + method, time_out)
    with pytest.raises(
        UnavailableError, match=r"did not answer as it should\n(?s:.)*read timeout(?s:.)*same command again"
    ):
        lopd_store.publish(output=address, **options)


@pytest.mark.parametrize("address", ["nowhere://bucket/a", "s3://"])
def test_an_address_that_means_nothing_is_a_usage_error(options: dict[str, Any], address: str) -> None:
    with pytest.raises(InputError, match=r"cannot be opened|has no name"):
        lopd_store.publish(output=address, **options)


def test_a_build_into_the_hub_is_a_push(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"is on the Hub, where nothing is built\n\nhint: .*`lopd-store push` it"):
        lopd_store.publish(**options, output="hf://acme/art")
