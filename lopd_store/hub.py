"""The Hugging Face Hub: push an artifact, pull it by name, nothing taken on trust.

    push("artifact", "acme/dapo-17k-qwen3-8b")
    pull("acme/dapo-17k-qwen3-8b", output="artifact", fingerprint="sha256:…")

A push sends parts first, then manifest and card, then the tag, so a half-done push never looks like an artifact. A
pull verifies before the output appears. Tokens come from huggingface_hub's own places.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lopd_store import layout, signatures
from lopd_store.card import UNNAMED, tag_of
from lopd_store.digest import is_digest
from lopd_store.durable import sync_directory
from lopd_store.errors import ArtifactError, InputError, UnavailableError
from lopd_store.reader import Artifact, open
from lopd_store.verifier import verify

_REPOSITORY = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
# A repository may hold more, and paths that climb; nothing else is downloaded.
_PART_FILES = [layout.part_file(0, kind).replace("00000", "[0-9]" * 5) for kind in layout.FILE_KINDS]
_PULLED = [layout.MANIFEST, layout.BUILD_RECORD, layout.CARD, layout.SIGNATURES, *_PART_FILES]
_CLIENT_NOTES = ".cache"  # where the client keeps what it knows of a download in progress
_SOURCE = f"{_CLIENT_NOTES}/lopd-source"


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """Where a push went."""

    repository: str
    tag: str
    fingerprint: str
    url: str


def push(
    path: str | Path,
    repository: str,
    *,
    private: bool = False,
    on_bytes: Callable[[int, int], None] | None = None,
) -> Pushed:
    """Verify an artifact and push it to a dataset repository, which is made where it does not exist.

    Pushing the same artifact again sends only what is missing; parts of another artifact leave the branch and stay
    under their own tag. `on_bytes` hears the verification.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    directory = Path(path)
    _check_repository(repository)
    if get_token() is None:
        raise InputError("no Hub token", hint="log in with `hf auth login`, or set HF_TOKEN")
    artifact = open(directory)
    if not artifact.view.is_whole(artifact.manifest):
        raise InputError(f"`{directory}` is a partial copy", hint="push the whole artifact; who pulls may take a part")
    verify(directory, on_bytes=on_bytes).require_ok()
    tag = tag_of(artifact.fingerprint)
    api = HfApi()
    with _hub_errors(repository):
        url = api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            repo_type="dataset",
            folder_path=directory,
            allow_patterns=f"{layout.PARTS}/*",
            delete_patterns=f"{layout.PARTS}/*",  # of those that are not uploaded
            commit_message=f"Add the parts of {tag}",
        )
        commit = api.create_commit(
            repository,
            repo_type="dataset",
            operations=[
                CommitOperationAdd(path_in_repo=name, path_or_fileobj=_content(directory / name, repository))
                for name in (layout.BUILD_RECORD, layout.CARD, layout.SIGNATURES, layout.MANIFEST)
                if (directory / name).is_file() and not (directory / name).is_symlink()
            ],
            commit_message=f"Add the manifest of {tag}",
        )
        api.create_tag(repository, repo_type="dataset", tag=tag, revision=commit.oid, exist_ok=True)
        signed = (directory / layout.SIGNATURES).is_file()
        if signed and api.dataset_info(repository, revision=tag).sha != commit.oid:
            # Pushed before, and signed since: the tag moves to where the same artifact has its signatures.
            api.delete_tag(repository, repo_type="dataset", tag=tag)
            api.create_tag(repository, repo_type="dataset", tag=tag, revision=commit.oid)
    return Pushed(repository=repository, tag=tag, fingerprint=artifact.fingerprint, url=f"{url}/tree/{tag}")


def pull(
    repository: str,
    *,
    output: str | Path,
    fingerprint: str | None = None,
    revision: str | None = None,
    signed_by: str | Path | None = None,
    on_bytes: Callable[[int, int], None] | None = None,
) -> Artifact:
    """Download an artifact, verify it, and only then let it appear at `output`.

    Given a fingerprint, its tag is fetched and any other artifact refused, before its parts are downloaded; given a
    public key or its file as `signed_by`, likewise one that the key has not signed. Until the artifact is verified it
    lies in `output.pulling`, where an interrupted pull goes on. `on_bytes` hears the verification.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    output = Path(output)
    _check_repository(repository)
    if output.exists():
        raise InputError(f"`{output}` exists", hint="choose another `--output`, or move it away")
    if fingerprint is not None and not is_digest(fingerprint):
        raise InputError("`fingerprint` is not one", expected="sha256:<64 lowercase hex>", actual=fingerprint[:100])
    if fingerprint is not None and revision is None:
        revision = tag_of(fingerprint)
    signer = None if signed_by is None else signatures.read_public_key(signed_by)
    pulling = output.with_name(output.name + layout.PULLING_SUFFIX)
    with _removing_what_is_wrong(pulling, repository):
        with _hub_errors(repository, revision):
            commit = HfApi().dataset_info(repository, revision=revision).sha
            _start_or_resume(pulling, source=f"{repository}@{commit}")
            hf_hub_download(repository, layout.MANIFEST, repo_type="dataset", revision=commit, local_dir=pulling)
            found = _check_fingerprint(pulling, repository, fingerprint)
            fetch = partial(snapshot_download, repository, repo_type="dataset", revision=commit, local_dir=pulling)
            if signer is not None:
                fetch(allow_patterns=layout.SIGNATURES)
                signatures.require(signatures.read(pulling), found, signer)
            fetch(allow_patterns=_PULLED)
        verify(pulling, signed_by=signer, on_bytes=on_bytes).require_ok()
    shutil.rmtree(pulling / _CLIENT_NOTES)
    pulling.rename(output)
    sync_directory(output.parent)
    return open(output)


def _content(path: Path, repository: str) -> bytes:
    """The bytes of a file, with the repository's own name in the commands of the card."""
    data = path.read_bytes()
    return data.replace(UNNAMED.encode(), repository.encode()) if path.name == layout.CARD else data


def _start_or_resume(pulling: Path, *, source: str) -> None:
    """Make the directory of the pull in progress; what another pull has left there is removed."""
    note = pulling / _SOURCE
    if note.is_file() and note.read_text(encoding="utf-8") != source:
        shutil.rmtree(pulling)
    elif pulling.exists() and not note.is_file():
        raise InputError(f"`{pulling}` exists, and is no pull in progress", hint="move it away")
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(source, encoding="utf-8")


def _check_fingerprint(pulling: Path, repository: str, fingerprint: str | None) -> str:
    """The fingerprint; refuses what is no artifact, and any other than the one that is wanted."""
    actual = open(pulling).fingerprint
    if fingerprint not in (None, actual):
        raise ArtifactError(f"`{repository}` holds another artifact", expected=fingerprint, actual=actual)
    return actual


@contextmanager
def _removing_what_is_wrong(pulling: Path, repository: str) -> Iterator[None]:
    """Let the next pull start clean when what came is wrong."""
    try:
        yield
    except ArtifactError as error:
        shutil.rmtree(pulling, ignore_errors=True)
        error.hint = error.hint or f"this is what `{repository}` holds: ask its owner, or pull another `--revision`"
        raise


def _check_repository(repository: str) -> None:
    if not _REPOSITORY.fullmatch(repository):
        raise InputError("not the name of a repository", expected="OWNER/NAME", actual=repository[:200])


@contextmanager
def _hub_errors(repository: str, revision: str | None = None) -> Iterator[None]:
    """Say what to do about the Hub's refusals."""
    import httpx2
    from huggingface_hub import errors

    try:
        yield
    except errors.RevisionNotFoundError as error:
        raise InputError(
            f"`{repository}` has no revision `{revision}`",
            hint="an artifact is tagged `lopd-` and the first 12 digits of its fingerprint; was it pushed there?",
        ) from error
    except errors.RemoteEntryNotFoundError as error:
        raise ArtifactError(
            f"`{repository}` is not an artifact", expected=f"`{layout.MANIFEST}`", actual="no such file"
        ) from error
    except errors.GatedRepoError as error:
        raise InputError(f"`{repository}` is gated", hint="ask for access on its page on the Hub") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"no dataset repository `{repository}` on the Hub, or it is private",
            hint="check the name, or log in with `hf auth login`",
        ) from error
    except errors.HFValidationError as error:
        raise InputError("not the name of a repository", actual=_first_line(error)) from error
    except errors.HfHubHTTPError as error:
        status: Any = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise InputError(
                f"the Hub refused access to `{repository}`",
                actual=_first_line(error),
                hint="log in with `hf auth login`, or set HF_TOKEN to a token that may write there",
            ) from error
        raise _unavailable(error) from error
    except (httpx2.HTTPError, OSError) as error:
        if getattr(error, "errno", None) is not None and not isinstance(error, ConnectionError):
            raise  # the disk's error, not the Hub's
        raise _unavailable(error.__cause__ or error) from error
    except (RuntimeError, errors.XetDownloadError) as error:  # what the client makes of a transfer that failed
        raise _unavailable(error) from error


def _unavailable(error: BaseException) -> UnavailableError:
    return UnavailableError(f"the Hub did not answer as it should: {_first_line(error)}", hint="try again")


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
