"""Verification: everything an artifact claims, derived again from its bytes.

    report = verify("artifact")
    report.ok, report.findings

It trusts neither builder nor reader and never raises on bad data: whatever is wrong becomes a Finding with a code.
Checks stand in the order of spec/artifact.md; a part that does not decode is not judged further.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from lopd_store import gate, layout
from lopd_store import manifest as manifests
from lopd_store.digest import digest_bytes, digest_file, xxh3_file
from lopd_store.errors import ArtifactError, LopdError
from lopd_store.identity import ModelIdentity
from lopd_store.manifest import Manifest, PartEntry
from lopd_store.part import OPTIONAL_ARRAYS, TOKENS_ARRAYS, TOPK_ARRAYS, read_arrays

Arrays = dict[str, npt.NDArray[Any]]
_SLACK = 1e-4  # float32 sums over k + 1 terms


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong, in the words of an error."""

    code: str
    where: str
    message: str
    expected: str | None = None
    actual: str | None = None
    hint: str | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON object with one member per field."""
        return dict(vars(self))

    def to_error(self) -> ArtifactError:
        """The same as an exception."""
        named = self.message.startswith(f"`{self.where}")
        message = self.message if named else f"`{self.where}`: {self.message}"
        return ArtifactError(message, code=self.code, expected=self.expected, actual=self.actual, hint=self.hint)


@dataclass(frozen=True, kw_only=True)
class Report:
    """The outcome of a verification; `ok` where nothing was found."""

    fingerprint: str | None  # None where there is no readable manifest
    quick: bool
    files: int
    bytes: int
    findings: tuple[Finding, ...]

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
            "files": self.files,
            "bytes": self.bytes,
            "findings": [finding.to_json() for finding in self.findings],
        }

    def require_ok(self) -> None:
        """Raise the first finding as an ArtifactError."""
        if self.findings:
            raise self.findings[0].to_error()


def verify(
    path: str | Path,
    *,
    quick: bool = False,
    student: ModelIdentity | None = None,
    on_bytes: Callable[[int, int], None] | None = None,
) -> Report:
    """Check an artifact: every byte, every structure, every value; `quick` checks sizes and xxh3 alone.

    With a student, the gate's findings are reported too. `on_bytes` hears (bytes read, bytes in all). Raises
    InputError only where there is no directory to look at, or a build in progress.
    """
    directory = Path(path)
    if not directory.is_dir() or directory.name.endswith(layout.BUILDING_SUFFIX):
        raise layout.no_artifact(directory)
    file = directory / layout.MANIFEST
    if not file.is_file() or file.is_symlink():
        finding = Finding(code="A001", where=layout.MANIFEST, message="there is no manifest, so this is no artifact")
        return Report(fingerprint=None, quick=quick, files=0, bytes=0, findings=(finding,))
    data = manifests.read_bytes(file)
    try:
        manifest = manifests.parse(data)
    except ArtifactError as error:
        return Report(
            fingerprint=digest_bytes(data), quick=quick, files=1, bytes=len(data), findings=(_found("A010", error),)
        )
    findings = list(_check_directory(directory, len(manifest.parts)))
    total = sum(entry.size for part in manifest.parts for entry in part.files.values())
    read = 0

    def report(count: int) -> None:
        nonlocal read
        read += count
        if on_bytes is not None:
            on_bytes(read, total)

    for number, part in enumerate(manifest.parts):
        broken = list(_check_bytes(directory, number, part, quick, report))
        findings += broken
        if not broken and not quick:
            with np.errstate(all="ignore"):  # values that make arithmetic overflow become findings
                findings += _check_part(directory, number, part, manifest)
    if student is not None:
        findings += _check_gate(manifest, student)
    files = 1 + sum(len(part.files) for part in manifest.parts)
    return Report(
        fingerprint=digest_bytes(data), quick=quick, files=files, bytes=len(data) + total, findings=tuple(findings)
    )


def _check_directory(directory: Path, parts: int) -> Iterator[Finding]:
    """A002: parts/ holds the files of the manifest and nothing else; A020: it is no link."""
    if (directory / layout.PARTS).is_symlink():
        yield Finding(code="A020", where=layout.PARTS, message="a directory is a link")
    wanted = {layout.part_file(number, kind) for number in range(parts) for kind in layout.FILE_KINDS}
    there = (directory / layout.PARTS).iterdir() if (directory / layout.PARTS).is_dir() else iter(())
    for extra in sorted({f"{layout.PARTS}/{file.name}" for file in there} - wanted):
        yield Finding(code="A002", where=extra, message="a file that the manifest does not list")


def _check_bytes(
    directory: Path, number: int, part: PartEntry, quick: bool, on_bytes: Callable[[int], None]
) -> Iterator[Finding]:
    """A020 there and no link, A021 size, A022 sha256, A023 xxh3."""
    for kind, entry in part.files.items():
        where = layout.part_file(number, kind)
        path = directory / where
        if path.is_symlink() or not path.is_file():
            yield Finding(code="A020", where=where, message="a file is missing or not a plain file")
            continue
        size = path.stat().st_size
        if size != entry.size:
            yield Finding(
                code="A021", where=where, message="size differs", expected=f"{entry.size} bytes", actual=f"{size} bytes"
            )
            continue
        found = None if quick else digest_file(path, on_bytes)
        xxh3 = xxh3_file(path, on_bytes) if found is None else found.xxh3_128
        if found is not None and found.sha256 != entry.sha256:
            yield Finding(
                code="A022", where=where, message="digest differs", expected=entry.sha256, actual=found.sha256
            )
        elif xxh3 != entry.xxh3_128:
            yield Finding(code="A023", where=where, message="xxh3 differs", expected=entry.xxh3_128, actual=xxh3)


def _check_part(directory: Path, number: int, part: PartEntry, manifest: Manifest) -> Iterator[Finding]:
    """A030 decodes, A031 the same arrays everywhere, then structure, values and the rollouts table."""
    tokens_path, topk_path, rollouts_path = (
        layout.part_file(number, kind) for kind in (layout.TOKENS, layout.TOPK, layout.ROLLOUTS)
    )
    where = tokens_path
    try:
        tokens = read_arrays(directory / tokens_path, TOKENS_ARRAYS)
        where = topk_path
        topk = read_arrays(directory / topk_path, TOPK_ARRAYS)
    except ArtifactError as error:
        yield _found("A030", error, where)
        return
    if bool(OPTIONAL_ARRAYS & set(tokens)) != manifest.reference_logprobs:
        yield Finding(
            code="A031", where=tokens_path, message="`reference_logprobs` is there in some parts and not in others"
        )
    structure = list(_check_structure(tokens, topk, part, tokens_path, topk_path))
    yield from structure
    if not structure:
        yield from _check_tokens(tokens, manifest, tokens_path)
        yield from _check_topk(tokens, topk, manifest, topk_path)
        yield from _check_table(directory, tokens, rollouts_path)


def _check_structure(
    tokens: Arrays, topk: Arrays, part: PartEntry, tokens_path: str, topk_path: str
) -> Iterator[Finding]:
    """A040 lengths, A041 offsets, A042 prompt lengths, A043 counts, A044 ranks."""
    counts = part.counts
    lengths = {
        "rollout_offsets": counts.rollouts + 1,
        "prompt_lengths": counts.rollouts,
        "token_ids": counts.tokens,
        **dict.fromkeys(("loss_mask", "sampled_logprobs", "counts", "tail_logprobs"), counts.positions),
        "ids": counts.entries,
        "logprobs": counts.entries,
    }
    if "reference_logprobs" in tokens:
        lengths["reference_logprobs"] = counts.positions
    for name, length in lengths.items():
        array = tokens.get(name, topk.get(name))
        where = tokens_path if name in tokens else topk_path
        if array is None or len(array) != length:
            found = "none" if array is None else str(len(array))
            yield _value("A040", where, f"`{name}` has another length than the manifest says", length, found)
            return
    offsets, prompts = tokens["rollout_offsets"], tokens["prompt_lengths"].astype(np.int64)
    rollouts = np.diff(offsets)
    if offsets[0] != 0 or offsets[-1] != counts.tokens or (offsets[1:] < offsets[:-1]).any():
        yield _value("A041", tokens_path, "`rollout_offsets` do not run from 0 to the number of tokens", counts.tokens)
    elif (prompts < 1).any() or (prompts > rollouts).any():
        row = int(np.flatnonzero((prompts < 1) | (prompts > rollouts))[0])
        yield _value(
            "A042", tokens_path, f"rollout {row}: the prompt does not fit", f"1 to {rollouts[row]}", prompts[row]
        )
    elif int((rollouts - prompts).sum()) != counts.positions:
        yield _value("A042", tokens_path, "positions are not the response tokens", counts.positions)
    if int(topk["counts"].sum(dtype=np.int64)) != counts.entries:
        yield _value("A043", topk_path, "`counts` do not add up to the entries", counts.entries, topk["counts"].sum())
    table = topk["id_table"]
    if counts.entries and int(topk["ids"].max()) >= len(table):
        yield _value("A044", topk_path, "a rank has no row in `id_table`", f"below {len(table)}", topk["ids"].max())
    if len(np.unique(table)) != len(table):
        yield _value("A045", topk_path, "`id_table` has an id twice")


def _check_tokens(tokens: Arrays, manifest: Manifest, where: str) -> Iterator[Finding]:
    """A050 ids in range, A051 log-probs are log-probs, A052 on the grid."""
    size = manifest.inputs.teacher.vocab_size
    if len(tokens["token_ids"]) and int(tokens["token_ids"].max()) >= size:
        yield _value("A050", where, "a token id is out of range", f"below {size}", tokens["token_ids"].max())
    for name in ("sampled_logprobs", "reference_logprobs"):
        if name in tokens:
            yield from _check_logprobs(tokens[name], name, where, manifest.encoding.sampled_step, finite=False)


def _check_topk(tokens: Arrays, topk: Arrays, manifest: Manifest, where: str) -> Iterator[Finding]:
    """A050 to A052 for the top-k, A060 k, A061 order, A062 ids twice, A063 mass, A064 the sampled token."""
    encoding, size = manifest.encoding, manifest.inputs.teacher.vocab_size
    counts = topk["counts"].astype(np.int64)
    ids = topk["id_table"][topk["ids"]].astype(np.int64)
    logprobs = topk["logprobs"]
    if len(ids) and int(ids.max()) >= size:
        yield _value("A050", where, "a stored id is out of range", f"below {size}", ids.max())
    yield from _check_logprobs(logprobs, "logprobs", where, encoding.topk_step, finite=True)
    yield from _check_logprobs(topk["tail_logprobs"], "tail_logprobs", where, encoding.topk_step, finite=False)
    if len(counts) and (int(counts.max()) > encoding.k_max or int(counts.min()) < 1):
        found = f"{counts.min()} to {counts.max()}"
        yield _value("A060", where, "`counts` are out of range", f"1 to {encoding.k_max}", found)
    position = np.repeat(np.arange(len(counts)), counts)
    same = position[1:] == position[:-1]
    falls = logprobs[1:] < logprobs[:-1]
    ties = (logprobs[1:] == logprobs[:-1]) & (ids[1:] > ids[:-1])
    if (bad := np.flatnonzero(same & ~(falls | ties))).size:
        at = _position(position[bad[0]])
        yield _value("A061", where, f"{at}: entries are not in order", "log-prob descending, then id ascending")
    if len(np.unique(position * size + ids)) != len(ids):
        yield _value("A062", where, "an id stands twice at one position")
    mass = np.exp(topk["tail_logprobs"].astype(np.float64))
    np.add.at(mass, position, np.exp(logprobs.astype(np.float64)))
    bound = np.exp(encoding.topk_step / 2) * (1 + _SLACK)
    if (bad := np.flatnonzero((mass > bound) | (mass < 1 / bound))).size:
        at = _position(bad[0])
        yield _value(
            "A063", where, f"{at}: top-k and tail do not sum to one", f"1 within {bound - 1:.2g}", mass[bad[0]]
        )
    response = _response_ids(tokens)
    hit = ids == np.repeat(response, counts)
    stored = tokens["sampled_logprobs"][position[hit]]
    tolerance = (encoding.topk_step + encoding.sampled_step) / 2 + _SLACK
    if (bad := np.flatnonzero(np.abs(stored - logprobs[hit]) > tolerance)).size:
        at = _position(position[hit][bad[0]])
        yield _value(
            "A064",
            where,
            f"{at}: the sampled log-prob and its top-k entry differ",
            logprobs[hit][bad[0]],
            stored[bad[0]],
        )
    # A sampled token outside the top-k is part of the tail, so it cannot be likelier than the last entry or the tail.
    outside = np.ones(len(counts), bool)
    outside[position[hit]] = False
    worst = topk["tail_logprobs"][outside]
    if (bad := np.flatnonzero(tokens["sampled_logprobs"][outside] > worst + tolerance)).size:
        at = _position(np.flatnonzero(outside)[bad[0]])
        yield _value("A065", where, f"{at}: the sampled token is outside the top-k, yet likelier than the tail")


def _check_logprobs(values: npt.NDArray[Any], name: str, where: str, step: float, *, finite: bool) -> Iterator[Finding]:
    legal = np.isfinite(values) if finite else ~np.isnan(values)
    legal &= values <= 0
    if (bad := np.flatnonzero(~legal)).size:
        yield _value("A051", where, f"`{name}`[{bad[0]}] is not a log-prob", "a number <= 0", values[bad[0]])
    elif step and (bad := np.flatnonzero(np.isfinite(values) & (np.rint(values / step) * step != values))).size:
        yield _value("A052", where, f"`{name}`[{bad[0]}] is not on the grid", f"a multiple of {step}", values[bad[0]])


def _check_table(directory: Path, tokens: Arrays, where: str) -> Iterator[Finding]:
    """A070 the rollouts table is readable, A071 and speaks of the same rollouts as the token ids."""
    try:
        table = pq.read_table(directory / where, columns=["prompt_length", "response_length"])
    except (pa.ArrowException, OSError, KeyError) as error:
        yield _value("A070", where, f"the rollouts table does not read: {str(error).splitlines()[0]}")
        return
    prompts = tokens["prompt_lengths"]
    responses = np.diff(tokens["rollout_offsets"]) - prompts
    wanted = (prompts.tolist(), responses.tolist())
    if (table.column("prompt_length").to_pylist(), table.column("response_length").to_pylist()) != wanted:
        yield _value("A071", where, "the lengths in the rollouts table are not those of the token ids")


def _check_gate(manifest: Manifest, student: ModelIdentity) -> Iterator[Finding]:
    """A080: the gate finds teacher, student and tokenizer consistent."""
    for finding in gate.judge(manifest.inputs, student).findings:
        yield Finding(
            code="A080",
            where=f"inputs ({finding.subject})",
            message=f"teacher consistency is {finding.state}: {finding.reason}",
            expected=gate.describe(finding.expected, finding.differences),
            actual=gate.describe(finding.actual, finding.differences),
        )


def _response_ids(tokens: Arrays) -> npt.NDArray[np.int64]:
    offsets, prompts = tokens["rollout_offsets"], tokens["prompt_lengths"].astype(np.int64)
    lengths = np.diff(offsets)
    within = np.arange(len(tokens["token_ids"])) - np.repeat(offsets[:-1], lengths)
    responses: npt.NDArray[np.int64] = tokens["token_ids"][within >= np.repeat(prompts, lengths)].astype(np.int64)
    return responses


def _position(index: Any) -> str:
    return f"position {int(index)}"


def _value(code: str, where: str, message: str, expected: object = None, actual: object = None) -> Finding:
    return Finding(
        code=code,
        where=where,
        message=message,
        expected=None if expected is None else str(expected),
        actual=None if actual is None else str(actual),
    )


def _found(code: str, error: LopdError, where: str = layout.MANIFEST) -> Finding:
    return replace(_value(code, where, error.message, error.expected, error.actual), hint=error.hint)
