"""Verification: everything an artifact claims, derived again from its bytes.

    report = verify("artifact")
    report.ok, report.findings

It trusts neither builder nor reader and never raises on bad data: whatever is wrong becomes a Finding with a code.
Checks stand in the order of spec/artifact.md; a file that is not what the manifest says is not judged further.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from lopd_store import gate, layout, reader, signatures, sources
from lopd_store import manifest as manifests
from lopd_store.checks import Finding, finding, finding_of
from lopd_store.contents import check_contents
from lopd_store.digest import digest_bytes
from lopd_store.errors import ArtifactError, InputError
from lopd_store.identity import ModelIdentity
from lopd_store.listing import check_listing
from lopd_store.manifest import Manifest
from lopd_store.remembered import remember
from lopd_store.statistic import SftAudit, Statistic, add_up
from lopd_store.view import View, read_view

if TYPE_CHECKING:
    from lopd_store.rescore import Rescored

OnBytes = Callable[[int, int], None]
_BLOCK = 256 << 10
_AUDIT_SLACK = 1e-4  # nats; sums are rounded, and processors differ in the last bits


@dataclass(frozen=True, kw_only=True)
class Report:
    """The outcome of a verification; `ok` where nothing was found."""

    fingerprint: str | None  # None where there is no readable manifest
    quick: bool
    values: bool  # whether they were looked at, and not only the bytes
    partial: bool  # whether this is a copy that says that it lacks files
    files: int
    bytes: int
    findings: tuple[Finding, ...]
    signed_by: str | None = None  # the key whose signature was asked for
    rescored: Rescored | None = None  # where rollouts were scored again
    sft_audit: SftAudit | None = None  # where the SFT data was audited again

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings

    def to_json(self) -> dict[str, Any]:
        """A JSON object; `ok` and `findings` as computed."""
        return {
            "ok": self.ok,
            "fingerprint": self.fingerprint,
            "quick": self.quick,
            "values": self.values,
            "partial": self.partial,
            "files": self.files,
            "bytes": self.bytes,
            "findings": [found.to_json() for found in self.findings],
            "signed_by": self.signed_by,
            "rescored": None if self.rescored is None else self.rescored.to_json(),
            "sft_audit": None if self.sft_audit is None else self.sft_audit.to_json(),
        }

    def require_ok(self) -> None:
        """Raise the first finding as an ArtifactError."""
        if self.findings:
            raise self.findings[0].to_error()


def verify(
    path: str | Path,
    *,
    quick: bool = False,
    values: bool = True,
    student: ModelIdentity | None = None,
    signed_by: str | Path | None = None,
    rescore: int = 0,
    teacher: str | Path | None = None,
    sft_data: str | Path | None = None,
    threads: int | None = None,
    on_bytes: OnBytes | None = None,
    on_rollouts: OnBytes | None = None,
    on_audited: OnBytes | None = None,
    arriving: Iterable[int] | None = None,
    on_part: Callable[[int], None] | None = None,
) -> Report:
    """Check an artifact: every byte, every structure, every value; `quick` checks sizes and xxh3 alone.

    Without `values`, every byte is compared with its digest, and what the bytes say is left to whoever reads them, see
    `Artifact.part`. That all values were right is remembered for `push`.

    Of one at a URL only a quick look can be had: sizes, and the sha256 that the Hub knows of its files, beside the
    manifest, without downloading a part.

    With a student, the gate's findings are reported too. With `signed_by`, a public key or its file, there must be a
    valid signature of the fingerprint by it. With `rescore` that many rollouts of an artifact that is right otherwise
    are scored again by the `teacher`, and with `sft_data` that file is audited under it again. Parts are checked side
    by side in as many threads, one per processor where None is said, and each holds one part in memory. `on_bytes`
    hears (bytes read, bytes in all), `on_rollouts` the same of rollouts scored again, `on_audited` of positions audited
    again. Raises InputError only where there is no directory to look at, or a build in progress.

    Where files are still coming, `arriving` gives the numbers of the parts in order, each once it is there; `on_part`
    hears those of the parts that are right, in order, up to the first that is not. Neither holds up the parts before.
    """
    if sources.is_url(path):
        if not quick or student is not None or signed_by is not None or rescore:
            raise InputError(
                f"`{path}` is not on this machine",
                hint="`--quick` compares what the Hub says of its files with the manifest; `lopd-store pull` gets and "
                "verifies every byte",
            )
        return _verify_listing(sources.find(path))
    directory = Path(path)
    if (bool(rescore) or sft_data is not None) != (teacher is not None):
        raise InputError(
            "`teacher` goes with `rescore` or `sft_data`, and they with it", hint="--rescore 8 --teacher MODEL"
        )
    if quick and signed_by is not None:  # who signs vouches for sha256, not for xxh3
        raise InputError("a quick verification does not reach as far as a signature", hint="leave out `--quick`")
    signer = None if signed_by is None else signatures.read_public_key(signed_by)
    file = directory / layout.MANIFEST
    if not directory.is_dir() or (directory.name.endswith(layout.BUILDING_SUFFIX) and not file.exists()):
        raise layout.no_artifact(directory)
    data = b""

    def report(*findings: Finding, view: View | None = None, manifest: Manifest | None = None) -> Report:
        entries = () if view is None or manifest is None else _entries(view, manifest)
        return Report(
            fingerprint=digest_bytes(data) if data else None,
            quick=quick,
            values=values and not quick,
            partial=view is not None and manifest is not None and not view.is_whole(manifest),
            files=len(entries) + bool(data),
            bytes=sum(size for _, size in entries) + len(data),
            findings=findings,
            signed_by=signer,
        )

    # A001: the manifest is there, a plain file.
    if file.is_symlink() or not file.is_file():
        return report(finding("A001", layout.MANIFEST, "there is no manifest, so this is no artifact"))
    data = manifests.read_bytes(file)
    try:
        # A010 to A019: it reads, it is whole, and it says what a manifest may say.
        manifest = manifests.parse(data)
    except ArtifactError as error:
        return report(finding_of(error, layout.MANIFEST, "A010"))
    try:
        # A003: a copy of a part of an artifact says which part.
        view = read_view(directory, manifest, digest_bytes(data))
    except ArtifactError as error:
        return report(finding_of(error, layout.VIEW, "A003"))
    if (directory / layout.PARTS).is_symlink():  # nothing outside of the directory is read
        return report(finding("A020", layout.PARTS, "a directory is a link"), view=view, manifest=manifest)
    progress = _Progress(sum(size for _, size in _entries(view, manifest)), on_bytes)

    audits: dict[int, Statistic] = {}

    def check(number: int) -> list[Finding]:
        contents: dict[str, memoryview] = {}
        wanted = None if quick else contents
        broken = [
            found for kind in view.kinds for found in _check_file(directory, number, kind, manifest, wanted, progress)
        ]
        # A part with a broken file is not judged further.
        return broken if quick or broken or not values else check_contents(number, contents, manifest, audits)

    findings: list[Finding] = []
    with ThreadPoolExecutor(max_workers=max(1, threads or min(os.cpu_count() or 1, len(view.parts)))) as pool:
        try:
            checked = [pool.submit(check, number) for number in arriving or view.parts]
            for number, future in zip(view.parts, checked, strict=True):
                findings += future.result()
                if on_part is not None and not findings:
                    on_part(number)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    findings = [*_check_directory(directory, view), *findings]
    if not findings and not quick and values:
        if view.has_topk and len(view.parts) == len(manifest.parts):
            for index in range(len(manifest.inputs)):
                findings += _check_audit(manifest, index, audits)
        if not findings:
            remember(digest_bytes(data), view)
    if student is not None:
        findings += _check_gate(manifest, student)
    if signer is not None:
        findings += _check_signature(directory, digest_bytes(data), signer)
    whole = report(*findings, view=view, manifest=manifest)
    if teacher is None or any(found.code != "A080" for found in findings):
        return whole
    from lopd_store import rescore as asking

    if rescore:
        again = asking.rescore(reader.open(directory), teacher=teacher, count=rescore, on_progress=on_rollouts)
        whole = replace(whole, rescored=again, findings=(*whole.findings, *again.findings))
    if sft_data is not None:
        audit, more = asking.audit_again(manifest, teacher=teacher, sft_data=sft_data, on_progress=on_audited)
        whole = replace(whole, sft_audit=audit, findings=(*whole.findings, *more))
    return whole


def _verify_listing(source: sources.Source) -> Report:
    """What the source says of its files, beside the manifest."""
    try:
        artifact = reader.open_source(source)
    except ArtifactError as error:
        found = finding_of(error, layout.MANIFEST, "A001")
        return Report(fingerprint=None, quick=True, values=False, partial=False, files=0, bytes=0, findings=(found,))
    entries = _entries(artifact.view, artifact.manifest)
    return Report(
        fingerprint=artifact.fingerprint,
        quick=True,
        values=False,
        partial=not artifact.view.is_whole(artifact.manifest),
        files=len(entries) + 1,
        bytes=sum(size for _, size in entries) + len(artifact.manifest_bytes),
        findings=tuple(check_listing(artifact.manifest, artifact.view, source.listing())),
    )


class _Progress:
    """Adds up bytes from several threads."""

    def __init__(self, total: int, on_bytes: OnBytes | None) -> None:
        self._read, self._total, self._on_bytes, self._lock = 0, total, on_bytes, threading.Lock()

    def add(self, count: int) -> None:
        if self._on_bytes is not None:
            with self._lock:
                self._read += count
                self._on_bytes(self._read, self._total)


def _entries(view: View, manifest: Manifest) -> list[tuple[str, int]]:
    """(path, size) of every file of the parts that the copy holds."""
    return [
        (layout.part_file(number, kind), manifest.parts[number].files[kind].size)
        for number in view.parts
        for kind in view.kinds
    ]


def _check_directory(directory: Path, view: View) -> Iterator[Finding]:
    """A002: parts/ holds the files of the manifest and nothing else."""
    parts = directory / layout.PARTS
    there = parts.iterdir() if parts.is_dir() else iter(())
    for extra in sorted({f"{layout.PARTS}/{file.name}" for file in there} - set(view.files())):
        name = extra.encode(errors="backslashreplace").decode()  # a name may be bytes that are no text
        yield finding("A002", name, "a file that the manifest does not list")


def _check_file(
    directory: Path,
    number: int,
    kind: str,
    manifest: Manifest,
    contents: dict[str, memoryview] | None,
    progress: _Progress,
) -> Iterator[Finding]:
    """A020 there and no link, A021 size, A022 sha256, A023 xxh3; puts what was read into `contents`."""
    where, entry = layout.part_file(number, kind), manifest.parts[number].files[kind]
    path = directory / where
    if path.is_symlink() or not path.is_file():
        yield finding("A020", where, "a file is missing or not a plain file")
        return
    size = path.stat().st_size
    if size != entry.size:
        yield finding("A021", where, "size differs", f"{entry.size} bytes", f"{size} bytes")
        return
    xxh3, sha256 = xxhash.xxh3_128(), hashlib.sha256()
    kept = np.empty(min(_BLOCK, size) if contents is None else size, np.uint8)
    data, at = kept.data, 0
    with path.open("rb", buffering=0) as file:
        while at < size:
            block = data[: size - at] if contents is None else data[at : at + _BLOCK]
            count = file.readinto(block)
            if not count:
                break
            xxh3.update(block[:count])
            if contents is not None:
                sha256.update(block[:count])
            at += count
            progress.add(count)
    found = f"sha256:{sha256.hexdigest()}"
    if contents is not None and found != entry.sha256:
        yield finding("A022", where, "digest differs", entry.sha256, found)
    elif xxh3.hexdigest() != entry.xxh3_128:
        yield finding("A023", where, "xxh3 differs", entry.xxh3_128, xxh3.hexdigest())
    elif contents is not None:
        contents[kind] = data


def _check_audit(manifest: Manifest, index: int, audits: dict[int, Statistic]) -> Iterator[Finding]:
    """A069: the audit of an input's rollouts is what the stored distributions of the reference policy give."""
    stored = manifest.inputs[index].rollouts_audit
    found = [audits[number] for number in manifest.parts_of(index) if number in audits]
    derived = add_up(found) if found else None
    if stored is None or derived is None:
        fits = stored is derived
    else:
        fits = (stored.positions, stored.outside) == (derived.positions, derived.outside) and all(
            abs(getattr(stored, name) - getattr(derived, name)) <= _AUDIT_SLACK for name in ("score", "variance")
        )
    if not fits:
        shown = ["none" if one is None else one.sums() for one in (derived, stored)]
        where = f"`inputs[{index}].rollouts_audit`"
        yield finding("A069", layout.MANIFEST, f"{where} is not what the stored values give", *shown)


def _check_gate(manifest: Manifest, student: ModelIdentity) -> Iterator[Finding]:
    """A080: the gate finds teacher, student, tokenizer and audits consistent."""
    for found in gate.judge(manifest.inputs, student).findings:
        yield finding(
            "A080",
            f"inputs ({found.subject})",
            f"teacher consistency is {found.state}: {found.reason}",
            *found.sides,
        )


def _check_signature(directory: Path, fingerprint: str, signer: str) -> Iterator[Finding]:
    """A100: signatures.json reads; A101: it has a valid signature of this fingerprint by the key."""
    try:
        signatures.require(signatures.read(directory), fingerprint, signer)
    except ArtifactError as error:
        yield finding_of(error, layout.SIGNATURES, "A100")
