"""Something goes wrong at every single request: either the right artifact comes of it or an error that says so.

A push or a pull is done once to learn its requests, and then again for each of them and each fault. Whatever happens,
no revision shows half an artifact, no output is another one, and the same command afterwards does the rest.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

import lopd_store
from lopd_store.errors import LopdError
from tests.hub.repository import File
from tests.hub.routes import Answer
from tests.hub.server import Cut, Fault, Garbled, HubServer, Slow

REPO = "acme/art"
FAULTS: dict[str, Callable[[HubServer], Fault]] = {
    "500": lambda hub: Answer(status=500),
    "cut": lambda hub: Cut(after=40),
    "moved": lambda hub: move(hub),
    "garbled": lambda hub: Garbled(),
    "429": lambda hub: Answer(status=429, headers={"Retry-After": "3"}),
    "lost": lambda hub: Cut(after=0),
    "deleted": lambda hub: delete(hub),
    "expired": lambda hub: Answer(status=401, headers={"X-Error-Message": "Invalid credentials"}),
    "refused": lambda hub: Cut(),
}
# One fault at each request is quick enough for every day; each fault at each request, once and for good, is not.
SOME = "each in turn"
ALL = [SOME, *(pytest.param(fault, marks=pytest.mark.system) for fault in FAULTS)]


def delete(hub: HubServer) -> Fault:
    hub.repos.pop(("dataset", REPO), None)
    return None


def move(hub: HubServer) -> Fault:
    """Somebody else commits to main, and moves every tag there."""
    if ("dataset", REPO) in hub.repos:
        repo = hub.repo(REPO)
        commit = repo.commit("main", {**repo.at("main").files, "note.txt": File.regular(b"")}, title="note")
        repo.tags = dict.fromkeys(repo.tags, commit.oid)
    return None


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client and we try again at once."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def faulty(hub: HubServer, number: int, fault: str, *, lasting: bool) -> None:
    """Let one request go wrong, counted from now, or all from that one on."""
    begun = len(hub.requests)

    def decide(method: str, path: str) -> Fault:
        now = len(hub.requests) - begun - 1
        return FAULTS[fault](hub) if now == number or (lasting and now > number) else None

    hub.fault = decide


def every(requests: int, fault: str) -> Iterator[tuple[int, str, bool]]:
    """The cases of a test: which request goes wrong, how, and whether all after it do, too."""
    if fault == SOME:
        return ((number, list(FAULTS)[number % len(FAULTS)], False) for number in range(requests))
    return ((number, fault, lasting) for number in range(requests) for lasting in (False, True))


def assert_no_half_artifact(hub: HubServer) -> None:
    """Whoever looks at any branch or tag sees a whole artifact or none."""
    if ("dataset", REPO) not in hub.repos:
        return
    repo = hub.repo(REPO)
    for revision in (*repo.branches, *repo.tags):
        files = repo.at(revision).files
        if "manifest.json" in files:
            manifest = json.loads(files["manifest.json"].data)
            listed = [file for part in manifest["parts"] for file in part["files"].values()]
            assert {path for path in files if path.startswith("parts/")} == {file["path"] for file in listed}
            for file in listed:
                assert file["sha256"] == "sha256:" + hashlib.sha256(files[file["path"]].data).hexdigest()


def contents(artifact: Path) -> dict[str, bytes]:
    """What the fingerprint covers."""
    paths = [artifact / "manifest.json", *(artifact / "parts").iterdir()]
    return {path.name: path.read_bytes() for path in paths}


def attempt(work: Callable[[], object]) -> str | None:
    """The error in words, if there is one; another kind of error than ours fails the test."""
    try:
        work()
    except LopdError as error:
        return str(error)
    return None


def pushed_over(hub: HubServer, first: Path) -> None:
    hub.repos.clear()
    hub.lfs_objects.clear()
    hub.fault = None
    lopd_store.push(first, REPO)


@pytest.mark.parametrize("in_pieces", [False, True], ids=["files as a whole", "files in pieces"])
@pytest.mark.parametrize("faults", ALL)
def test_a_push_survives_every_fault_at_every_request(
    hub: HubServer, sealed: Path, unknown: Path, tmp_path: Path, faults: str, in_pieces: bool
) -> None:
    if in_pieces:
        hub.multipart_size = 1 + max(path.stat().st_size for path in (unknown / "parts").iterdir()) // 3
    pushed_over(hub, sealed)
    hub.requests.clear()
    lopd_store.push(unknown, REPO)
    outcomes = set()
    for number, fault, lasting in every(len(hub.requests), faults):
        pushed_over(hub, sealed)
        faulty(hub, number, fault, lasting=lasting)
        error = attempt(lambda: lopd_store.push(unknown, REPO))
        assert_no_half_artifact(hub)
        outcomes.add(error and error.splitlines()[0])
        hub.fault = None
        kept = set(hub.lfs_objects)
        hub.requests.clear()
        lopd_store.push(unknown, REPO)
        sent = {path.split("/")[2] for method, path in hub.requests if method == "PUT"}
        assert not sent & kept, (number, "was sent twice")
        assert_no_half_artifact(hub)
        shutil.rmtree(tmp_path / "pulled", ignore_errors=True)
        lopd_store.pull(REPO, output=tmp_path / "pulled")
        assert contents(tmp_path / "pulled") == contents(unknown)
    assert len(outcomes) > 1  # the fault was felt


@pytest.mark.parametrize("redirect", [False, True], ids=["from the Hub", "from another origin"])
@pytest.mark.parametrize("faults", ALL)
def test_a_pull_survives_every_fault_at_every_request(
    hub: HubServer, unknown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faults: str, redirect: bool
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 40)
    hub.redirect = redirect
    fingerprint = lopd_store.push(unknown, REPO).fingerprint
    hub.requests.clear()
    lopd_store.pull(REPO, output=tmp_path / "pulled", fingerprint=fingerprint)
    requests = len(hub.requests)
    for number, fault, lasting in every(requests, faults):
        shutil.rmtree(tmp_path / "pulled", ignore_errors=True)
        shutil.rmtree(tmp_path / "pulled.pulling", ignore_errors=True)
        if ("dataset", REPO) not in hub.repos:
            lopd_store.push(unknown, REPO)
        faulty(hub, number, fault, lasting=lasting)
        error = attempt(lambda: lopd_store.pull(REPO, output=tmp_path / "pulled", fingerprint=fingerprint))
        hub.fault = None
        assert (tmp_path / "pulled").exists() is (error is None)
        if error is not None and fault != "deleted":
            lopd_store.pull(REPO, output=tmp_path / "pulled", fingerprint=fingerprint)
        if error is None or fault != "deleted":
            assert contents(tmp_path / "pulled") == contents(unknown)


@pytest.mark.parametrize("faults", ALL)
def test_an_artifact_read_from_the_hub_survives_every_fault_at_every_request(
    hub: HubServer, sealed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faults: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 40)
    url = f"hf://{REPO}@{lopd_store.push(sealed, REPO).tag}"
    expected = [part.token_ids.tolist() for part in lopd_store.open(sealed).parts()]
    found: list[list[int]] = []

    def read() -> None:
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        found[:] = [part.token_ids.tolist() for part in lopd_store.open(url).parts()]

    hub.requests.clear()
    read()
    outcomes = set()
    for number, fault, lasting in every(len(hub.requests), faults):
        if ("dataset", REPO) not in hub.repos:
            lopd_store.push(sealed, REPO)
        faulty(hub, number, fault, lasting=lasting)
        error = attempt(read)
        hub.fault = None
        assert error is not None or found == expected, (number, fault)
        outcomes.add(error and error.splitlines()[0])
    if faults == SOME:  # what moved is not seen; a token that expired always is
        assert len(outcomes) > 1


def test_a_hub_that_is_too_slow_is_given_up_and_asked_again_later(
    hub: HubServer, unknown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lopd_store.push(unknown, REPO)
    hub.fault = lambda method, path: Slow(seconds=0.15) if method == "GET" and path.endswith(".zip") else None
    with monkeypatch.context() as patience:
        patience.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.05)
        error = attempt(lambda: lopd_store.pull(REPO, output=tmp_path / "pulled"))
    assert error is not None and error.startswith("the Hub did not answer as it should: ")
    assert not (tmp_path / "pulled").exists()
    hub.fault = None
    lopd_store.pull(REPO, output=tmp_path / "pulled")
    assert contents(tmp_path / "pulled") == contents(unknown)
