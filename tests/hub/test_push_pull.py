"""Push and pull through the real client: nothing half-done is taken for an artifact, nothing is taken on trust."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import time
from pathlib import Path

import pytest
from huggingface_hub import DatasetCard, HfApi

import lopd_store
from lopd_store.errors import ArtifactError, UnavailableError
from lopd_store.signatures import make_key
from lopd_train.data import artifact_source
from tests.artifacts import read_first_part, replace_part
from tests.commands import Ran, command_line, run_command
from tests.hub.routes import Answer
from tests.hub.server import Cut, HubServer

REPO = "acme/art"
TOPK = "parts/00001.topk.zarr.zip"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory, and the current one."""
    empty = tmp_path / "here"
    empty.mkdir()
    monkeypatch.chdir(empty)
    return empty


@pytest.fixture
def pushed(hub: HubServer, sealed: Path) -> str:
    """The fingerprint of the artifact in the repository."""
    return lopd_store.push(sealed, REPO).fingerprint


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client retries at once instead of after a second or more."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def push(artifact: Path | str, *more: object) -> Ran:
    return run_command("lopd-store", "push", artifact, REPO, *more)


def pull(*more: object, repository: str = REPO) -> Ran:
    return run_command("lopd-store", "pull", repository, "--output", "pulled", *more)


def assert_refused(ran: Ran, code: int, text: str) -> None:
    """The whole of stderr, an empty stdout, and nothing left of the pull."""
    assert (ran.code, ran.stdout, ran.stderr) == (code, "", text)
    assert not list(Path().iterdir())


def contents(artifact: Path) -> dict[str, bytes]:
    return {str(path.relative_to(artifact)): path.read_bytes() for path in artifact.rglob("*") if path.is_file()}


def wrong(code: str, path: str, text: str, repository: str = REPO) -> str:
    """What a pull says of an artifact that does not verify."""
    hint = f"hint: this is what `{repository}` holds: ask its owner, or pull another `--revision`"
    return f"error[{code}]: `{path}`: {text}\n\n{hint}\n"


# Push


def test_parts_come_before_the_manifest_and_the_manifest_before_the_tag(hub: HubServer, sealed: Path) -> None:
    pushed = lopd_store.push(sealed, REPO)
    _, commit = hub.repo(REPO).commits.values()
    assert commit.title == f"Add {pushed.tag}"
    assert commit.files.keys() == {".gitattributes"} | contents(sealed).keys()
    assert hub.tags(REPO) == {pushed.tag: commit.oid}
    uploads = [number for number, (method, _) in enumerate(hub.requests) if method == "PUT"]
    (committed,) = (number for number, (_, path) in enumerate(hub.requests) if "/commit/" in path)
    assert len(uploads) == len(list((sealed / "parts").iterdir())) and max(uploads) < committed
    assert hub.requests[-1] == ("POST", f"/api/datasets/{REPO}/tag/{commit.oid}")


def test_the_tag_is_the_beginning_of_the_fingerprint(hub: HubServer, sealed: Path) -> None:
    ran = push(sealed)
    fingerprint = lopd_store.open(sealed).fingerprint
    assert fingerprint == "sha256:" + hashlib.sha256(hub.files(REPO)["manifest.json"]).hexdigest()
    url = f"{hub.endpoint}/datasets/{REPO}/tree/lopd-{fingerprint[7:19]}"
    assert ran == Ran(code=0, stdout=f"{url}\n{fingerprint}\n", stderr="")


def test_the_same_facts_come_in_json(hub: HubServer, sealed: Path) -> None:
    ran = push(sealed, "--json")
    fingerprint = lopd_store.open(sealed).fingerprint
    tag = f"lopd-{fingerprint[7:19]}"
    url = f"{hub.endpoint}/datasets/{REPO}/tree/{tag}"
    assert (ran.code, ran.stderr) == (0, "")
    assert ran.json == {"repository": REPO, "tag": tag, "fingerprint": fingerprint, "url": url}


def test_pushing_twice_sends_nothing_twice(hub: HubServer, sealed: Path, pushed: str) -> None:
    before, commits = len(hub.requests), len(hub.repo(REPO).commits)
    assert push(sealed).code == 0
    assert len(hub.repo(REPO).commits) == commits
    assert not [path for method, path in hub.requests[before:] if method == "PUT" or "/commit/" in path]


def test_a_push_that_was_interrupted_sends_only_what_is_missing(hub: HubServer, sealed: Path) -> None:
    refused = hashlib.sha256((sealed / TOPK).read_bytes()).hexdigest()
    hub.fault = lambda method, path: Answer(status=403) if path == f"/lfs/{refused}" else None
    with pytest.raises(UnavailableError, match=f"the Hub did not answer as it should: Error while uploading '{TOPK}'"):
        lopd_store.push(sealed, REPO)
    assert hub.files(REPO).keys() == {".gitattributes"}
    assert hub.tags(REPO) == {}
    hub.fault = None
    sent = set(hub.lfs_objects)
    hub.requests.clear()
    lopd_store.push(sealed, REPO)
    again = {path.removeprefix("/lfs/") for method, path in hub.requests if method == "PUT"}
    assert again == hub.lfs_objects.keys() - sent
    assert refused in again


def test_a_push_whose_manifest_never_arrives_is_no_artifact(hub: HubServer, sealed: Path, here: Path) -> None:
    def fault(method: str, path: str) -> Answer | None:
        return Answer(status=500) if "/commit/" in path else None

    hub.fault = fault
    with pytest.raises(UnavailableError, match=r"the Hub did not answer as it should: .*500"):
        lopd_store.push(sealed, REPO)
    hub.fault = None
    assert hub.tags(REPO) == {}
    text = (
        f"error: `hf://{REPO}` is not an artifact\n  expected  `manifest.json`\n  actual    no such file\n\n"
        f"hint: this is what `{REPO}` holds: ask its owner, or pull another `--revision`\n"
    )
    assert_refused(pull(), 1, text)


def test_an_artifact_that_does_not_verify_is_never_sent(hub: HubServer, artifact: Path) -> None:
    (artifact / TOPK).unlink()
    ran = push(artifact)
    text = f"error[A020]: `{TOPK}`: a file is missing or not a plain file\n"
    assert ran == Ran(code=1, stdout="", stderr=text)
    assert hub.requests == []


def test_an_artifact_in_progress_is_never_sent(hub: HubServer, here: Path) -> None:
    Path("artifact.building").mkdir()
    ran = push("artifact")
    assert (ran.code, ran.stdout, hub.requests) == (2, "", [])
    assert ran.stderr.startswith("error: `artifact` is still being built\n")


def test_another_artifact_takes_the_branch_and_the_first_keeps_its_tag(
    hub: HubServer, sealed: Path, unknown: Path, pushed: str, here: Path
) -> None:
    second = lopd_store.push(unknown, REPO).fingerprint
    assert {path for path in hub.files(REPO) if path.startswith("parts/")} == {
        f"parts/{path.name}" for path in (unknown / "parts").iterdir()
    }
    assert lopd_store.pull(REPO, output="second").fingerprint == second
    assert lopd_store.pull(REPO, output="first", fingerprint=pushed).fingerprint == pushed
    assert set(hub.tags(REPO)) == {f"lopd-{fingerprint[7:19]}" for fingerprint in (pushed, second)}


def test_a_new_repository_is_private_when_asked(hub: HubServer, sealed: Path) -> None:
    assert push(sealed, "--private").code == 0
    assert hub.repo(REPO).private


def test_without_a_token_nothing_is_asked(hub: HubServer, sealed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    text = "error: no Hub token\n\nhint: log in with `hf auth login`, or set HF_TOKEN\n"
    assert push(sealed) == Ran(code=2, stdout="", stderr=text)
    assert hub.requests == []


def test_a_token_that_may_not_write_there_is_refused(hub: HubServer, sealed: Path) -> None:
    ran = run_command("lopd-store", "push", sealed, "other/art")
    assert (ran.code, ran.stdout) == (2, "")
    assert ran.stderr.startswith("error: the Hub refused access to `other/art`\n  actual    403 Forbidden: ")
    assert ran.stderr.endswith(
        "\n\nhint: log in with `hf auth login`, or set HF_TOKEN to a token that may write there\n"
    )


@pytest.mark.parametrize("name", ["art", "acme/art/more", "../art", "acme/a--b", "acme/" + "a" * 200])
def test_a_name_that_no_repository_can_have_is_a_usage_error(hub: HubServer, sealed: Path, name: str) -> None:
    for arguments in (("push", sealed, name), ("pull", name, "--output", "never")):
        ran = run_command("lopd-store", *arguments)
        assert (ran.code, ran.stdout, hub.repos) == (2, "", {})
        assert ran.stderr.startswith("error: not the name of a repository\n")


# Pull


@pytest.mark.parametrize("redirect", [False, True], ids=["from the Hub", "from another origin"])
def test_what_is_pulled_is_what_was_pushed(
    hub: HubServer, sealed: Path, pushed: str, here: Path, redirect: bool
) -> None:
    hub.redirect = redirect
    ran = pull("--json")
    assert (ran.code, ran.stderr, ran.json["fingerprint"]) == (0, "", pushed)
    card = (sealed / "README.md").read_bytes().replace(b"OWNER/NAME", REPO.encode())
    assert contents(Path("pulled")) == {**contents(sealed), "README.md": card}
    assert [path.name for path in here.iterdir()] == ["pulled"]
    assert ran.json == run_command("lopd-store", "inspect", "pulled", "--json").json


def test_a_revision_is_a_tag_a_branch_or_a_commit(hub: HubServer, unknown: Path, pushed: str, here: Path) -> None:
    lopd_store.push(unknown, REPO)
    tag, commit = next(iter(hub.tags(REPO).items()))
    for number, revision in enumerate((tag, commit)):
        assert lopd_store.pull(REPO, output=f"pulled-{number}", revision=revision).fingerprint == pushed
    assert lopd_store.pull(REPO, output="main", revision="main").fingerprint != pushed


def test_other_files_of_a_repository_are_left_there(hub: HubServer, pushed: str, here: Path) -> None:
    for path in (".gitattributes", "../evil", "evil.py", "parts/evil", "parts/../../evil", "parts/0.topk.zarr.zip"):
        hub.overwrite(REPO, path, b"evil", honest=True)
    assert pull().code == 0
    assert "evil" not in str(sorted(here.parent.rglob("*")))
    assert not Path("pulled/.gitattributes").exists()


def test_a_part_too_many_is_left_there(hub: HubServer, pushed: str, here: Path) -> None:
    hub.overwrite(REPO, "parts/00004.topk.zarr.zip", b"evil", honest=True)
    assert pull().code == 0
    assert not Path("pulled/parts/00004.topk.zarr.zip").exists()


@pytest.mark.parametrize("honest", [False, True], ids=["and the Hub hides it", "and the Hub says so"])
def test_a_changed_byte_is_refused(hub: HubServer, pushed: str, here: Path, honest: bool) -> None:
    before = hub.files(REPO)[TOPK]
    after = before[:100] + bytes([before[100] ^ 1]) + before[101:]
    hub.overwrite(REPO, TOPK, after, honest=honest)
    expected, actual = (hashlib.sha256(data).hexdigest() for data in (before, after))
    text = f"digest differs\n  expected  sha256:{expected}\n  actual    sha256:{actual}"
    assert_refused(pull("--fingerprint", pushed), 1, wrong("A022", TOPK, text))


def test_values_that_break_a_rule_come_as_they_are_and_are_refused_where_they_are_used(
    hub: HubServer, artifact: Path, here: Path
) -> None:
    part = read_first_part(artifact)
    replace_part(artifact, sampled_logprobs=part.sampled_logprobs - 1)  # honest digests
    HfApi().create_repo(REPO, repo_type="dataset")
    HfApi().upload_folder(repo_id=REPO, repo_type="dataset", folder_path=artifact)
    assert pull().code == 0
    ran = run_command("lopd-store", "verify", "pulled")
    assert ran.code == 1 and "[A064]" in ran.stdout + ran.stderr
    for place in ("pulled", f"hf://{REPO}"):
        with pytest.raises(ArtifactError, match="sampled log-prob and the entry"):
            artifact_source(lopd_store.open(place)).read(0)


def test_parts_that_changed_places_are_refused(hub: HubServer, pushed: str, here: Path) -> None:
    files = hub.files(REPO)
    other = "parts/00002.topk.zarr.zip"
    hub.overwrite(REPO, TOPK, files[other], honest=True)
    hub.overwrite(REPO, other, files[TOPK], honest=True)
    ran = pull()
    assert (ran.code, ran.stdout) == (1, "")
    assert f"`{TOPK}`" in ran.stderr
    assert not list(here.iterdir())


def test_a_missing_part_is_refused(hub: HubServer, pushed: str, here: Path) -> None:
    HfApi().delete_file(TOPK, repo_id=REPO, repo_type="dataset")
    assert_refused(pull(), 1, wrong("A020", TOPK, "a file is missing or not a plain file"))


def test_a_fingerprint_that_does_not_match_is_refused_before_the_parts_are_fetched(
    hub: HubServer, unknown: Path, pushed: str, here: Path
) -> None:
    other = lopd_store.open(unknown).fingerprint
    hub.repo(REPO).tags[f"lopd-{other[7:19]}"] = hub.repo(REPO).branches["main"]
    hub.requests.clear()
    text = (
        f"error: `hf://{REPO}@lopd-{other[7:19]}` holds another artifact\n"
        f"  expected  {other}\n  actual    {pushed}\n\n"
        f"hint: this is what `{REPO}` holds: ask its owner, or pull another `--revision`\n"
    )
    assert_refused(pull("--fingerprint", other), 1, text)
    assert not [path for _, path in hub.requests if "/parts/" in path]


def test_another_manifest_in_the_place_of_the_tagged_one_is_refused(
    hub: HubServer, unknown: Path, pushed: str, here: Path
) -> None:
    hub.overwrite(REPO, "manifest.json", (unknown / "manifest.json").read_bytes(), honest=True)
    with pytest.raises(ArtifactError, match="holds another artifact"):
        lopd_store.pull(REPO, output="pulled", fingerprint=pushed)
    with pytest.raises(ArtifactError):  # nor do its parts belong to it
        lopd_store.pull(REPO, output="pulled")
    assert not list(here.iterdir())


def test_a_newer_format_is_refused_with_the_way_out(hub: HubServer, pushed: str, here: Path) -> None:
    data = hub.files(REPO)["manifest.json"].replace(b'"version": "1.0"', b'"version": "2.0"')
    hub.overwrite(REPO, "manifest.json", data, honest=True)
    ran = pull()
    assert ran.code == 1
    assert "has format version 2.0, which this lopd does not read\n" in ran.stderr
    assert ran.stderr.endswith("\n\nhint: pip install --upgrade lopd\n")
    assert not list(here.iterdir())


def test_a_repository_that_is_no_artifact_is_refused(hub: HubServer, here: Path) -> None:
    HfApi().create_repo("acme/text", repo_type="dataset")
    text = (
        "error: `hf://acme/text` is not an artifact\n  expected  `manifest.json`\n  actual    no such file\n\n"
        "hint: this is what `acme/text` holds: ask its owner, or pull another `--revision`\n"
    )
    assert_refused(pull(repository="acme/text"), 1, text)


@pytest.mark.parametrize("token", ["the-token-of-acme", None], ids=["with a token", "without one"])
def test_an_unknown_repository_is_a_usage_error(
    hub: HubServer, here: Path, monkeypatch: pytest.MonkeyPatch, token: str | None
) -> None:
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    text = (
        "error: no dataset repository `acme/nothing` on the Hub, or it is private\n\n"
        "hint: check the name, or log in with `hf auth login`\n"
    )
    assert_refused(pull(repository="acme/nothing"), 2, text)


@pytest.mark.parametrize(
    ("options", "revision"),
    [(("--revision", "v9"), "v9"), (("--fingerprint", "sha256:" + "0" * 64), "lopd-000000000000")],
)
def test_an_unknown_revision_is_a_usage_error(
    hub: HubServer, pushed: str, here: Path, options: tuple[str, str], revision: str
) -> None:
    text = (
        f"error: `{REPO}` has no revision `{revision}`\n\n"
        "hint: an artifact is tagged `lopd-` and the first 12 digits of its fingerprint; was it pushed there?\n"
    )
    assert_refused(pull(*options), 2, text)


def test_what_is_no_fingerprint_is_a_usage_error(hub: HubServer, here: Path) -> None:
    text = "error: `fingerprint` is not one\n  expected  sha256:<64 lowercase hex>\n  actual    lopd-000000000000\n"
    assert_refused(pull("--fingerprint", "lopd-000000000000"), 2, text)
    assert hub.requests == []


def test_an_output_that_exists_is_never_overwritten(hub: HubServer, pushed: str, here: Path) -> None:
    Path("pulled").mkdir()
    text = "error: `pulled` exists\n\nhint: choose another `--output`, or move it away\n"
    assert pull() == Ran(code=2, stdout="", stderr=text)
    assert not list(Path("pulled").iterdir())


def test_a_directory_of_somebody_else_in_the_place_of_the_pull_in_progress_is_left_alone(
    hub: HubServer, pushed: str, here: Path
) -> None:
    Path("pulled.pulling").mkdir()
    Path("pulled.pulling/precious").write_text("precious")
    text = "error: `pulled.pulling` exists, and is no pull in progress\n\nhint: move it away\n"
    assert pull() == Ran(code=2, stdout="", stderr=text)
    assert Path("pulled.pulling/precious").read_text() == "precious"


# Signatures


def test_signatures_travel_and_a_pull_asks_for_one_before_the_parts_are_fetched(
    hub: HubServer, artifact: Path, pushed: str, here: Path, tmp_path: Path
) -> None:
    alice, bob = (make_key(tmp_path / name) for name in ("alice", "bob"))
    hub.requests.clear()
    text = (
        "error[A101]: `signatures.json`: there is no signature by the key\n"
        f"  expected  {alice}\n  actual    no signature of this artifact\n\n"
        f"hint: this is what `{REPO}` holds: ask its owner, or pull another `--revision`\n"
    )
    assert_refused(pull("--signed-by", alice), 1, text)
    assert not [path for _, path in hub.requests if "/parts/" in path]
    lopd_store.sign(artifact, key=tmp_path / "alice")
    assert push(artifact).code == 0  # the same artifact again, whose tag now leads to its signatures
    assert hub.tags(REPO) == {f"lopd-{pushed[7:19]}": hub.repo(REPO).branches["main"]}
    assert_refused(
        pull("--signed-by", bob), 1, text.replace(alice, bob).replace("no signature of this artifact", alice)
    )
    assert pull("--fingerprint", pushed, "--signed-by", tmp_path / "alice.pub").code == 0
    assert contents(Path("pulled")) == contents(artifact) | {"README.md": contents(Path("pulled"))["README.md"]}


def test_a_damaged_file_of_signatures_is_refused_only_where_one_is_asked_for(
    hub: HubServer, pushed: str, here: Path, tmp_path: Path
) -> None:
    key = make_key(tmp_path / "alice")
    hub.overwrite(REPO, "signatures.json", b"[", honest=True)
    ran = pull("--signed-by", key)
    assert (ran.code, ran.stdout) == (1, "") and ran.stderr.startswith("error[A100]: `signatures.json` ")
    assert not list(here.iterdir())
    assert pull().code == 0


# A Hub that fails


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("fault", [Answer(status=500), Answer(status=503), Cut()], ids=["500", "503", "cut off"])
def test_a_hub_that_does_not_answer_leaves_the_question_open(
    hub: HubServer, sealed: Path, here: Path, fault: Answer | Cut
) -> None:
    hub.fault = lambda method, path: fault
    for ran in (push(sealed), pull()):
        assert (ran.code, ran.stdout) == (3, "")
        assert ran.stderr.startswith("error: the Hub did not answer as it should: ")
        assert ran.stderr.endswith("\n\nhint: try again\n")
    assert not list(here.iterdir())


@pytest.mark.usefixtures("no_waiting")
def test_a_hub_that_is_not_there_leaves_the_question_open(
    hub: HubServer, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    ran = pull()
    assert (ran.code, ran.stdout) == (3, "")
    assert (
        ran.stderr == "error: the Hub did not answer as it should: [Errno 111] Connection refused\n\nhint: try again\n"
    )


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("failing", ["/revision/", "/resolve/"], ids=["at the revision", "at the files"])
def test_a_pull_that_failed_goes_on_where_it_stopped(
    hub: HubServer, sealed: Path, pushed: str, here: Path, failing: str
) -> None:
    last = "parts/00003.topk.zarr.zip"
    hub.fault = lambda method, path: Answer(status=503) if path.endswith(last) else None
    assert pull("--fingerprint", pushed).code == 3
    assert not Path("pulled").exists()
    hub.fault = lambda method, path: Answer(status=503) if failing in path else None
    assert pull("--fingerprint", pushed).code == 3  # what is there already is not taken for the whole
    assert not Path("pulled").exists()
    hub.fault = None
    hub.requests.clear()
    assert pull("--fingerprint", pushed).code == 0
    fetched = {path.partition("/resolve/")[2].partition("/")[2] for _, path in hub.requests if "/parts/" in path}
    assert fetched == {last}


@pytest.mark.usefixtures("no_waiting")
def test_a_pull_in_progress_of_another_artifact_is_begun_anew(
    hub: HubServer, unknown: Path, pushed: str, here: Path
) -> None:
    hub.fault = lambda method, path: Answer(status=404) if path.endswith(TOPK) else None
    assert pull().code == 3
    assert Path("pulled.pulling/parts/00000.topk.zarr.zip").exists()
    hub.fault = None
    other = lopd_store.push(unknown, REPO).fingerprint  # in one part
    assert pull("--json").json["fingerprint"] == other
    assert [path.name for path in here.iterdir()] == ["pulled"]


@pytest.mark.usefixtures("no_waiting")
def test_a_file_cut_short_on_its_way_leaves_the_question_open(hub: HubServer, pushed: str, here: Path) -> None:
    hub.overwrite(REPO, TOPK, hub.files(REPO)[TOPK][:-5])
    ran = pull()
    assert (ran.code, ran.stdout) == (3, "")
    assert ran.stderr.startswith("error: the Hub did not answer as it should: Consistency check failed: ")
    assert not Path("pulled").exists()


def test_a_pull_interrupted_by_its_user_goes_on(
    hub_server: HubServer, hub_env: dict[str, str], hub: HubServer, pushed: str, here: Path
) -> None:
    pulling: list[subprocess.Popen[str]] = []

    def press_ctrl_c(method: str, path: str) -> None:
        if method == "GET" and path.endswith(TOPK):
            pulling[0].send_signal(signal.SIGINT)
            time.sleep(0.3)

    hub_server.fault = press_ctrl_c
    argv = command_line("lopd-store", "pull", REPO, "--output", "pulled")
    pulling.append(
        subprocess.Popen(
            argv,
            env=hub_env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    )
    stdout, stderr = pulling[0].communicate(timeout=60)
    hub_server.fault = None
    assert (pulling[0].returncode, stdout) == (130, "")
    assert stderr == "interrupted; run the same command again, and it goes on where it can\n"
    assert [path.name for path in here.iterdir()] == ["pulled.pulling"]
    assert pull().code == 0
    assert [path.name for path in here.iterdir()] == ["pulled"]


# Secrets, and the card


def test_the_token_is_nowhere(hub: HubServer, sealed: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = [push(sealed), pull("--json"), pull(repository="acme/nothing"), pull("--revision", "v9")]
    said += [run_command("lopd-store", "push", sealed, "other/art")]
    monkeypatch.setenv("HF_TOKEN", "hf_a_wrong_token")
    said += [push(sealed), pull(repository="acme/other")]
    assert {ran.code for ran in said} == {0, 2}
    for secret in (hub.token, "hf_a_wrong_token"):
        assert not [ran for ran in said if secret in ran.stdout + ran.stderr]
        assert not [path for path, data in contents(here).items() if secret.encode() in data]


def test_the_card_is_one_that_the_hub_understands(hub: HubServer, sealed: Path, pushed: str) -> None:
    card = DatasetCard(hub.files(REPO)["README.md"].decode())
    teacher = lopd_store.open(sealed).manifest.inputs[0].teacher
    assert vars(card.data)["tags"] == [
        "lopd",
        f"lopd-artifact-{pushed[7:19]}",
        f"lopd-teacher-{teacher.weights[7:19]}",
        f"lopd-tokenizer-{teacher.tokenizer[7:19]}",
        "distillation",
    ]
    assert vars(card.data)["size_categories"] == ["n<1K"]
    assert vars(card.data)["configs"] == [{"config_name": "rollouts", "data_files": "parts/*.rollouts.parquet"}]
    assert f"| fingerprint | `{pushed}` |" in card.text
    assert (
        f"| teacher | `teacher`, weights `{lopd_store.open(sealed).manifest.inputs[0].teacher.weights}` |" in card.text
    )
    assert f"lopd-store pull {REPO} --fingerprint {pushed} --output artifact\n" in card.text


def test_a_pushed_file_may_be_large_and_go_up_in_pieces(hub: HubServer, sealed: Path, here: Path) -> None:
    hub.multipart_size = 500
    assert push(sealed).code == 0
    assert max(int(path.rpartition("/")[2]) for method, path in hub.requests if method == "PUT") > 8
    assert pull().code == 0
