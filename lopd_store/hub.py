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
from pathlib import Path
from typing import Any

from lopd_store import layout
from lopd_store.card import tag_of
from lopd_store.digest import is_digest
from lopd_store.errors import ArtifactError, InputError, UnavailableError
from lopd_store.reader import Artifact, open
from lopd_store.verifier import verify

_REPOSITORY = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_PULLED = [layout.MANIFEST, layout.BUILD_RECORD, layout.CARD, f"{layout.PARTS}/*"]


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

    Pushing the same artifact again sends only what is missing. `on_bytes` hears the verification.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    directory = Path(path)
    _check_repository(repository)
    artifact = open(directory)
    verify(directory, on_bytes=on_bytes).require_ok()
    tag = tag_of(artifact.fingerprint)
    api = HfApi()
    with _hub_errors(repository):
        url = api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            repo_type="dataset",
            folder_path=directory,
            allow_patterns=[f"{layout.PARTS}/*"],
            commit_message=f"Add the parts of {tag}",
        )
        names = [layout.BUILD_RECORD, layout.CARD, layout.MANIFEST]
        commit = api.create_commit(
            repository,
            repo_type="dataset",
            operations=[
                CommitOperationAdd(path_in_repo=name, path_or_fileobj=directory / name)
                for name in names
                if (directory / name).is_file()
            ],
            commit_message=f"Add the manifest of {tag}",
        )
        api.create_tag(repository, repo_type="dataset", tag=tag, revision=commit.oid, exist_ok=True)
    return Pushed(repository=repository, tag=tag, fingerprint=artifact.fingerprint, url=str(url))


def pull(
    repository: str,
    *,
    output: str | Path,
    fingerprint: str | None = None,
    revision: str | None = None,
    on_bytes: Callable[[int, int], None] | None = None,
) -> Artifact:
    """Download an artifact, verify it, and only then let it appear at `output`.

    Given a fingerprint, its tag is fetched and any other artifact refused.
    """
    from huggingface_hub import snapshot_download

    output = Path(output)
    _check_repository(repository)
    if output.exists():
        raise InputError(f"`{output}` exists", hint="choose another `--output`, or move it away")
    if fingerprint is not None and not is_digest(fingerprint):
        raise InputError("`fingerprint` is not one", expected="sha256:<64 lowercase hex>", actual=fingerprint[:100])
    if fingerprint is not None and revision is None:
        revision = tag_of(fingerprint)
    pulling = output.with_name(output.name + ".pulling")
    with _hub_errors(repository):
        snapshot_download(repository, repo_type="dataset", revision=revision, local_dir=pulling, allow_patterns=_PULLED)
    shutil.rmtree(pulling / ".cache", ignore_errors=True)
    report = verify(pulling, on_bytes=on_bytes)
    if fingerprint is not None and report.fingerprint != fingerprint:
        raise ArtifactError(
            f"`{repository}` holds another artifact",
            expected=fingerprint,
            actual=report.fingerprint or "no manifest",
            hint="ask its owner which fingerprint is meant",
        )
    try:
        report.require_ok()
    except ArtifactError:
        shutil.rmtree(pulling)  # what came is wrong; the next pull starts clean
        raise
    pulling.rename(output)
    return open(output)


def _check_repository(repository: str) -> None:
    if not _REPOSITORY.fullmatch(repository):
        raise InputError("not the name of a repository", expected="OWNER/NAME", actual=repository[:200])


@contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    """Say what to do about the Hub's refusals."""
    import httpx2
    from huggingface_hub import errors

    try:
        yield
    except errors.RevisionNotFoundError as error:
        raise InputError(
            f"`{repository}` has no such revision",
            actual=_first_line(error),
            hint="is the fingerprint of this repository?",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"no dataset repository `{repository}` on the Hub, or it is private",
            hint="check the name, or log in with `hf auth login`",
        ) from error
    except errors.LocalTokenNotFoundError as error:
        raise InputError("no Hub token", hint="log in with `hf auth login`, or set HF_TOKEN") from error
    except errors.HfHubHTTPError as error:
        status: Any = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise InputError(
                f"the Hub refused access to `{repository}`",
                actual=_first_line(error),
                hint="log in with `hf auth login`, or set HF_TOKEN to a token that may write there",
            ) from error
        raise UnavailableError(f"the Hub did not do it: {_first_line(error)}", hint="try again") from error
    except (httpx2.HTTPError, errors.OfflineModeIsEnabled, ConnectionError) as error:
        raise UnavailableError(f"the Hub could not be reached: {_first_line(error)}", hint="try again") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
