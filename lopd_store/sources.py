"""Sources: where an artifact that is not on this machine can be read, file by file.

    source = find("hf://acme/dapo-17k-qwen3-8b@lopd-0123456789ab")     # or s3://bucket/artifact
    source.read("manifest.json", limit)
    source.fetch("parts/00000.tokens.zarr.zip", directory)

A repository of the Hub is read at one commit, found once, so that what moves there meanwhile is not seen. Every
other URL goes through fsspec. Nothing here is trusted: whoever fetches compares digests.
"""

from __future__ import annotations

import itertools
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from lopd_store import layout
from lopd_store.errors import ArtifactError, InputError, LopdError, UnavailableError
from lopd_store.hub import check_repository, hub_errors

OnCount = Callable[[int], None]  # hears how many bytes more have come
# A pathlib.Path makes one slash of two; a drive of Windows has one letter.
_URL = re.compile(r"([a-z][a-z0-9+.-]+):/{1,2}(.+)", re.DOTALL)
_MAX_FILES = 2 * layout.MAX_PARTS * len(layout.FILE_KINDS)  # of a listing; of others nothing is known
_PAUSES = (2.0, 8.0)  # seconds before another try, where a source did not answer


@dataclass(frozen=True, kw_only=True)
class Listed:
    """What a source says of a file, before any of it is read."""

    size: int
    sha256: str | None  # None where it does not say
    blob: str | None = None  # of a repository: the id that git gives it


class Source(Protocol):
    """A place to read from. All paths are relative to the artifact."""

    @property
    def name(self) -> str:
        """The URL, for people."""

    @property
    def revision(self) -> str | None:
        """The revision that was asked for, where there was one."""

    @property
    def state(self) -> str:
        """What names these very bytes: two halves of two states are never put together."""

    def listing(self) -> dict[str, Listed]:
        """Every file with what the source says of it."""

    def read(self, path: str, limit: int) -> bytes | None:
        """The bytes of a small file; None where there is none. Refuses one of more than `limit` bytes."""

    def fetch(self, path: str, directory: Path, on_count: OnCount | None = None) -> None:
        """Download a file to its path below a directory."""


def is_url(place: str | Path) -> bool:
    """Whether this is a URL and no directory."""
    return _URL.fullmatch(str(place)) is not None


def find(place: str | Path, revision: str | None = None) -> Source:
    """The source that a URL or OWNER/NAME names, at its own revision or this one. A revision in it goes after `@`."""
    url = _URL.fullmatch(str(place))
    scheme, rest = (url[1], url[2]) if url else ("hf", str(place))
    if scheme != "hf":
        if revision is not None:
            raise InputError(f"`{scheme}://` has no revisions", actual=revision[:100])
        return FileSystemSource(name=f"{scheme}://{rest.rstrip('/')}")
    repository, at, own = rest.rstrip("/").removeprefix("datasets/").partition("@")
    if at and revision not in (None, own):
        raise InputError("two revisions are asked for", actual=f"{own} and {revision}"[:200])
    check_repository(repository)
    return HubSource(repository=repository, revision=own if at else revision)


@dataclass(frozen=True, kw_only=True)
class HubSource:
    """A dataset repository of the Hub, at one commit."""

    repository: str
    revision: str | None = None

    @property
    def name(self) -> str:
        """`hf://OWNER/NAME@REVISION`."""
        return f"hf://{self.repository}" + (f"@{self.revision}" if self.revision else "")

    @property
    def state(self) -> str:
        """The repository at its commit."""
        return f"{self.repository}@{self.commit}"

    @cached_property
    def commit(self) -> str:
        """The commit that the revision named when it was first asked for."""
        from huggingface_hub import HfApi

        with hub_errors(self.repository, self.revision):
            sha = HfApi().dataset_info(self.repository, revision=self.revision, expand=["sha"]).sha
            if sha is None:
                raise RuntimeError("no commit")
            return sha

    def listing(self) -> dict[str, Listed]:
        """Every file; those in LFS have a digest."""
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        with hub_errors(self.repository, self.revision):
            entries = HfApi().list_repo_tree(self.repository, repo_type="dataset", revision=self.commit, recursive=True)
            return {
                entry.path: Listed(
                    size=entry.size, sha256=f"sha256:{entry.lfs.sha256}" if entry.lfs else None, blob=entry.blob_id
                )
                for entry in itertools.islice(entries, _MAX_FILES)
                if isinstance(entry, RepoFile)
            }

    def read(self, path: str, limit: int) -> bytes | None:
        """The bytes of a small file at the commit."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import RemoteEntryNotFoundError

        with hub_errors(self.repository, self.revision):
            url = hf_hub_url(self.repository, path, repo_type="dataset", revision=self.commit)
            try:
                size = get_hf_file_metadata(url, retry_on_errors=True).size
            except RemoteEntryNotFoundError:
                return None
        _require_small(path, size, limit)
        with tempfile.TemporaryDirectory(prefix="lopd-") as scratch:
            self._download(path, Path(scratch), None)
            return (Path(scratch) / path).read_bytes()

    def fetch(self, path: str, directory: Path, on_count: OnCount | None = None) -> None:
        """Download a file at the commit; the client goes on with one that it has a part of."""
        _persistently(lambda: self._download(path, directory, on_count))

    def _download(self, path: str, directory: Path, on_count: OnCount | None) -> None:
        from huggingface_hub import hf_hub_download

        with hub_errors(self.repository, self.revision):
            hf_hub_download(
                self.repository,
                path,
                repo_type="dataset",
                revision=self.commit,
                local_dir=directory,
                tqdm_class=_bar(on_count),
            )


@dataclass(frozen=True, kw_only=True)
class FileSystemSource:
    """A directory that fsspec can read: s3://, gs://, https://, …"""

    name: str
    revision: None = None

    @property
    def state(self) -> str:
        """The URL: an object store keeps no history."""
        return self.name

    def listing(self) -> dict[str, Listed]:
        """Every file of the artifact and its parts; nothing has a digest."""
        with _file_system_errors(self.name):
            file_system, root = self._opened
            found = file_system.find(root, detail=True)
            return {
                path.removeprefix(root).lstrip("/"): Listed(size=int(entry["size"]), sha256=None)
                for path, entry in found.items()
                if entry["type"] == "file"
            }

    def read(self, path: str, limit: int) -> bytes | None:
        """The bytes of a small file."""
        with _file_system_errors(self.name):
            file_system, root = self._opened
            try:
                size = int(file_system.info(f"{root}/{path}")["size"])
            except FileNotFoundError:
                return None
            _require_small(path, size, limit)
            return bytes(file_system.cat_file(f"{root}/{path}"))

    def fetch(self, path: str, directory: Path, on_count: OnCount | None = None) -> None:
        """Download a file; under its own name it is whole."""
        from fsspec.callbacks import TqdmCallback

        target = directory / path
        unfinished = target.with_name(target.name + ".unfinished")
        target.parent.mkdir(parents=True, exist_ok=True)

        def download() -> None:
            with _file_system_errors(self.name):
                file_system, root = self._opened
                file_system.get_file(f"{root}/{path}", str(unfinished), callback=TqdmCallback(tqdm_cls=_bar(on_count)))

        _persistently(download)
        unfinished.replace(target)

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        import fsspec

        file_system, root = fsspec.core.url_to_fs(self.name, use_listings_cache=False)
        return file_system, str(root).rstrip("/")


def _require_small(path: str, size: int | None, limit: int) -> None:
    if size is None or size > limit:
        raise ArtifactError(f"`{path}` is too large to read", expected=f"at most {limit} bytes", actual=f"{size} bytes")


def _persistently(work: Callable[[], None]) -> None:
    """Try again a few times where a source did not answer: a training run should outlive a moment of silence."""
    for pause in _PAUSES:
        try:
            return work()
        except UnavailableError:
            time.sleep(pause)
    return work()


def _bar(on_count: OnCount | None) -> Any:
    """What huggingface_hub and fsspec take for a progress bar: it hears bytes, and shows nothing."""

    class Bar:
        def __init__(self, *_: object, initial: int = 0, **__: object) -> None:
            self.n = 0
            self.update(initial)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, count: float | None = 1) -> None:
            if on_count is not None and count:
                on_count(int(count))

        def _ignore(self, *_: object, **__: object) -> None:
            pass

        close = refresh = reset = set_description = set_description_str = set_postfix_str = _ignore

    return Bar


@contextmanager
def _file_system_errors(name: str) -> Iterator[None]:
    """Say which URL could not be read."""
    try:
        yield
    except FileNotFoundError as error:
        raise ArtifactError(f"`{name}` is not there, or not whole", actual=str(error)[:300]) from error
    except ImportError as error:
        raise InputError(f"`{name}` needs a package more", actual=str(error)[:300]) from error
    except PermissionError as error:
        raise InputError(f"no access to `{name}`", actual=str(error)[:300]) from error
    except ValueError as error:  # a protocol that fsspec does not know
        raise InputError(f"`{name}` is no URL that can be read", actual=str(error)[:300]) from error
    except LopdError:
        raise
    except Exception as error:  # each library below fsspec has errors of its own
        raise UnavailableError(f"`{name}` did not answer as it should: {error}", hint="try again") from error
