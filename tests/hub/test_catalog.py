"""Finding artifacts by the tags of their cards; what a tag claims is compared with the manifest."""

from __future__ import annotations

from pathlib import Path

import pytest

import lopd_store
from lopd_store.errors import InputError
from tests.commands import run_command
from tests.conformance.text import SPEC
from tests.hub.repository import File
from tests.hub.server import HubServer


@pytest.fixture
def pushed(hub: HubServer, sealed: Path) -> lopd_store.Artifact:
    """Two artifacts of one teacher, in two namespaces, beside a repository of another kind."""
    from huggingface_hub import HfApi

    hub.organizations = ("lab",)
    lopd_store.push(sealed, "acme/art")
    lopd_store.push(sealed, "lab/art")
    HfApi().create_repo("acme/text", repo_type="dataset")
    return lopd_store.open(sealed)


def repositories(**query: str | Path) -> list[str]:
    return [found.repository for found in lopd_store.search(**query)]  # type: ignore[arg-type]


def test_an_owner_has_a_list(hub: HubServer, pushed: lopd_store.Artifact) -> None:
    ran = run_command("lopd-store", "list", "acme", "--json")
    assert (ran.code, ran.stderr) == (0, "")
    (row,) = ran.json
    assert (row["repository"], row["fingerprint"]) == ("acme/art", pushed.fingerprint)
    assert row["url"] == f"hf://acme/art@lopd-{pushed.fingerprint[7:19]}"
    text = run_command("lopd-store", "list", "lab").stdout
    assert text.startswith("artifact") and "hf://lab/art@lopd-" in text
    assert run_command("lopd-store", "list", "nobody").stderr == "nothing found\n"


def test_an_artifact_is_found_by_its_teacher_and_its_tokenizer(
    hub: HubServer, pushed: lopd_store.Artifact, teacher_dir: Path, other_teacher_dir: Path
) -> None:
    both = ["acme/art", "lab/art"]
    identity = pushed.manifest.inputs[0].teacher
    assert repositories(teacher=teacher_dir) == repositories(teacher=identity.weights) == both
    assert repositories(tokenizer=other_teacher_dir) == repositories(tokenizer=identity.tokenizer) == both
    assert repositories(teacher=other_teacher_dir) == []
    assert repositories(teacher=identity.weights, tokenizer="sha256:" + "0" * 64) == []
    assert repositories(teacher=identity.weights, owner="lab") == ["lab/art"]
    assert len(run_command("lopd-store", "search", "--teacher", teacher_dir, "--json").json) == 2


def test_an_artifact_of_several_domains_is_found_by_any_of_its_teachers(hub: HubServer) -> None:
    lopd_store.push(SPEC / "vectors" / "valid" / "several_domains", "acme/both")
    math, code = (
        one.teacher for one in lopd_store.open(SPEC / "vectors" / "valid" / "several_domains").manifest.inputs
    )
    for teacher in (math, code):
        (row,) = run_command("lopd-store", "search", "--teacher", teacher.weights, "--json").json
        assert [(one["domain"], one["weights"]) for one in row["teachers"]] == [
            ("math", math.weights),
            ("code", code.weights),
        ]
    assert repositories(teacher="sha256:" + 64 * "1") == []
    assert "teacher, coder" in run_command("lopd-store", "list", "acme").stdout


def test_a_tag_is_not_believed(hub: HubServer, pushed: lopd_store.Artifact, unknown: Path) -> None:
    claimed = "sha256:" + "1" * 64
    repo = hub.repo("acme/art")
    card = f"---\ntags: [lopd, lopd-teacher-{claimed[7:19]}]\n---\n".encode()
    repo.commit("main", {**repo.at("main").files, "README.md": File.regular(card)}, title="a lie")
    assert repositories(teacher=claimed) == []


def test_a_repository_that_only_claims_to_be_an_artifact_is_named_on_stderr(
    hub: HubServer, pushed: lopd_store.Artifact
) -> None:
    repo = hub.repo("acme/text")
    repo.commit("main", {"README.md": File.regular(b"---\ntags: [lopd]\n---\n")}, title="a claim")
    ran = run_command("lopd-store", "list", "acme")
    assert "note: acme/text: `hf://acme/text` is not an artifact" in ran.stderr
    assert "acme/text" not in ran.stdout and "acme/art" in ran.stdout


def test_an_artifact_is_pulled_by_its_bare_fingerprint(
    hub: HubServer, pushed: lopd_store.Artifact, unknown: Path, tmp_path: Path
) -> None:
    repo = hub.repo("acme/art")  # whose card says so, but whose manifest is another one now
    manifest = File.regular((unknown / "manifest.json").read_bytes())
    repo.commit("main", {**repo.at("main").files, "manifest.json": manifest}, title="a lie")
    ran = run_command("lopd-store", "pull", pushed.fingerprint, "--output", tmp_path / "pulled", "--json")
    assert (ran.code, ran.json["fingerprint"]) == (0, pushed.fingerprint), ran.stderr
    parts = [path for method, path in hub.requests if method == "GET" and "/parts/" in path]
    assert parts and all("/lab/art/" in path for path in parts)
    with pytest.raises(InputError, match="two artifacts are asked for"):
        lopd_store.pull(pushed.fingerprint, fingerprint="sha256:" + "0" * 64, output=tmp_path / "never")


def test_a_fingerprint_that_nobody_has_is_a_usage_error(hub: HubServer, tmp_path: Path) -> None:
    fingerprint = "sha256:" + "0" * 64
    ran = run_command("lopd-store", "pull", fingerprint, "--output", tmp_path / "pulled")
    assert (ran.code, ran.stdout) == (2, "")
    assert ran.stderr.startswith(f"error: no repository on the Hub is known to hold `{fingerprint}`\n")
    assert not list(tmp_path.iterdir())


def test_a_search_for_nothing_is_a_usage_error(hub: HubServer) -> None:
    with pytest.raises(InputError, match="nothing to search for"):
        lopd_store.search()
    assert run_command("lopd-store", "search").code == 2
