"""Artifacts that are opened where they are: kilobytes for the manifest, parts as they are needed, nothing on trust."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import lopd_store
from lopd_store import cache as caches
from lopd_store import layout
from lopd_store.errors import ArtifactError, InputError, UnavailableError
from tests.commands import run_command
from tests.hub.routes import Answer
from tests.hub.server import HubServer

REPO = "acme/art"
TOPK = "parts/00001.topk.zarr.zip"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lopd" / "files"


@pytest.fixture
def url(hub: HubServer, sealed: Path) -> str:
    """Where the artifact was pushed."""
    pushed = lopd_store.push(sealed, REPO)
    hub.requests.clear()
    hub.sent = 0
    return f"hf://{REPO}@{pushed.tag}"


def fetched(hub: HubServer) -> list[str]:
    return sorted(path.rpartition("/")[2] for method, path in hub.requests if method == "GET" and "/parts/" in path)


@pytest.mark.parametrize("redirect", [False, True], ids=["from the Hub", "from another origin"])
def test_a_remote_artifact_reads_like_one_on_disk(hub: HubServer, sealed: Path, url: str, redirect: bool) -> None:
    hub.redirect = redirect
    here, there = lopd_store.open(sealed), lopd_store.open(url)
    assert (there.place, there.fingerprint, there.manifest) == (url, here.fingerprint, here.manifest)
    for ours, theirs in zip(here.parts(), there.parts(), strict=True):
        np.testing.assert_array_equal(ours.token_ids, theirs.token_ids)
        assert ours.topk is not None and theirs.topk is not None
        np.testing.assert_array_equal(ours.topk.logprobs, theirs.topk.logprobs)
    np.testing.assert_array_equal(here.rollout(7).response_ids, there.rollout(7).response_ids)
    assert not [name for name in fetched(hub) if "rollouts" in name]  # training has no use for the table


def test_opening_reads_the_manifest_alone(hub: HubServer, url: str) -> None:
    lopd_store.open(url)
    assert fetched(hub) == [] and hub.sent < 20_000


def test_a_part_comes_when_it_is_needed_with_one_ahead(hub: HubServer, url: str, cache: Path) -> None:
    parts = lopd_store.open(url).parts()
    next(parts)
    assert not [name for name in fetched(hub) if name[:5] in ("00003",)]
    parts.close()  # type: ignore[attr-defined]
    assert {name[:5] for name in fetched(hub)} <= {"00000", "00001", "00002"}


def test_what_is_in_the_cache_is_not_fetched_again(hub: HubServer, url: str, cache: Path) -> None:
    list(lopd_store.open(url).parts())
    hub.requests.clear()
    list(lopd_store.open(url).parts())
    assert fetched(hub) == []


def test_the_cache_has_a_limit(
    hub: HubServer, sealed: Path, url: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = max(path.stat().st_size for path in (sealed / "parts").iterdir())
    monkeypatch.setenv("LOPD_CACHE_BYTES", str(2 * largest))
    for _ in lopd_store.open(url).parts():
        assert sum(file.stat().st_size for file in cache.iterdir() if file.is_file()) <= 3 * largest
    assert sum(file.stat().st_size for file in cache.iterdir()) <= 2 * largest
    monkeypatch.setenv("LOPD_CACHE_BYTES", "0")
    assert len(list(lopd_store.open(url).parts())) == 4  # it works all the same
    monkeypatch.setenv("LOPD_CACHE_BYTES", "much")
    with pytest.raises(InputError, match="LOPD_CACHE_BYTES"):
        list(lopd_store.open(url).parts())


def test_the_file_used_last_stays_longest(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lopd_store.digest import digest_contents

    monkeypatch.setenv("LOPD_CACHE_BYTES", "25")
    asked = []

    def read(content: bytes) -> None:
        def fetch(path: str, directory: Path) -> None:
            asked.append(content)
            (directory / path).write_bytes(content)

        assert caches.read_cached("file", digest_contents(content), fetch) == content

    for number, content in enumerate((b"a" * 10, b"b" * 10)):
        read(content)
        os.utime(cache / digest_contents(content).sha256[7:], (number, number))
    read(b"a" * 10)
    read(b"c" * 10)  # in the place of b
    read(b"a" * 10)
    assert [content[:1] for content in asked] == [b"a", b"b", b"c"]


def test_a_file_damaged_in_the_cache_is_fetched_again(hub: HubServer, url: str, cache: Path) -> None:
    list(lopd_store.open(url).parts())
    file = max(cache.iterdir(), key=lambda file: file.stat().st_size)
    file.write_bytes(b"!" * file.stat().st_size)
    hub.requests.clear()
    list(lopd_store.open(url).parts())
    assert len(fetched(hub)) == 1


@pytest.mark.parametrize("honest", [False, True], ids=["and the Hub hides it", "and the Hub says so"])
def test_a_changed_byte_is_refused_where_it_is_read(hub: HubServer, url: str, cache: Path, honest: bool) -> None:
    data = hub.files(REPO)[TOPK]
    hub.overwrite(REPO, TOPK, data[:100] + bytes([data[100] ^ 1]) + data[101:], honest=honest)
    artifact = lopd_store.open(url)
    artifact.part(0)
    with pytest.raises(ArtifactError, match=f"`{TOPK}`: digest differs") as caught:
        artifact.part(1)
    assert caught.value.code == "A022"
    with pytest.raises(ArtifactError):
        artifact.part(1)  # nothing of it was kept


def test_another_manifest_is_refused_by_the_tag(hub: HubServer, unknown: Path, url: str) -> None:
    hub.overwrite(REPO, "manifest.json", (unknown / "manifest.json").read_bytes(), honest=True)
    with pytest.raises(ArtifactError, match="has a tag that is not its own"):
        lopd_store.open(url)


def test_a_moment_of_silence_does_not_end_a_run(
    hub: HubServer, url: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    silent = [Answer(status=503)] * 2
    hub.fault = lambda method, path: silent.pop() if silent and method == "GET" and path.endswith(".zip") else None
    assert len(list(lopd_store.open(url).parts())) == 4
    hub.fault = lambda method, path: Answer(status=503) if method == "GET" and "/parts/" in path else None
    shutil.rmtree(cache)
    with pytest.raises(UnavailableError):
        lopd_store.open(url).part(0)


# Commands


def test_inspect_reads_kilobytes(hub: HubServer, sealed: Path, url: str) -> None:
    ran = run_command("lopd-store", "inspect", url, "--json")
    assert ran.code == 0 and ran.json == run_command("lopd-store", "inspect", sealed, "--json").json | {"path": url}
    assert fetched(hub) == [] and hub.sent <= 200_000


def test_inspect_shows_the_lineage_of_a_url(hub: HubServer, url: str) -> None:
    assert "teacher consistency" in run_command("lopd-store", "inspect", url, "--lineage").stdout


def test_a_quick_look_compares_what_the_hub_lists(hub: HubServer, sealed: Path, url: str) -> None:
    ran = run_command("lopd-store", "verify", url, "--quick", "--json")
    assert ran.code == 0 and ran.json["ok"] and ran.json["fingerprint"] == lopd_store.open(sealed).fingerprint
    assert fetched(hub) == [] and hub.sent <= 200_000


@pytest.mark.parametrize(
    ("change", "code"), [("a byte", "A022"), ("a byte more", "A021"), ("a part", "A022"), ("nothing left", "A020")]
)
def test_a_quick_look_finds_what_was_tampered_with(hub: HubServer, url: str, change: str, code: str) -> None:
    data = hub.files(REPO)[TOPK]
    revision = url.rpartition("@")[2]
    if change == "nothing left":
        files = dict(hub.repo(REPO).at(revision).files)
        del files[TOPK]
        hub.repo(REPO).tags[revision] = hub.repo(REPO).commit("main", files, title="without a part").oid
    else:
        other = {"a byte": data[:-1] + b"!", "a byte more": data + b"!", "a part": data[::-1]}[change]
        hub.overwrite(REPO, TOPK, other, honest=True)
    report = lopd_store.verify(url, quick=True)
    assert [(found.code, found.where) for found in report.findings] == [(code, TOPK)]
    assert run_command("lopd-store", "verify", url, "--quick").code == 1


def test_every_byte_is_verified_only_where_it_is(hub: HubServer, url: str) -> None:
    ran = run_command("lopd-store", "verify", url)
    assert ran.code == 2 and "--quick" in ran.stderr and "lopd-store pull" in ran.stderr


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("hf://acme", "not the name of a repository"),
        ("hf://acme/nothing", "no dataset repository `acme/nothing`"),
        ("nothing://acme/art", "is no URL that can be read"),
        ("memory://not/there", "is not an artifact"),
    ],
)
def test_a_url_that_leads_nowhere_says_so(hub: HubServer, place: str, text: str) -> None:
    ran = run_command("lopd-store", "inspect", place)
    assert ran.code in (1, 2) and text in ran.stderr and ran.stdout == ""


def test_a_part_of_a_url_is_pulled_and_not_copied(hub: HubServer, url: str, tmp_path: Path) -> None:
    ran = run_command("lopd-store", "subset", url, "--only", "sampled", "--output", tmp_path / "copy")
    assert ran.code == 2 and "lopd-store pull" in ran.stderr and not (tmp_path / "copy").exists()


def test_training_reads_from_the_hub(
    hub: HubServer, teacher_dir: Path, student_dir: Path, url: str, tmp_path: Path
) -> None:
    ran = run_command(
        *("lopd-train", "opd", "--artifact", url, "--student", student_dir, "--output", tmp_path / "trained"),
        *("--steps", 1, "--batch-rollouts", 4, "--eval-fraction", 0, "--device", "cpu"),
        "--allow-unknown-sft-teacher",
    )
    assert ran.code == 0, ran.stderr
    assert {name.partition(".")[2] for name in fetched(hub)} == {"tokens.zarr.zip", "topk.zarr.zip"}


def test_training_takes_its_first_step_after_one_part(
    hub: HubServer, sealed: Path, student_dir: Path, url: str, tmp_path: Path
) -> None:
    first: list[str] = []
    before_the_second: list[tuple[bool, int]] = []

    def has_a_line() -> bool:
        return any(path.stat().st_size for path in tmp_path.rglob("metrics.jsonl"))

    def hold_all_but_the_first_part(method: str, path: str) -> None:
        if method == "GET" and "/parts/" in path:
            number = path.rpartition("/")[2].partition(".")[0]
            first.append(number)
            if number != first[0]:
                sent = hub.sent
                before_the_second.append((wait_for(has_a_line), sent))

    hub.fault = hold_all_but_the_first_part
    ran = run_command(
        *("lopd-train", "opd", "--artifact", url, "--student", student_dir, "--output", tmp_path / "trained"),
        *("--steps", 12, "--batch-rollouts", 1, "--eval-fraction", 0, "--device", "cpu"),
        "--allow-unknown-sft-teacher",
    )
    assert ran.code == 0, ran.stderr
    assert before_the_second and all(has_begun for has_begun, _ in before_the_second)
    files = [layout.part_file(int(first[0]), kind) for kind in (layout.TOKENS, layout.TOPK)]
    assert before_the_second[0][1] < sum((sealed / name).stat().st_size for name in files) + 40_000


def wait_for(claim: Callable[[], bool]) -> bool:
    """Whether it came true within a minute."""
    deadline = time.monotonic() + 60
    while not claim() and time.monotonic() < deadline:
        threading.Event().wait(0.02)
    return claim()


# Other URLs: the same code over fsspec


@pytest.fixture
def in_memory(sealed: Path) -> str:
    """The URL of a copy in fsspec's own memory."""
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]
    memory.put(str(sealed), "/bucket/art", recursive=True)
    return "memory://bucket/art"


def test_another_url_opens_pulls_and_verifies(sealed: Path, in_memory: str, tmp_path: Path) -> None:
    artifact = lopd_store.open(in_memory)
    assert [len(part.prompt_lengths) for part in artifact.parts()] == [
        len(part.prompt_lengths) for part in lopd_store.open(sealed).parts()
    ]
    assert lopd_store.verify(in_memory, quick=True).ok
    pulled = lopd_store.pull(in_memory, output=tmp_path / "pulled", fingerprint=artifact.fingerprint, parts=range(2))
    assert lopd_store.verify(pulled.path).ok and pulled.view.parts == range(2)


def test_another_url_is_not_trusted_either(in_memory: str, tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    data = memory.cat_file(f"/bucket/art/{TOPK}")
    memory.pipe_file(f"/bucket/art/{TOPK}", data[:-1] + b"!")
    with pytest.raises(ArtifactError, match="digest differs"):
        lopd_store.open(in_memory).part(1)
    with pytest.raises(ArtifactError, match="digest differs"):
        lopd_store.pull(in_memory, output=tmp_path / "pulled")
    memory.rm_file(f"/bucket/art/{TOPK}")
    assert [found.code for found in lopd_store.verify(in_memory, quick=True).findings] == ["A020"]
    assert not (tmp_path / "pulled").exists()


def test_a_url_whose_client_has_errors_of_its_own_did_not_answer(
    in_memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class HttpError(Exception):
        """Like gcsfs's, no OSError."""

    def fail(*_: object, **__: object) -> None:
        raise HttpError("backend error, 503")

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.cat_file", fail)
    with pytest.raises(UnavailableError, match=f"`{in_memory}` did not answer as it should: backend error, 503"):
        lopd_store.open(in_memory)


def test_a_partial_copy_elsewhere_says_so_too(sealed: Path, in_memory: str, tmp_path: Path) -> None:
    import fsspec

    copy = lopd_store.subset(sealed, output=tmp_path / "copy", only="sampled", parts=range(1, 3))
    fsspec.filesystem("memory").put(str(copy.path), "/bucket/part", recursive=True)
    there = lopd_store.open("memory://bucket/part")
    assert there.view == copy.view and there.part(1).topk is None
    pulled = lopd_store.pull("memory://bucket/part", output=tmp_path / "pulled", parts=range(2, 3))
    assert pulled.view.parts == range(2, 3) and pulled.view.kinds == (layout.TOKENS,)
