"""Pulling a part of an artifact, or into the cache: no more comes than is needed, and it verifies by itself."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import lopd_store
from lopd_store import layout
from lopd_store.errors import ArtifactError, InputError
from lopd_store.signatures import make_key
from tests.commands import run_command, run_process
from tests.hub.server import HubServer

REPO = "acme/art"


@pytest.fixture
def pushed(hub: HubServer, sealed: Path) -> str:
    """The fingerprint of the artifact in the repository."""
    fingerprint = lopd_store.push(sealed, REPO).fingerprint
    hub.requests.clear()
    return fingerprint


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lopd"


def fetched(hub: HubServer) -> set[str]:
    """The part files that were downloaded."""
    paths = {path.partition("/parts/")[2] for method, path in hub.requests if method == "GET" and "/parts/" in path}
    return {f"parts/{path}" for path in paths}


def hold_until_two_have_begun(hub: HubServer) -> None:
    """Let two pulls come as far as the manifest before either goes on."""
    both_are_there = threading.Barrier(2)
    arrived: list[str] = []

    def hold(method: str, path: str) -> None:
        if path.endswith("/manifest.json") and method == "GET" and len(arrived) < 2:
            arrived.append(path)
            both_are_there.wait(60)

    hub.fault = hold


@pytest.mark.parametrize(
    ("options", "files"),
    [
        (("--only", "sampled"), {layout.part_file(number, layout.TOKENS) for number in range(4)}),
        (("--parts", "1:3"), {layout.part_file(number, kind) for number in (1, 2) for kind in layout.FILE_KINDS}),
        (("--parts", "3:4", "--only", "sampled"), {layout.part_file(3, layout.TOKENS)}),
    ],
)
def test_only_what_is_asked_for_comes_and_says_so(
    hub: HubServer, pushed: str, tmp_path: Path, options: tuple[str, ...], files: set[str]
) -> None:
    output = tmp_path / "pulled"
    ran = run_command("lopd-store", "pull", REPO, *options, "--output", output)
    assert ran.code == 0, ran.stderr
    assert "partial copy" in ran.stdout
    assert fetched(hub) == files == {f"parts/{path.name}" for path in (output / "parts").iterdir()}
    report = lopd_store.verify(output)
    assert report.ok and report.partial and report.fingerprint == pushed


def test_what_is_left_out_does_not_matter(hub: HubServer, pushed: str, tmp_path: Path) -> None:
    hub.overwrite(REPO, "parts/00002.topk.zarr.zip", b"evil", honest=True)
    assert lopd_store.pull(REPO, output=tmp_path / "sampled", only="sampled").view.has_topk is False
    with pytest.raises(ArtifactError, match="size differs"):
        lopd_store.pull(REPO, output=tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


def test_what_the_hub_lists_otherwise_is_refused_before_it_is_downloaded(
    hub: HubServer, pushed: str, tmp_path: Path
) -> None:
    path = "parts/00002.topk.zarr.zip"
    hub.overwrite(REPO, path, hub.files(REPO)[path][:-1] + b"!", honest=True)
    hub.requests.clear()
    with pytest.raises(ArtifactError, match="digest differs"):
        lopd_store.pull(REPO, output=tmp_path / "pulled")
    assert fetched(hub) == set()


@pytest.mark.parametrize("parts", [range(0, 5), range(2, 2), range(-1, 2)])
def test_parts_that_are_not_there_are_a_usage_error(hub: HubServer, pushed: str, tmp_path: Path, parts: range) -> None:
    with pytest.raises(InputError, match="`parts` is out of range\n  expected  0:4 or less"):
        lopd_store.pull(REPO, output=tmp_path / "pulled", parts=parts)
    assert list(tmp_path.iterdir()) == []


def test_without_an_output_it_goes_into_the_cache_once(hub: HubServer, pushed: str, cache: Path) -> None:
    first = lopd_store.pull(REPO, fingerprint=pushed)
    assert first.path == cache / "artifacts" / pushed.removeprefix("sha256:")
    hub.requests.clear()
    assert lopd_store.pull(REPO, fingerprint=pushed).path == first.path
    assert fetched(hub) == set()
    sampled = lopd_store.pull(REPO, only="sampled")
    assert sampled.path != first.path and not sampled.view.has_topk
    assert fetched(hub) == {layout.part_file(number, layout.TOKENS) for number in range(4)}
    assert lopd_store.pull(REPO, only="sampled").path == sampled.path


def test_two_processes_that_pull_the_same_into_the_cache_both_have_it(
    hub_server: HubServer, hub_env: dict[str, str], pushed: str, tmp_path: Path
) -> None:
    env = hub_env | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    hold_until_two_have_begun(hub_server)
    with ThreadPoolExecutor() as pool:
        ran = list(pool.map(lambda _: run_process("lopd-store", "pull", REPO, "--json", env=env), range(2)))
    assert [one.code for one in ran] == [0, 0], ran
    assert ran[0].json == ran[1].json and ran[0].json["fingerprint"] == pushed
    directory = tmp_path / "cache" / "lopd" / "artifacts"
    assert [path.name for path in directory.iterdir()] == [pushed.removeprefix("sha256:")]
    assert lopd_store.verify(directory / pushed.removeprefix("sha256:")).ok
    parts = [path for method, path in hub_server.requests if method == "GET" and "/parts/" in path]
    assert len(parts) == len(set(parts)) == 12  # the second took what the first had made


def test_an_output_that_another_pull_makes_meanwhile_is_not_overwritten(
    hub: HubServer, pushed: str, tmp_path: Path
) -> None:
    output = tmp_path / "pulled"
    hold_until_two_have_begun(hub)

    def pull(_: int) -> object:
        try:
            return lopd_store.pull(REPO, output=output)
        except InputError as error:
            return error

    with ThreadPoolExecutor() as pool:
        results = sorted(pool.map(pull, range(2)), key=lambda result: isinstance(result, InputError))
    assert isinstance(results[0], lopd_store.Artifact) and str(results[1]).startswith(f"`{output}` exists")
    assert [path.name for path in tmp_path.iterdir()] == ["pulled"] and lopd_store.verify(output).ok


def test_a_copy_in_the_cache_does_not_stand_for_a_signature(
    hub: HubServer, pushed: str, cache: Path, tmp_path: Path
) -> None:
    lopd_store.pull(REPO)
    with pytest.raises(ArtifactError, match="there is no signature by the key"):
        lopd_store.pull(REPO, signed_by=make_key(tmp_path / "alice"))


def test_a_name_may_carry_its_revision(hub: HubServer, unknown: Path, pushed: str, tmp_path: Path) -> None:
    tag, commit = next(iter(hub.tags(REPO).items()))
    lopd_store.push(unknown, REPO)
    places = (f"{REPO}@{tag}", f"{REPO}@{commit}", f"hf://{REPO}@{tag}", f"hf://datasets/{REPO}@{tag}")
    for number, place in enumerate(places):
        assert lopd_store.pull(place, output=tmp_path / str(number), parts=range(1)).fingerprint == pushed
    with pytest.raises(InputError, match="two revisions are asked for"):
        lopd_store.pull(f"{REPO}@{tag}", revision="main", output=tmp_path / "never")


def test_a_tag_that_leads_elsewhere_is_refused(hub: HubServer, unknown: Path, pushed: str, tmp_path: Path) -> None:
    tag = f"lopd-{pushed[7:19]}"
    lopd_store.push(unknown, REPO)
    hub.repo(REPO).tags[tag] = hub.repo(REPO).branches["main"]
    with pytest.raises(ArtifactError, match="has a tag that is not its own"):
        lopd_store.pull(f"{REPO}@{tag}", output=tmp_path / "never")
    with pytest.raises(ArtifactError, match="has a tag that is not its own"):
        lopd_store.open(f"hf://{REPO}@{tag}")
