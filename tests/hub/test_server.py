"""The real `huggingface_hub` client against the Hub of `tests.hub.server`."""

import hashlib
import math
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    HfFileSystem,
    RepoFile,
    constants,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.hub.routes import Answer
from tests.hub.server import Cut, HubServer

REPO = "acme/art"
MANIFEST = b'{"format": "lopd"}\n'
PART = bytes(range(256)) * 64  # 16 KiB


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    return HfApi()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An artifact-like folder: a file that stays in git, and one that goes to LFS."""
    (tmp_path / "art" / "parts").mkdir(parents=True)
    (tmp_path / "art" / "manifest.json").write_bytes(MANIFEST)
    (tmp_path / "art" / "parts" / "00000.topk.zarr.zip").write_bytes(PART)
    return tmp_path / "art"


@pytest.fixture
def pushed(api: HfApi, folder: Path) -> str:
    """The commit of the folder in a new dataset repository."""
    api.create_repo(REPO, repo_type="dataset")
    return api.upload_folder(repo_id=REPO, repo_type="dataset", folder_path=folder).oid


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client retries at once instead of after a second or more."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


# Accounts and repositories


def test_the_token_says_who_is_asking(api: HfApi) -> None:
    assert api.whoami()["name"] == "acme"


def test_a_wrong_token_is_refused_with_401(hub: HubServer) -> None:
    with pytest.raises(HfHubHTTPError, match="Invalid") as refused:
        HfApi(token="wrong").whoami()
    assert refused.value.response.status_code == 401


def test_a_write_without_a_token_is_refused_with_401(hub: HubServer) -> None:
    with pytest.raises(HfHubHTTPError) as refused:
        HfApi(token=False).create_repo(REPO, repo_type="dataset")
    assert refused.value.response.status_code == 401
    assert hub.repos == {}


def test_a_namespace_of_somebody_else_is_refused_with_403(api: HfApi) -> None:
    with pytest.raises(HfHubHTTPError, match='under the namespace "other"') as refused:
        api.create_repo("other/art", repo_type="dataset")
    assert refused.value.response.status_code == 403


def test_a_repository_is_created_once(hub: HubServer, api: HfApi) -> None:
    url = api.create_repo(REPO, repo_type="dataset")
    assert (url, url.repo_id, url.repo_type) == (f"{hub.endpoint}/datasets/{REPO}", REPO, "dataset")
    assert api.create_repo(REPO, repo_type="dataset", exist_ok=True) == url
    with pytest.raises(HfHubHTTPError, match="already created"):
        api.create_repo(REPO, repo_type="dataset")


def test_models_and_datasets_of_one_name_are_two_repositories(api: HfApi, pushed: str) -> None:
    with pytest.raises(RepositoryNotFoundError):
        api.repo_info(REPO)
    api.create_repo(REPO)
    assert api.list_repo_files(REPO) == [".gitattributes"]


def test_a_deleted_repository_is_gone(api: HfApi, pushed: str) -> None:
    api.delete_repo(REPO, repo_type="dataset")
    assert not api.repo_exists(REPO, repo_type="dataset")
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo(REPO, repo_type="dataset")


def test_a_private_repository_is_hidden_from_strangers(hub: HubServer, api: HfApi) -> None:
    api.create_repo(REPO, repo_type="dataset", private=True)
    assert api.dataset_info(REPO).private
    with pytest.raises(RepositoryNotFoundError):
        HfApi(token=False).dataset_info(REPO)


def test_an_unknown_repository_is_not_found(api: HfApi) -> None:
    with pytest.raises(RepositoryNotFoundError):
        api.dataset_info("acme/nothing")
    with pytest.raises(RepositoryNotFoundError):
        snapshot_download("acme/nothing", repo_type="dataset")


# Uploads


def test_a_folder_arrives_byte_for_byte(hub: HubServer, pushed: str) -> None:
    files = hub.files(REPO)
    assert files.keys() == {".gitattributes", "manifest.json", "parts/00000.topk.zarr.zip"}
    assert files["manifest.json"] == MANIFEST
    assert files["parts/00000.topk.zarr.zip"] == PART


def test_only_the_zip_goes_to_lfs(hub: HubServer, pushed: str) -> None:
    assert set(hub.lfs_objects) == {hashlib.sha256(PART).hexdigest()}


def test_a_large_lfs_file_is_uploaded_in_parts(hub: HubServer, api: HfApi, folder: Path) -> None:
    hub.multipart_size = 5000
    api.create_repo(REPO, repo_type="dataset")
    api.upload_folder(repo_id=REPO, repo_type="dataset", folder_path=folder)
    puts = [path.rpartition("/")[2] for method, path in hub.requests if method == "PUT"]
    assert puts == ["1", "2", "3", "4"]
    assert hub.files(REPO)["parts/00000.topk.zarr.zip"] == PART


def test_an_lfs_object_that_is_stored_is_not_uploaded_again(hub: HubServer, api: HfApi, pushed: str) -> None:
    hub.requests.clear()
    api.upload_file(path_or_fileobj=PART, path_in_repo="copy.zip", repo_id=REPO, repo_type="dataset")
    assert "PUT" not in {method for method, path in hub.requests}
    assert hub.files(REPO)["copy.zip"] == PART


def test_two_files_of_the_same_bytes_are_one_lfs_object(hub: HubServer, api: HfApi, folder: Path) -> None:
    (folder / "copy.zip").write_bytes(PART)
    api.create_repo(REPO, repo_type="dataset")
    api.upload_folder(repo_id=REPO, repo_type="dataset", folder_path=folder)
    assert hub.files(REPO)["copy.zip"] == PART
    assert len(hub.lfs_objects) == 1


def test_an_unchanged_folder_makes_no_commit(hub: HubServer, api: HfApi, pushed: str, folder: Path) -> None:
    api.upload_folder(repo_id=REPO, repo_type="dataset", folder_path=folder)
    assert hub.repo(REPO).branches == {"main": pushed}


def test_a_stale_parent_is_refused_with_412(hub: HubServer, api: HfApi, pushed: str) -> None:
    new = CommitOperationAdd(path_in_repo="new.txt", path_or_fileobj=b"new")
    parent = next(iter(hub.repo(REPO).commits))
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as refused:
        api.create_commit(REPO, [new], commit_message="late", repo_type="dataset", parent_commit=parent)
    assert refused.value.response.status_code == 412
    assert "new.txt" not in hub.files(REPO)


def test_deleted_files_and_folders_are_gone_from_the_next_commit(hub: HubServer, api: HfApi, pushed: str) -> None:
    api.delete_file("manifest.json", repo_id=REPO, repo_type="dataset")
    api.delete_folder("parts", repo_id=REPO, repo_type="dataset")
    assert hub.files(REPO).keys() == {".gitattributes"}
    assert len(hub.files(REPO, pushed)) == 3
    with pytest.raises(EntryNotFoundError):
        api.delete_file("manifest.json", repo_id=REPO, repo_type="dataset")


def test_commits_are_listed_newest_first_over_several_pages(hub: HubServer, api: HfApi, pushed: str) -> None:
    hub.page_size = 1
    first, second = reversed(api.list_repo_commits(REPO, repo_type="dataset"))
    assert (first.title, second.commit_id) == ("initial commit", pushed)
    assert first.created_at < second.created_at


# Tags and branches


def test_a_tag_names_a_commit_once(hub: HubServer, api: HfApi, pushed: str) -> None:
    api.create_tag(REPO, tag="fingerprint-1", repo_type="dataset")
    assert hub.tags(REPO) == {"fingerprint-1": pushed}
    (tag,) = api.list_repo_refs(REPO, repo_type="dataset").tags
    assert (tag.name, tag.ref, tag.target_commit) == ("fingerprint-1", "refs/tags/fingerprint-1", pushed)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag(REPO, tag="fingerprint-1", repo_type="dataset")


def test_a_deleted_tag_is_gone(hub: HubServer, api: HfApi, pushed: str) -> None:
    api.create_tag(REPO, tag="v1", repo_type="dataset")
    api.delete_tag(REPO, tag="v1", repo_type="dataset")
    assert hub.tags(REPO) == {}
    with pytest.raises(RevisionNotFoundError):
        api.delete_tag(REPO, tag="v1", repo_type="dataset")


def test_a_branch_with_a_slash_has_its_own_commits(hub: HubServer, api: HfApi, pushed: str) -> None:
    api.create_branch(REPO, branch="try/1", repo_type="dataset")
    new = CommitOperationAdd(path_in_repo="new.txt", path_or_fileobj=b"new")
    api.create_commit(REPO, [new], commit_message="new", repo_type="dataset", revision="try/1")
    assert "new.txt" in api.list_repo_files(REPO, repo_type="dataset", revision="try/1")
    assert "new.txt" not in api.list_repo_files(REPO, repo_type="dataset")
    api.delete_branch(REPO, branch="try/1", repo_type="dataset")
    assert hub.repo(REPO).branches == {"main": pushed}


def test_an_unknown_revision_is_not_found(api: HfApi, pushed: str) -> None:
    with pytest.raises(RevisionNotFoundError):
        api.dataset_info(REPO, revision="v9")
    with pytest.raises(RevisionNotFoundError):
        api.create_tag(REPO, tag="v10", revision="v9", repo_type="dataset")
    with pytest.raises(RevisionNotFoundError):
        snapshot_download(REPO, repo_type="dataset", revision="v9")


# Listings and downloads


def test_a_listing_states_size_and_digest_of_an_lfs_file(api: HfApi, pushed: str) -> None:
    paths = ["parts/00000.topk.zarr.zip", "manifest.json", "nothing"]
    part, manifest = api.get_paths_info(REPO, paths, repo_type="dataset")
    assert isinstance(part, RepoFile)
    assert part.lfs is not None
    assert (part.size, part.lfs.size, part.lfs.sha256) == (len(PART), len(PART), hashlib.sha256(PART).hexdigest())
    assert isinstance(manifest, RepoFile)
    assert (manifest.size, manifest.lfs) == (len(MANIFEST), None)


def test_the_information_about_a_repository_can_state_the_same_digests(api: HfApi, pushed: str) -> None:
    info = api.dataset_info(REPO, files_metadata=True)
    digests = {file.rfilename: file.lfs and file.lfs.sha256 for file in info.siblings or []}
    assert digests["parts/00000.topk.zarr.zip"] == hashlib.sha256(PART).hexdigest()
    assert (info.sha, digests["manifest.json"]) == (pushed, None)


def test_a_tree_is_listed_over_several_pages(hub: HubServer, api: HfApi, pushed: str) -> None:
    hub.page_size = 1
    tree = [entry.path for entry in api.list_repo_tree(REPO, repo_type="dataset", recursive=True)]
    assert tree == [".gitattributes", "manifest.json", "parts", "parts/00000.topk.zarr.zip"]


def test_a_tree_that_is_not_recursive_stops_at_folders(api: HfApi, pushed: str) -> None:
    root = [entry.path for entry in api.list_repo_tree(REPO, repo_type="dataset")]
    assert root == [".gitattributes", "manifest.json", "parts"]
    parts = [entry.path for entry in api.list_repo_tree(REPO, "parts", repo_type="dataset")]
    assert parts == ["parts/00000.topk.zarr.zip"]
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree(REPO, "nothing", repo_type="dataset"))


def test_a_missing_file_is_not_found(api: HfApi, pushed: str) -> None:
    assert api.file_exists(REPO, "manifest.json", repo_type="dataset")
    assert not api.file_exists(REPO, "nothing", repo_type="dataset")
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download(REPO, "nothing", repo_type="dataset")


@pytest.mark.parametrize("redirect", [False, True], ids=["from the Hub", "from another origin"])
def test_a_snapshot_of_a_tag_is_what_was_tagged(hub: HubServer, api: HfApi, pushed: str, redirect: bool) -> None:
    hub.redirect = redirect
    api.create_tag(REPO, tag="v1", repo_type="dataset")
    api.upload_file(path_or_fileobj=b"{}", path_in_repo="manifest.json", repo_id=REPO, repo_type="dataset")
    for revision in ("v1", pushed):
        snapshot = Path(snapshot_download(REPO, repo_type="dataset", revision=revision))
        assert snapshot.name == pushed
        assert (snapshot / "manifest.json").read_bytes() == MANIFEST
        assert (snapshot / "parts" / "00000.topk.zarr.zip").read_bytes() == PART
    assert any(path.startswith("/download/") for _, path in hub.requests) == redirect


@pytest.mark.parametrize("redirect", [False, True], ids=["from the Hub", "from another origin"])
def test_a_file_system_reads_only_the_range_it_needs(hub: HubServer, pushed: str, redirect: bool) -> None:
    hub.redirect = redirect
    files = HfFileSystem()
    path = f"datasets/{REPO}@{pushed}/parts/00000.topk.zarr.zip"
    assert files.cat_file(path, start=1000, end=1100) == PART[1000:1100]
    with files.open(path, block_size=100) as part:
        part.seek(-5, 2)
        assert part.read() == PART[-5:]
    assert files.size(path) == len(PART)


def test_a_subprocess_finds_the_hub_through_its_environment(hub: HubServer, hub_env: dict[str, str]) -> None:
    script = "from huggingface_hub import HfApi; HfApi().create_repo('acme/art', repo_type='dataset')"
    subprocess.run([sys.executable, "-c", script], env=hub_env, check=True)
    assert ("dataset", REPO) in hub.repos


# A Hub that is broken or malicious


def test_an_overwritten_file_keeps_the_digest_that_the_hub_states(hub: HubServer, api: HfApi, pushed: str) -> None:
    other = PART[::-1]
    hub.overwrite(REPO, "parts/00000.topk.zarr.zip", other)
    (part,) = api.get_paths_info(REPO, "parts/00000.topk.zarr.zip", repo_type="dataset")
    assert isinstance(part, RepoFile)
    assert part.lfs is not None
    assert part.lfs.sha256 == hashlib.sha256(PART).hexdigest()
    fetched = hf_hub_download(REPO, "parts/00000.topk.zarr.zip", repo_type="dataset")
    assert Path(fetched).read_bytes() == other


def test_a_file_overwritten_by_an_honest_hub_has_its_own_digest(hub: HubServer, api: HfApi, pushed: str) -> None:
    hub.overwrite(REPO, "parts/00000.topk.zarr.zip", b"short", honest=True)
    (part,) = api.get_paths_info(REPO, "parts/00000.topk.zarr.zip", repo_type="dataset")
    assert isinstance(part, RepoFile)
    assert part.lfs is not None
    assert (part.size, part.lfs.sha256) == (5, hashlib.sha256(b"short").hexdigest())


def test_a_line_may_have_a_speed(hub: HubServer, api: HfApi, folder: Path) -> None:
    hub.bytes_per_second = len(PART) / 0.5
    started = time.monotonic()
    api.create_repo(REPO, repo_type="dataset")
    api.upload_folder(repo_id=REPO, repo_type="dataset", folder_path=folder)
    uploaded = time.monotonic()
    hf_hub_download(REPO, "parts/00000.topk.zarr.zip", repo_type="dataset")
    assert uploaded - started > 0.4 and time.monotonic() - uploaded > 0.4


def test_a_planted_path_is_listed_as_it_is(hub: HubServer, api: HfApi, pushed: str) -> None:
    hub.overwrite(REPO, "../evil.txt", b"evil")
    assert "../evil.txt" in api.list_repo_files(REPO, repo_type="dataset")


@pytest.mark.usefixtures("no_waiting")
def test_a_busy_hub_is_asked_again(hub: HubServer, api: HfApi, folder: Path) -> None:
    faults: list[Answer | Cut] = [Answer(status=503), Answer(status=429, headers={"Retry-After": "3"}), Cut()]
    hub.fault = lambda method, path: faults.pop() if method == "PUT" and faults else None
    api.create_repo(REPO, repo_type="dataset")
    api.upload_folder(repo_id=REPO, repo_type="dataset", folder_path=folder)
    assert [method for method, _ in hub.requests].count("PUT") == 4
    assert hub.files(REPO)["parts/00000.topk.zarr.zip"] == PART


@pytest.mark.usefixtures("no_waiting")
def test_a_download_that_is_cut_off_goes_on_where_it_stopped(
    hub: HubServer, pushed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # the client forgets what is left of a chunk
    hub.fault = lambda method, path: Cut(after=4000) if method == "GET" and path.endswith(".zip") else None
    part = hf_hub_download(REPO, "parts/00000.topk.zarr.zip", repo_type="dataset")
    assert Path(part).read_bytes() == PART
    gets = [path for method, path in hub.requests if method == "GET" and path.endswith(".zip")]
    assert len(gets) == math.ceil(len(PART) / 4000)


def test_a_commit_whose_answer_is_lost_has_happened(hub: HubServer, api: HfApi, pushed: str) -> None:
    hub.fault = lambda method, path: Cut(after=0) if "/commit/" in path else None
    with pytest.raises(httpx2.RemoteProtocolError):
        api.upload_file(path_or_fileobj=b"new", path_in_repo="new.txt", repo_id=REPO, repo_type="dataset")
    assert hub.files(REPO)["new.txt"] == b"new"
