"""Pushing: an artifact becomes a dataset repository of the Hub, and at no moment a half one.

    push("artifact", "acme/dapo-17k-qwen3-8b")

First the parts go up as LFS objects, which nobody sees, each once it is verified and beside the verification of the
next (at once, where this machine has verified the artifact before); then, if all are right, one commit puts them,
manifest, card and signatures in the place of what was there; then the tag. An artifact of very many files takes several
commits: the first takes the manifest of the other artifact away, the last brings the new one. Whatever is there already
is not sent again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopd_store import layout
from lopd_store.card import UNNAMED, merge_card, render_card
from lopd_store.digest import FileDigests
from lopd_store.errors import ArtifactError, InputError
from lopd_store.hub import check_repository, hub_errors, tag_of
from lopd_store.reader import Artifact, open
from lopd_store.remembered import is_remembered
from lopd_store.sources import HubSource, Listed
from lopd_store.verifier import OnBytes, verify

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

_FIRST_BYTES, _STEP_BYTES = 16 << 20, 256 << 20  # sent before progress is told again; little at first, to begin early
_STEP_FILES = 256
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
    the verification of what this machine has neither built nor verified, `on_upload` (bytes sent, bytes to be sent).
    """
    from huggingface_hub import HfApi, get_token

    directory = Path(path)
    check_repository(repository)
    if get_token() is None:
        raise InputError("no Hub token", hint="log in with `hf auth login`, or set HF_TOKEN")
    artifact = open(directory)
    if not artifact.view.is_whole(artifact.manifest):
        raise InputError(f"`{directory}` is a partial copy", hint="push the whole artifact; who pulls may take a part")
    verify(directory, quick=True).require_ok()  # what is damaged is refused before the Hub hears of it
    api, tag = HfApi(), tag_of(artifact.fingerprint)
    branch = _Branch(api=api, repository=repository)
    with hub_errors(repository), _without_bars():
        if create_pr:
            request = _pull_request(api, repository, f"Add {tag}")
            _send(replace(branch, name=request.git_reference), artifact, on_bytes, on_upload)
            if request.status == "draft":
                api.change_discussion_status(repository, request.num, "open", repo_type="dataset")
            return Pushed(repository=repository, fingerprint=artifact.fingerprint, tag=None, url=request.url)
        url = api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
        commit = _send(branch, artifact, on_bytes, on_upload)
        _tag(api, repository, tag, commit, signed=(directory / layout.SIGNATURES).is_file())
    return Pushed(repository=repository, fingerprint=artifact.fingerprint, tag=tag, url=f"{url}/tree/{tag}")


@dataclass(frozen=True, kw_only=True)
class _Branch:
    """A branch of a repository, to be written to."""

    api: HfApi
    repository: str
    name: str | None = None  # the main branch

    def upload(self, files: Sequence[CommitOperationAdd]) -> None:
        """Send the bytes of files, where they are not there already; a later commit makes them seen."""
        self.api.preupload_lfs_files(self.repository, files, repo_type="dataset", revision=self.name, free_memory=False)

    def commit(self, operations: Sequence[CommitOperationAdd | CommitOperationDelete], title: str, parent: str) -> str:
        """Change it all at once, and return the commit; raises where the branch is not at this parent any more."""
        return self.api.create_commit(
            self.repository,
            operations,
            repo_type="dataset",
            commit_message=title,
            revision=self.name,
            parent_commit=parent,
        ).oid


def _send(branch: _Branch, artifact: Artifact, on_bytes: OnBytes | None, on_upload: OnBytes | None) -> str:
    """Verify the artifact, make the branch hold it, and return the commit; raises where somebody else changes it."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    head = HubSource(repository=branch.repository, revision=branch.name)
    there, parent = head.listing(), head.commit
    wanted = {
        layout.part_file(number, kind): digests
        for number, part in enumerate(artifact.manifest.parts)
        for kind, digests in part.files.items()
    }
    missing = {
        path: digests for path, digests in wanted.items() if path not in there or there[path].sha256 != digests.sha256
    }
    parts = _upload_parts(branch, artifact, missing, on_bytes, on_upload)
    documents = _documents(artifact, head, there)
    changed = {path: data for path, data in documents.items() if not _is_there(there.get(path), data)}
    beside = {layout.BUILD_RECORD, layout.SIGNATURES, *layout.ALL_PLOTS} - documents.keys()
    of_another = beside if layout.MANIFEST in changed else set()
    stale = sorted(
        path for path in there if path in of_another or (path.startswith(f"{layout.PARTS}/") and path not in wanted)
    )
    takes_several = len(parts) > _FILES_PER_COMMIT
    if takes_several and layout.MANIFEST in there:
        stale.insert(0, layout.MANIFEST)
        changed[layout.MANIFEST] = artifact.manifest_bytes
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        *(CommitOperationDelete(path) for path in stale),
        *parts,
        *(CommitOperationAdd(path, data) for path, data in changed.items()),
    ]
    step = _FILES_PER_COMMIT if takes_several else max(len(operations), 1)
    for start in range(0, len(operations), step):
        parent = branch.commit(operations[start : start + step], f"Add {tag_of(artifact.fingerprint)}", parent)
    return parent


def _upload_parts(
    branch: _Branch,
    artifact: Artifact,
    missing: Mapping[str, FileDigests],
    on_bytes: OnBytes | None,
    on_upload: OnBytes | None,
) -> list[CommitOperationAdd]:
    """Verify the artifact, and send these files of it beside that, each once its part is found right."""
    from huggingface_hub import CommitOperationAdd

    uploaded: list[CommitOperationAdd] = []
    waiting: list[str] = []
    sent, total, step = 0, sum(digests.size for digests in missing.values()), _FIRST_BYTES

    def take(number: int) -> None:
        waiting.extend(path for kind in layout.FILE_KINDS if (path := layout.part_file(number, kind)) in missing)
        if sum(missing[path].size for path in waiting) >= step or len(waiting) >= _STEP_FILES:
            send()

    def send() -> None:
        nonlocal sent, step
        additions = [CommitOperationAdd(path, artifact.path / path) for path in waiting]
        branch.upload(additions)
        for addition in additions:
            path, found = addition.path_in_repo, f"sha256:{addition.upload_info.sha256.hex()}"
            if found != missing[path].sha256:
                raise _changed(path, missing[path].sha256, found, code="A022")
        uploaded.extend(additions)
        sent += sum(missing[path].size for path in waiting)
        waiting.clear()
        step = min(2 * step, _STEP_BYTES)
        if on_upload is not None:
            on_upload(sent, total)

    if on_upload is not None and missing:
        on_upload(0, total)
    if is_remembered(artifact.fingerprint, artifact.view):  # then `send`, which compares digests, is all there is to do
        for number in artifact.view.parts:
            take(number)
    else:
        report = verify(artifact.path, on_bytes=on_bytes, on_part=take)
        report.require_ok()
        if report.fingerprint != artifact.fingerprint:  # then it was another one that is right
            raise _changed(layout.MANIFEST, artifact.fingerprint, report.fingerprint)
    if waiting:
        send()
    return uploaded


def _changed(name: str, expected: str, actual: str | None, code: str | None = None) -> ArtifactError:
    return ArtifactError(f"`{name}` changed while it was pushed", code=code, expected=expected, actual=actual)


def _documents(artifact: Artifact, head: HubSource, there: Mapping[str, Listed]) -> dict[str, bytes]:
    """The files beside the parts: as they are here, but for the card, which people may have edited here or there."""
    names = layout.documents(artifact.path)
    documents = {name: (artifact.path / name).read_bytes() for name in names if name != layout.CARD}
    generated = render_card(artifact.manifest, artifact.fingerprint, plots=names)
    edited = (artifact.path / layout.CARD).read_text(encoding="utf-8") if layout.CARD in names else generated
    if merge_card(generated, edited) == generated and layout.CARD in there:  # nobody wrote into it here
        found = head.read(layout.CARD, _MAX_CARD_BYTES) or b""
        edited = found.decode(errors="replace")
    text = merge_card(generated, edited).replace(UNNAMED, head.repository)
    return {**documents, layout.CARD: text.encode(), layout.MANIFEST: artifact.manifest_bytes}


def _is_there(listed: Listed | None, data: bytes) -> bool:
    """Whether the repository has these bytes already, in git or in LFS."""
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    return listed is not None and (listed.blob == blob or listed.sha256 == f"sha256:{hashlib.sha256(data).hexdigest()}")


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
