"""Pulling: an artifact, or a part of one, by name, from the Hub or an object store; no byte of it taken on trust.

    pull("acme/dapo-17k-qwen3-8b", output="artifact", fingerprint="sha256:…")
    pull("acme/dapo-17k-qwen3-8b@lopd-0123456789ab", only="sampled")        # into the cache
    pull("sha256:…")        # from wherever it is on the Hub

The manifest comes first; what the source says of its files is compared with it before any is downloaded, and the bytes
of each part as soon as they are there, beside the download of the next. What they say is checked where it is read, see
`Artifact.part`. Until all have the right digests they lie in `output.pulling`, where an interrupted pull goes on.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from lopd_store import layout, signatures, sources
from lopd_store.cache import cache_directory
from lopd_store.catalog import locate
from lopd_store.digest import is_digest
from lopd_store.durable import alone, sync_directory, write_durably
from lopd_store.errors import ArtifactError, InputError
from lopd_store.hub import tag_of
from lopd_store.listing import check_listing
from lopd_store.manifest import Manifest
from lopd_store.reader import Artifact, open, open_source
from lopd_store.subset import Only, choose, write_view
from lopd_store.verifier import OnBytes, verify
from lopd_store.view import View

_WORKERS = 4  # parts come one after the other then, rather than all at the end
_MAX_SMALL_BYTES = 16 << 20  # of a card or a plot, a build record, or signatures
_CLIENT_NOTES = ".cache"  # where the client of the Hub keeps what it knows of a download in progress
_SOURCE = f"{_CLIENT_NOTES}/lopd-source"


def pull(
    place: str,
    *,
    output: str | Path | None = None,
    fingerprint: str | None = None,
    revision: str | None = None,
    only: Only | None = None,
    parts: range | None = None,
    signed_by: str | Path | None = None,
    on_download: OnBytes | None = None,
    on_bytes: OnBytes | None = None,
) -> Artifact:
    """Download an artifact, compare every byte with its digest, and only then let it appear; returns it opened.

    It appears at `output`, or in the cache. `verify` looks at its values, and so does training when it reads them.

    `place` is OWNER/NAME, with `@REVISION` or not (a tag, a branch or a commit), a URL, or a fingerprint, for which a
    repository is looked up. Given a fingerprint beside a place, its tag is fetched and any other artifact refused;
    given a public key or its file as `signed_by`, likewise one that the key has not signed; both before a part is
    downloaded. `only="sampled"` leaves out top-k and tables, `parts` all other parts; the copy says so, and verifies
    by itself. `on_download` and `on_bytes` hear (bytes so far, bytes in all) of the download and of the comparison.
    """
    if is_digest(place):
        if fingerprint not in (None, place):
            raise InputError("two artifacts are asked for", actual=f"{place} and {fingerprint}"[:200])
        place, fingerprint = locate(place), place
    if fingerprint is not None and not is_digest(fingerprint):
        raise InputError("`fingerprint` is not one", expected="sha256:<64 lowercase hex>", actual=fingerprint[:100])
    if output is not None and Path(output).exists():
        raise InputError(f"`{output}` exists", hint="choose another `--output`, or move it away")
    signer = None if signed_by is None else signatures.read_public_key(signed_by)
    source = sources.find(place)
    if fingerprint is not None and revision is None and source.revision is None and not _is_other_url(place):
        revision = tag_of(fingerprint)
    if revision is not None:
        source = sources.find(place, revision)
    with _saying_where(place):
        remote = open_source(source, fingerprint=fingerprint)
        view = choose(remote.view, only, parts)
        signed = source.read(layout.SIGNATURES, _MAX_SMALL_BYTES)
        if signer is not None:
            signatures.require(() if signed is None else signatures.parse(signed), remote.fingerprint, signer)
        target = _place_in_cache(remote, view) if output is None else Path(output)
        if output is None and target.exists():
            return open(target)
        pulling = target.with_name(target.name + layout.PULLING_SUFFIX)
        with alone(pulling):
            if not target.exists():
                _start_or_resume(pulling, f"{source.state} {view.to_json(remote.fingerprint)}")
                _pull(source, remote, view, signed, pulling, on_download, on_bytes)
                pulling.rename(target)
                sync_directory(target.parent)
            elif output is not None:  # another pull has just made it
                raise InputError(f"`{output}` exists", hint="choose another `--output`, or move it away")
    return open(target)


def _pull(
    source: sources.Source,
    remote: Artifact,
    view: View,
    signed: bytes | None,
    pulling: Path,
    on_download: OnBytes | None,
    on_bytes: OnBytes | None,
) -> None:
    """Make the directory of the pull in progress hold this view of the artifact, every byte compared."""
    with _removing_what_is_wrong(pulling):
        write_durably(pulling / layout.MANIFEST, remote.manifest_bytes)
        if signed is not None:
            write_durably(pulling / layout.SIGNATURES, signed)
        if not view.is_whole(remote.manifest):
            write_view(pulling, view, remote.fingerprint)
        with _downloads(source, remote.manifest, view, pulling, on_download) as arriving:
            verify(pulling, values=False, on_bytes=on_bytes, arriving=arriving).require_ok()
    shutil.rmtree(pulling / _CLIENT_NOTES)


@contextmanager
def _downloads(
    source: sources.Source, manifest: Manifest, view: View, pulling: Path, on_download: OnBytes | None
) -> Iterator[Iterator[int]]:
    """Download the files of the view side by side, but for those that are there from last time.

    Gives the numbers of its parts, each once its files are there; at the end everything is.
    """
    listed = source.listing()
    for found in check_listing(manifest, view, listed):
        raise found.to_error()
    small = [name for name in (layout.BUILD_RECORD, layout.CARD, *layout.ALL_PLOTS) if name in listed]
    for name in small:
        if listed[name].size > _MAX_SMALL_BYTES:
            raise ArtifactError(f"`{name}` is too large", expected=f"at most {_MAX_SMALL_BYTES} bytes")
    sizes = {name: listed[name].size for name in (*small, *view.files())}
    missing = [name for name in sizes if not _is_there(pulling / name, sizes[name])]
    total = sum(sizes.values())
    counter = _Counter(total - sum(sizes[name] for name in missing), total, on_download)
    with ThreadPoolExecutor(max_workers=_WORKERS) as pool:
        try:
            coming = {name: pool.submit(source.fetch, name, pulling, counter.add) for name in missing}
            yield _arriving(view, coming)
            for future in coming.values():
                future.result()
        except BaseException:
            counter.stopped = True
            pool.shutdown(cancel_futures=True)
            raise


def _arriving(view: View, coming: Mapping[str, Future[None]]) -> Iterator[int]:
    """The numbers of the parts, each once nothing of it is still coming."""
    for number in view.parts:
        for kind in view.kinds:
            if (future := coming.get(layout.part_file(number, kind))) is not None:
                future.result()
        yield number


class _Stopped(BaseException):
    """Ends a download in its thread; no Exception, which a client would take for trouble on the line."""


class _Counter:
    """Adds up bytes from several threads, and ends those once it is stopped."""

    def __init__(self, done: int, total: int, on_download: OnBytes | None) -> None:
        self.stopped = False
        self._done, self._total, self._on_download, self._lock = done, total, on_download, threading.Lock()
        self.add(0)

    def add(self, count: int) -> None:
        if self.stopped:
            raise _Stopped
        with self._lock:
            self._done = min(self._done + count, self._total)  # what is tried again comes twice
            if self._on_download is not None:
                self._on_download(self._done, self._total)


def _is_there(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _place_in_cache(remote: Artifact, view: View) -> Path:
    """Where this view of an artifact is kept for whoever pulls it next."""
    directory = cache_directory() / "artifacts"
    directory.mkdir(parents=True, exist_ok=True)
    name = remote.fingerprint.removeprefix("sha256:")
    if view.is_whole(remote.manifest):
        return directory / name
    return directory / f"{name}.{'-'.join(view.kinds)}.{view.parts.start}-{view.parts.stop}"


def _is_other_url(place: str) -> bool:
    return sources.is_url(place) and not place.startswith("hf:")


def _start_or_resume(pulling: Path, source: str) -> None:
    """Make the directory of the pull in progress; what another pull has left there is removed."""
    note = pulling / _SOURCE
    if note.is_file() and note.read_text(encoding="utf-8") != source:
        shutil.rmtree(pulling)
    elif pulling.exists() and not note.is_file():
        raise InputError(f"`{pulling}` exists, and is no pull in progress", hint="move it away")
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(source, encoding="utf-8")


@contextmanager
def _removing_what_is_wrong(pulling: Path) -> Iterator[None]:
    """Let the next pull start clean when what came is wrong."""
    try:
        yield
    except ArtifactError:
        shutil.rmtree(pulling, ignore_errors=True)
        raise


@contextmanager
def _saying_where(place: str) -> Iterator[None]:
    """Say whose artifact is wrong."""
    try:
        yield
    except ArtifactError as error:
        error.hint = error.hint or f"this is what `{place}` holds: ask its owner, or pull another `--revision`"
        raise
