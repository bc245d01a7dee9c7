"""Pushing: an artifact becomes a dataset repository of the Hub, and at no moment a half one.

    push("artifact", "acme/dapo-17k-qwen3-8b")

First the parts go up as LFS objects, which nobody sees; then one commit puts them, manifest, card and signatures in the
place of what was there; then the tag. An artifact of very many files takes several commits: the first takes the
manifest of the other artifact away, the last brings the new one. Whatever is there already is not sent again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopd_store import layout
from lopd_store.card import UNNAMED, merge_card, render_card
from lopd_store.errors import ArtifactError, InputError
from lopd_store.hub import check_repository, hub_errors, tag_of
from lopd_store.reader import Artifact, open
from lopd_store.sources import HubSource, Listed
from lopd_store.verifier import OnBytes, verify

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

_GROUP_BYTES, _GROUP_FILES = 256 << 20, 256  # sent before progress is told again
_FILES_PER_COMMIT = 1000
_MAX_CARD_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """Where a push went."""

    repository: str
    fingerprint: str
    tag: str | None  # None where it is a pull request
    url: str


def push(
    path: str | Path,
    repository: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    on_bytes: OnBytes | None = None,
    on_upload: OnBytes | None = None,
) -> Pushed:
    """Verify an artifact and push it to a dataset repository, which is made where it does not exist.

    Pushing again goes on where a push was interrupted, and sends only what is missing; parts of another artifact leave
    the branch and stay under their own tag. With `create_pr` it becomes a pull request, a draft until it is whole; once
    that is merged, a push of the same artifact sets the tag. What people wrote into the card stays. `on_bytes` hears
    the verification, `on_upload` (bytes sent, bytes to be sent).
    """
    from huggingface_hub import HfApi, get_token

    directory = Path(path)
    check_repository(repository)
    if get_token() is None:
        raise InputError("no Hub token", hint="log in with `hf auth login`, or set HF_TOKEN")
    artifact = open(directory)
    if not artifact.view.is_whole(artifact.manifest):
        raise InputError(f"`{directory}` is a partial copy", hint="push the whole artifact; who pulls may take a part")
    verify(directory, on_bytes=on_bytes).require_ok()
    api, tag = HfApi(), tag_of(artifact.fingerprint)
    with hub_errors(repository), _without_bars():
        if create_pr:
            request = _pull_request(api, repository, f"Add {tag}")
            _send(api, artifact, repository, request.git_reference, on_upload)
            if request.status == "draft":
                api.change_discussion_status(repository, request.num, "open", repo_type="dataset")
            return Pushed(repository=repository, fingerprint=artifact.fingerprint, tag=None, url=request.url)
        url = api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
        commit = _send(api, artifact, repository, None, on_upload)
        _tag(api, repository, tag, commit, signed=(directory / layout.SIGNATURES).is_file())
    return Pushed(repository=repository, fingerprint=artifact.fingerprint, tag=tag, url=f"{url}/tree/{tag}")


def _send(api: HfApi, artifact: Artifact, repository: str, branch: str | None, on_upload: OnBytes | None) -> str:
    """Make the branch hold the artifact, and return the commit; raises where somebody else changes it meanwhile."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    title = f"Add {tag_of(artifact.fingerprint)}"
    head = HubSource(repository=repository, revision=branch)
    there, parent = head.listing(), head.commit
    wanted = {
        layout.part_file(number, kind): digests
        for number, part in enumerate(artifact.manifest.parts)
        for kind, digests in part.files.items()
    }
    missing = [path for path in wanted if path not in there or there[path].sha256 != wanted[path].sha256]
    documents = _documents(artifact, repository, head, there)
    changed = {path: data for path, data in documents.items() if not _is_there(there.get(path), data)}
    of_another = {layout.BUILD_RECORD, layout.SIGNATURES} - documents.keys() if layout.MANIFEST in changed else set()
    stale = sorted(
        path for path in there if path in of_another or (path.startswith(f"{layout.PARTS}/") and path not in wanted)
    )
    sent, total = 0, sum(wanted[path].size for path in missing)
    waiting: list[CommitOperationAdd | CommitOperationDelete] = [CommitOperationDelete(path) for path in stale]
    if len(missing) > _FILES_PER_COMMIT and layout.MANIFEST in there:
        waiting.append(CommitOperationDelete(layout.MANIFEST))
        changed = changed | {layout.MANIFEST: artifact.manifest_bytes}

    def commit(operations: Sequence[CommitOperationAdd | CommitOperationDelete]) -> str:
        return api.create_commit(
            repository,
            operations,
            repo_type="dataset",
            commit_message=title,
            revision=branch,
            parent_commit=parent,
        ).oid

    for group in _groups({path: wanted[path].size for path in missing}):
        additions = [CommitOperationAdd(path, artifact.path / path) for path in group]
        api.preupload_lfs_files(repository, additions, repo_type="dataset", revision=branch, free_memory=False)
        for addition in additions:
            found, digest = f"sha256:{addition.upload_info.sha256.hex()}", wanted[addition.path_in_repo].sha256
            if found != digest:
                message = f"`{addition.path_in_repo}` changed while it was pushed"
                raise ArtifactError(message, code="A022", expected=digest, actual=found)
        sent += sum(wanted[path].size for path in group)
        if on_upload is not None:
            on_upload(sent, total)
        waiting += additions
        if len(missing) > _FILES_PER_COMMIT and len(waiting) >= _FILES_PER_COMMIT:
            parent, waiting = commit(waiting), []
    waiting += [CommitOperationAdd(path, data) for path, data in changed.items()]
    return commit(waiting) if waiting else parent


def _documents(artifact: Artifact, repository: str, head: HubSource, there: Mapping[str, Listed]) -> dict[str, bytes]:
    """The files beside the parts: as they are here, but for the card, which people may have edited here or there."""
    files = {name: artifact.path / name for name in (layout.BUILD_RECORD, layout.SIGNATURES)}
    documents = {name: path.read_bytes() for name, path in files.items() if path.is_file() and not path.is_symlink()}
    generated, card = render_card(artifact.manifest, artifact.fingerprint), artifact.path / layout.CARD
    edited = card.read_text(encoding="utf-8") if card.is_file() and not card.is_symlink() else generated
    if merge_card(generated, edited) == generated and layout.CARD in there:  # nobody wrote into it here
        found = head.read(layout.CARD, _MAX_CARD_BYTES) or b""
        edited = found.decode(errors="replace")
    text = merge_card(generated, edited).replace(UNNAMED, repository)
    return {**documents, layout.CARD: text.encode(), layout.MANIFEST: artifact.manifest_bytes}


def _is_there(listed: Listed | None, data: bytes) -> bool:
    """Whether the repository has these bytes already, in git or in LFS."""
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    return listed is not None and (listed.blob == blob or listed.sha256 == f"sha256:{hashlib.sha256(data).hexdigest()}")


def _groups(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Paths in order, as many at a time as make a step of the progress."""
    group: list[str] = []
    size = 0
    for path in sizes:
        group.append(path)
        size += sizes[path]
        if size >= _GROUP_BYTES or len(group) >= _GROUP_FILES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _tag(api: HfApi, repository: str, tag: str, commit: str, *, signed: bool) -> None:
    api.create_tag(repository, repo_type="dataset", tag=tag, revision=commit, exist_ok=True)
    if signed and api.dataset_info(repository, revision=tag, expand=["sha"]).sha != commit:
        # Pushed before, and signed since: the tag moves to where the same artifact has its signatures.
        api.delete_tag(repository, repo_type="dataset", tag=tag)
        api.create_tag(repository, repo_type="dataset", tag=tag, revision=commit)


def _pull_request(api: HfApi, repository: str, title: str) -> Any:
    """The pull request of this title that is not closed, or a new one, which is a draft."""
    for request in api.get_repo_discussions(repository, repo_type="dataset", discussion_type="pull_request"):
        if request.title == title and request.status in ("draft", "open"):
            return request
    return api.create_pull_request(repository, title, repo_type="dataset")


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep the client's progress bars out of the way of ours."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
