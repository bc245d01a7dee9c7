"""Pushing into what is there already: other artifacts, other people, other versions, edited cards."""

from __future__ import annotations

import io
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from huggingface_hub import DatasetCard, HfApi

import lopd_store
from lopd_store import upload
from lopd_store.card import merge_card, render_card
from lopd_store.digest import digest_contents
from lopd_store.errors import ArtifactError, InputError, UnavailableError
from lopd_store.manifest import render
from lopd_store.upload import push
from tests.artifacts import edit_manifest
from tests.commands import interrupt_command, run_command
from tests.hub.repository import File
from tests.hub.server import Cut, HubServer
from tests.hub.test_faults import assert_no_half_artifact

REPO = "acme/art"


def puts(hub: HubServer) -> int:
    return [method for method, _ in hub.requests].count("PUT")


def with_a_note(artifact: Path) -> str:
    """Make the artifact another one with the same parts; returns its fingerprint."""
    manifest = lopd_store.open(artifact).manifest
    (artifact / "manifest.json").write_bytes(render(replace(manifest, annotations={"note": "mine"})))
    return lopd_store.open(artifact).fingerprint


def test_another_artifact_takes_the_place_of_the_first_in_one_commit(
    hub: HubServer, sealed: Path, unknown: Path
) -> None:
    lopd_store.push(sealed, REPO)
    commits = len(hub.repo(REPO).commits)
    lopd_store.push(unknown, REPO)
    assert len(hub.repo(REPO).commits) == commits + 1
    for commit in list(hub.repo(REPO).commits)[1:]:
        hub.repo(REPO).tags[commit] = commit
    assert_no_half_artifact(hub)


@pytest.mark.parametrize("files_per_commit", [1, 3, 5])
def test_several_commits_never_show_half_an_artifact(
    hub: HubServer, sealed: Path, unknown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files_per_commit: int
) -> None:
    lopd_store.push(unknown, REPO)
    monkeypatch.setattr(upload, "_FILES_PER_COMMIT", files_per_commit)
    monkeypatch.setattr(upload, "_STEP_FILES", 2)
    pushed = lopd_store.push(sealed, REPO)
    assert len(hub.repo(REPO).commits) > 3
    for commit in list(hub.repo(REPO).commits)[1:]:
        hub.repo(REPO).tags[commit] = commit  # what anyone could have looked at
    assert_no_half_artifact(hub)
    assert lopd_store.pull(f"{REPO}@{pushed.tag}", output=tmp_path / "pulled").fingerprint == pushed.fingerprint


def test_a_new_version_sends_only_what_is_new(hub: HubServer, artifact: Path) -> None:
    first = lopd_store.push(artifact, REPO)
    hub.requests.clear()
    fingerprint = with_a_note(artifact)
    assert lopd_store.push(artifact, REPO).fingerprint == fingerprint != first.fingerprint
    assert puts(hub) == 0
    assert len(hub.tags(REPO)) == 2


def test_somebody_who_commits_meanwhile_stops_the_push(hub: HubServer, sealed: Path) -> None:
    def commit_first(method: str, path: str) -> None:
        if "/commit/" in path and len(hub.repo(REPO).commits) == 1:
            repo = hub.repo(REPO)
            repo.commit("main", {**repo.at("main").files, "theirs.txt": File.regular(b"theirs")}, title="theirs")

    hub.fault = commit_first
    with pytest.raises(UnavailableError, match="changed while this push was going on"):
        lopd_store.push(sealed, REPO)
    assert hub.files(REPO).keys() == {".gitattributes", "theirs.txt"}
    sent = puts(hub)
    lopd_store.push(sealed, REPO)
    assert puts(hub) == sent
    assert hub.files(REPO)["theirs.txt"] == b"theirs"


@pytest.mark.parametrize("known", [False, True], ids=["verified now", "verified before"])
def test_a_part_that_changes_while_it_is_pushed_is_refused(
    hub: HubServer, artifact: Path, forgotten: None, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    path = artifact / "parts/00001.topk.zarr.zip"
    verify = lopd_store.verify
    if known:
        assert verify(artifact).ok

    def change_after(directory: Path, **options: Any) -> object:
        """Change it once it was looked at for the last time."""
        report = verify(directory, **options | {"on_part": None})
        if known or "on_part" in options:
            path.write_bytes(path.read_bytes()[:-1] + b"!")
            for number in range(4) if "on_part" in options else ():
                options["on_part"](number)
        return report

    monkeypatch.setattr(upload, "verify", change_after)
    with pytest.raises(ArtifactError, match="changed while it was pushed"):
        lopd_store.push(artifact, REPO)
    assert hub.files(REPO).keys() == {".gitattributes"}


def test_a_manifest_that_changes_while_it_is_pushed_is_refused(hub: HubServer, artifact: Path, forgotten: None) -> None:
    manifest, right = artifact / "manifest.json", (artifact / "manifest.json").read_bytes()
    wrong = edit_manifest(right, "text", value=False)
    manifest.write_bytes(wrong)

    def put_back(method: str, path: str) -> None:
        manifest.write_bytes(right)

    hub.fault = put_back
    with pytest.raises(ArtifactError, match=r"`manifest\.json` changed while it was pushed") as refused:
        lopd_store.push(artifact, REPO)
    fingerprints = [digest_contents(data).sha256 for data in (wrong, right)]
    assert [refused.value.expected, refused.value.actual] == fingerprints
    assert hub.files(REPO).keys() == {".gitattributes"}


def test_an_organisation_has_its_own_repositories(hub: HubServer, sealed: Path) -> None:
    hub.organizations = ("lab",)
    assert run_command("lopd-store", "push", sealed, "lab/art", "--private").code == 0
    assert hub.repo("lab/art").private


def test_a_pull_request_is_a_draft_until_it_is_whole(hub: HubServer, sealed: Path, tmp_path: Path) -> None:
    HfApi().create_repo(REPO, repo_type="dataset")
    seen: list[str] = []

    def look(method: str, path: str) -> None:
        seen.extend(request.status for request in hub.repo(REPO).pull_requests)

    hub.fault = look
    ran = run_command("lopd-store", "push", sealed, REPO, "--create-pr", "--json")
    assert ran.code == 0, ran.stderr
    assert set(seen) == {"draft"}
    (request,) = hub.repo(REPO).pull_requests
    assert request.status == "open"
    assert (ran.json["tag"], ran.json["url"]) == (None, f"{hub.endpoint}/datasets/{REPO}/discussions/1")
    assert hub.files(REPO).keys() == {".gitattributes"} and hub.tags(REPO) == {}
    fingerprint = lopd_store.open(sealed).fingerprint
    pulled = lopd_store.pull(REPO, revision=request.branch, fingerprint=fingerprint, output=tmp_path / "pulled")
    assert pulled.fingerprint == fingerprint
    hub.repo(REPO).merge(request)
    hub.requests.clear()
    assert lopd_store.push(sealed, REPO).tag in hub.tags(REPO)
    assert puts(hub) == 0


def test_an_interrupted_pull_request_goes_on(hub: HubServer, sealed: Path) -> None:
    from tests.hub.routes import Answer

    HfApi().create_repo(REPO, repo_type="dataset")
    hub.fault = lambda method, path: Answer(status=403) if "/commit/" in path else None
    with pytest.raises(InputError):
        push(sealed, REPO, create_pr=True)
    hub.fault = None
    sent = puts(hub)
    push(sealed, REPO, create_pr=True)
    push(sealed, REPO, create_pr=True)
    assert puts(hub) == sent
    assert [request.status for request in hub.repo(REPO).pull_requests] == ["open"]


def test_progress_is_told_in_bytes(hub: HubServer, sealed: Path, tmp_path: Path) -> None:
    sent: list[tuple[int, int]] = []
    come: list[tuple[int, int]] = []
    push(sealed, REPO, on_upload=lambda done, total: sent.append((done, total)))
    lopd_store.pull(REPO, output=tmp_path / "pulled", on_download=lambda done, total: come.append((done, total)))
    size = sum(path.stat().st_size for path in (sealed / "parts").iterdir())
    beside = sum((tmp_path / "pulled" / name).stat().st_size for name in ("README.md", "build.json"))
    assert sent[-1] == (size, size)
    assert come[0] == (0, size + beside) and come[-1] == (size + beside, size + beside)
    assert come == sorted(come) and len(come) > 10


# Beside the transfer


def test_parts_are_sent_while_others_are_being_verified(
    hub: HubServer, sealed: Path, forgotten: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "_FIRST_BYTES", 1)
    sending = threading.Event()
    hub.fault = lambda method, path: sending.set() if method == "PUT" else None
    waited: list[bool] = []

    def hold_the_last_part(done: int, total: int) -> None:
        if done == total:
            waited.append(sending.wait(30))

    push(sealed, REPO, on_bytes=hold_the_last_part)
    assert waited == [True]


def test_what_was_verified_before_is_sent_at_once_and_what_was_not_is_verified(
    hub: HubServer, sealed: Path, forgotten: None
) -> None:
    heard: list[int] = []
    push(sealed, "acme/first", on_bytes=lambda done, total: heard.append(done))
    assert heard
    heard.clear()
    push(sealed, "acme/second", on_bytes=lambda done, total: heard.append(done))
    assert not heard and hub.files("acme/second").keys() == hub.files("acme/first").keys()


def test_a_part_is_verified_while_others_are_still_coming(hub: HubServer, sealed: Path, tmp_path: Path) -> None:
    push(sealed, REPO)
    verifying = threading.Event()
    waited: list[bool] = []

    def hold_the_last_part(method: str, path: str) -> None:
        if method == "GET" and path.endswith("parts/00003.topk.zarr.zip"):
            waited.append(verifying.wait(30))

    hub.fault = hold_the_last_part
    lopd_store.pull(REPO, output=tmp_path / "pulled", on_bytes=lambda done, total: verifying.set())
    assert waited == [True]


def test_an_artifact_whose_last_part_is_wrong_is_never_seen(
    hub: HubServer, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "_FIRST_BYTES", 1)
    data = (artifact / "parts/00002.rollouts.parquet").read_bytes()  # bytes as the manifest says, of other rollouts
    (artifact / "parts/00003.rollouts.parquet").write_bytes(data)
    entry = {"path": "parts/00003.rollouts.parquet", **vars(digest_contents(data))}
    manifest = (artifact / "manifest.json").read_bytes()
    (artifact / "manifest.json").write_bytes(edit_manifest(manifest, "parts", 3, "files", "rollouts", value=entry))
    with pytest.raises(ArtifactError, match=r"parts/00003\.rollouts\.parquet"):
        push(artifact, REPO)
    assert hub.files(REPO).keys() == {".gitattributes"} and hub.tags(REPO) == {}


@pytest.mark.parametrize("asked", ["preupload", "/lfs/", "commit", "tag"])
def test_a_push_interrupted_by_its_user_goes_on(hub: HubServer, sealed: Path, asked: str) -> None:
    def is_asked() -> bool:
        return any(method in ("POST", "PUT") and asked in path for method, path in list(hub.requests))

    def hold(method: str, path: str) -> Cut | None:
        return Cut() if is_asked() and not threading.Event().wait(0.5) else None

    hub.fault = hold
    ran = interrupt_command("lopd-store", "push", sealed, REPO, when=is_asked)
    text = "interrupted; run the same command again, and it goes on where it can\n"
    assert (ran.code, ran.stdout, ran.stderr) == (130, "", text)
    assert_no_half_artifact(hub)
    hub.fault = None
    sent = set(hub.lfs_objects)
    hub.requests.clear()
    assert run_command("lopd-store", "push", sealed, REPO).code == 0
    assert not sent & {path.removeprefix("/lfs/") for method, path in hub.requests if method == "PUT"}
    assert hub.tags(REPO) == {f"lopd-{lopd_store.open(sealed).fingerprint[7:19]}": hub.repo(REPO).branches["main"]}


# The card


def test_what_people_wrote_into_the_card_on_the_hub_stays(hub: HubServer, artifact: Path) -> None:
    lopd_store.push(artifact, REPO)
    text = hub.files(REPO)["README.md"].decode()
    theirs = "license: cc-by-4.0\nlanguage:\n- en\ntags:\n- mine\n- lopd\n"
    edited = text.replace("tags:\n- lopd\n", theirs, 1) + "\n## Thanks\n\nTo all.\n"
    edited = edited.replace("\n<!-- lopd", "\nRead this first.\n\n<!-- lopd", 1).replace(
        "| fingerprint |", "| changed |"
    )
    HfApi().upload_file(path_or_fileobj=edited.encode(), path_in_repo="README.md", repo_id=REPO, repo_type="dataset")
    fingerprint = with_a_note(artifact)
    lopd_store.push(artifact, REPO)
    card = DatasetCard(hub.files(REPO)["README.md"].decode())
    assert card.text.startswith("\nRead this first.\n") and card.text.endswith("\n## Thanks\n\nTo all.\n")
    assert f"| fingerprint | `{fingerprint}` |" in card.text and "| changed |" not in card.text
    assert vars(card.data)["license"] == "cc-by-4.0"
    assert {"lopd", "mine", "distillation"} <= set(vars(card.data)["tags"])
    assert len(vars(card.data)["tags"]) == 6
    assert vars(card.data)["language"] == ["en"]  # which we cannot know


def test_a_card_edited_here_goes_there(hub: HubServer, artifact: Path) -> None:
    lopd_store.push(artifact, REPO)
    with (artifact / "README.md").open("a") as file:
        file.write("\nFrom here.\n")
    lopd_store.push(artifact, REPO)
    assert hub.files(REPO)["README.md"].endswith(b"\nFrom here.\n")


def test_a_card_of_somebody_else_keeps_its_text(hub: HubServer, sealed: Path) -> None:
    HfApi().create_repo(REPO, repo_type="dataset")
    HfApi().upload_file(path_or_fileobj=b"# Ours\n", path_in_repo="README.md", repo_id=REPO, repo_type="dataset")
    lopd_store.push(sealed, REPO)
    card = DatasetCard(hub.files(REPO)["README.md"].decode())
    assert card.text.startswith("# Ours\n\n<!-- lopd")


@pytest.mark.parametrize(
    "theirs",
    ["", "---\n[\n---\n", "---\n- a list\n---\n", "---\ntags: evil\n---\n", "---\nno end", "\x00", "<!-- lopd"],
)
def test_a_card_that_cannot_be_read_is_no_reason_to_fail(sealed: Path, theirs: str) -> None:
    artifact = lopd_store.open(sealed)
    generated = render_card(artifact.manifest, artifact.fingerprint)
    merged = merge_card(generated, theirs)
    assert vars(DatasetCard(merged).data)["tags"] == vars(DatasetCard(generated).data)["tags"]
    assert merge_card(generated, merged) == merged


def test_a_card_made_again_is_the_same(sealed: Path) -> None:
    artifact = lopd_store.open(sealed)
    generated = render_card(artifact.manifest, artifact.fingerprint)
    assert merge_card(generated, generated) == generated == (sealed / "README.md").read_text()


def test_no_path_and_no_name_of_this_machine_is_in_what_is_pushed(hub: HubServer, sealed: Path) -> None:
    import getpass
    import platform

    lopd_store.push(sealed, REPO)
    secrets = [hub.token, str(sealed.parent), platform.node(), str(Path.home())]
    secrets += [name for name in [getpass.getuser()] if name != "root"]  # a word that anything may contain
    for path, data in hub.files(REPO).items():
        told = [data]
        if path.endswith(".parquet"):  # whose pages are compressed
            table = pq.read_table(io.BytesIO(data))
            told += [str(table.schema.metadata).encode(), str(table.to_pylist()).encode()]
        assert not [secret for secret in secrets if any(secret.encode() in text for text in told)], path
