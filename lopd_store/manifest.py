"""The manifest: what is in an artifact, how to decode it, and where it came from.

    manifest = parse(Path("artifact/manifest.json").read_bytes())
    manifest.inputs[0].teacher.name, manifest.counts.positions

It is written last, so an artifact without one is not an artifact, and the digest of its bytes, the fingerprint, names
the artifact. It holds nothing that merely happened: the same inputs give the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lopd_store import layout, strictjson
from lopd_store.digest import XXH3_PATTERN, FileDigests, digest_json, is_digest
from lopd_store.encoding import Encoding
from lopd_store.errors import ArtifactError
from lopd_store.identity import TOKENIZER_FIELDS, ModelIdentity
from lopd_store.license import UNKNOWN_LICENSE, License
from lopd_store.provenance import (
    DOMAINS_EXPECTED,
    MAX_DOMAINS,
    RolloutsRecord,
    SftProvenance,
    are_domains,
    optional_name,
)
from lopd_store.statistic import SftAudit, Statistic

FORMAT = "lopd"
MAJOR, MINOR = 1, 0
VERSION = f"{MAJOR}.{MINOR}"
SEAL = "seal"
MAX_MANIFEST_BYTES = 64 << 20
_COUNT_LIMIT = 1 << 53
_MEMBERS = {
    *("format", "version", SEAL, "counts", "encoding", "reference_logprobs", "text", "inputs", "parts", "annotations"),
}
INPUTS_MEMBERS = {
    *("domain", "teacher", "license", "scoring", "sft", "sft_audit", "rollouts_file", "rollouts", "rollouts_audit"),
}
_FILE_MEMBERS = ("path", "size", "sha256", "xxh3_128")
_VERSION = re.compile(r"(0|[1-9][0-9]{0,3})\.(0|[1-9][0-9]{0,3})")


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How much there is: rollouts, tokens (prompts included), positions, stored top-k entries."""

    rollouts: int
    tokens: int
    positions: int
    entries: int

    def to_json(self) -> dict[str, int]:
        """A JSON object with one member per field."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


@dataclass(frozen=True, kw_only=True)
class PartEntry:
    """One part: its counts, the input that it is of, and path and digests of each of its files."""

    counts: Counts
    input: int = 0  # index into `Manifest.inputs`
    files: dict[str, FileDigests]  # by kind: rollouts, tokens, topk


def total(parts: Iterable[PartEntry]) -> Counts:
    """How much there is in these parts together."""
    counts = [part.counts for part in parts]
    return Counts(**{item.name: sum(getattr(one, item.name) for one in counts) for item in fields(Counts)})


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How the teacher was run; log-probs are always raw, at temperature 1, over the full vocabulary."""

    engine: str
    dtype: str

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {"engine": self.engine, "dtype": self.dtype, "logprobs": "raw", "temperature": 1.0}


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Where the rollouts of one domain came from and who scored them: what the gate compares."""

    domain: str | None = None  # None only where there is no other input
    teacher: ModelIdentity
    license: License = UNKNOWN_LICENSE  # of the teacher
    scoring: Scoring
    sft: SftProvenance
    rollouts_file: str  # digest
    rollouts: RolloutsRecord | None  # None where the file named no policy
    sft_audit: SftAudit | None = None  # of the SFT data under the teacher; None where there was no data at hand
    rollouts_audit: Statistic | None = None  # of the rollouts under the reference policy, from what is stored of it

    def to_json(self) -> dict[str, Any]:
        """A JSON object with one member per field."""
        return {
            "domain": self.domain,
            "teacher": self.teacher.to_json(),
            "license": self.license.to_json(),
            "scoring": self.scoring.to_json(),
            "sft": self.sft.to_json(),
            "sft_audit": None if self.sft_audit is None else self.sft_audit.to_json(),
            "rollouts_file": self.rollouts_file,
            "rollouts": None if self.rollouts is None else self.rollouts.to_json(),
            "rollouts_audit": None if self.rollouts_audit is None else self.rollouts_audit.sums(),
        }


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A parsed manifest; `render` gives its bytes."""

    counts: Counts
    encoding: Encoding
    inputs: tuple[Inputs, ...]  # one per domain; all teachers have one tokenizer
    parts: tuple[PartEntry, ...]  # those of the first input, then those of the next
    reference_logprobs: bool  # whether every part has them
    text: bool = True  # whether the rollouts tables have prompts and responses as text
    version: str = VERSION
    annotations: Mapping[str, Any] = field(default_factory=dict)

    def input_of(self, part: int) -> Inputs:
        """The input that this part is of."""
        return self.inputs[self.parts[part].input]

    def parts_of(self, index: int) -> range:
        """The numbers of the parts of this input."""
        numbers = [number for number, part in enumerate(self.parts) if part.input == index]
        return range(numbers[0], numbers[-1] + 1)

    def counts_of(self, index: int) -> Counts:
        """How much there is of this input."""
        return total(self.parts[number] for number in self.parts_of(index))


def render(manifest: Manifest) -> bytes:
    """The bytes of manifest.json; their digest is the fingerprint."""
    return sealed(
        {
            "format": FORMAT,
            "version": manifest.version,
            "counts": manifest.counts.to_json(),
            "encoding": manifest.encoding.to_json(),
            "reference_logprobs": manifest.reference_logprobs,
            "text": manifest.text,
            "inputs": [one.to_json() for one in manifest.inputs],
            "parts": [_render_part(number, part) for number, part in enumerate(manifest.parts)],
            "annotations": dict(manifest.annotations),
        }
    )


def audited_at(encoding: Encoding, rollouts: RolloutsRecord | None) -> float | None:
    """The temperature at which stored distributions of the reference policy can audit its rollouts, or None.

    That takes its top-k, a temperature that is known and not 0, and no top-p, whose cut what is stored cannot tell.
    """
    if encoding.rule != "teacher+reference" or rollouts is None or rollouts.sampling.top_p != 1:
        return None
    return rollouts.sampling.temperature or None


def sealed(value: dict[str, Any]) -> bytes:
    """The stored form of a manifest with its seal: the digest of everything else in it, so that damage shows."""
    content = {name: member for name, member in value.items() if name != SEAL}
    return strictjson.pretty({**content, SEAL: digest_json(content)})


def read_bytes(path: Path) -> bytes:
    """The bytes of a manifest; of one that is too large, just enough for `parse` to refuse it."""
    with path.open("rb") as file:
        return file.read(MAX_MANIFEST_BYTES + 1)


def parse(data: bytes, *, where: str = layout.MANIFEST) -> Manifest:
    """Parse and check the bytes of a manifest; raises ArtifactError with the code and the place of what is wrong."""
    with _coded("A010"):
        value = strictjson.loads(data, where=where, max_bytes=MAX_MANIFEST_BYTES)
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise ArtifactError(f"`{where}` is not the manifest of an artifact", expected=f'"format": "{FORMAT}"')
    with _coded("A013"):
        newer = _check_version(value.get("version"), where) > MINOR  # then unknown members may be ignored
    _check_seal(value, data, where)
    with _coded("A014"):
        return _parse(value, where, newer)


def _parse(value: dict[str, Any], where: str, newer: bool) -> Manifest:
    value = strictjson.members(value, _MEMBERS, where=where, open_ended=newer)
    for name, kind in (("reference_logprobs", bool), ("text", bool), ("annotations", dict)):
        if type(value[name]) is not kind:
            raise ArtifactError(f"`{where}: {name}` is not {'an object' if kind is dict else 'true or false'}")
    with _coded("A016"):
        parts = value["parts"]
        if not isinstance(parts, list) or not 1 <= len(parts) <= layout.MAX_PARTS:
            raise ArtifactError(f"`{where}: parts` is not a list of 1 to {layout.MAX_PARTS} parts")
        entries = tuple(_part(part, number, f"{where}: parts[{number}]", newer) for number, part in enumerate(parts))
    with _coded("A015"):
        counts = _counts(value["counts"], f"{where}: counts", newer)
        for name, wanted in total(entries).to_json().items():
            if wanted != getattr(counts, name):
                raise ArtifactError(
                    f"`{where}: counts.{name}` is not the sum over the parts",
                    expected=wanted,
                    actual=getattr(counts, name),
                )
    with _coded("A017"):
        encoding = Encoding.from_json(value["encoding"], where=f"{where}: encoding", open_ended=newer)
    with _coded("A018"):
        listed = value["inputs"]
        if not isinstance(listed, list) or not 1 <= len(listed) <= MAX_DOMAINS:
            raise ArtifactError(f"`{where}: inputs` is not a list of 1 to {MAX_DOMAINS} inputs")
        inputs = tuple(read_inputs(one, f"{where}: inputs[{index}]", newer) for index, one in enumerate(listed))
    _check_inputs(inputs, entries, where)
    return Manifest(
        counts=counts,
        encoding=encoding,
        inputs=inputs,
        parts=entries,
        reference_logprobs=value["reference_logprobs"],
        text=value["text"],
        version=value["version"],
        annotations=value["annotations"],
    )


def _check_inputs(inputs: Sequence[Inputs], parts: Sequence[PartEntry], where: str) -> None:
    """A024: every domain has a name of its own; A025: ids mean one thing; A026: every input has its run of parts."""
    if not are_domains(domains := [one.domain for one in inputs]):
        raise ArtifactError(
            f"`{where}: inputs` do not have a domain each",
            code="A024",
            expected=DOMAINS_EXPECTED,
            actual=", ".join(map(repr, domains))[:300],
        )
    for index, one in enumerate(inputs):
        if set(inputs[0].teacher.differences(one.teacher)) & set(TOKENIZER_FIELDS):
            raise ArtifactError(
                f"`{where}: inputs[{index}].teacher` has another tokenizer than that of the first input",
                code="A025",
                expected=f"{inputs[0].teacher.tokenizer}, vocabulary {inputs[0].teacher.vocab_size}",
                actual=f"{one.teacher.tokenizer}, vocabulary {one.teacher.vocab_size}",
            )
    order = [part.input for part in parts]
    if order != sorted(order) or set(order) != set(range(len(inputs))):
        raise ArtifactError(
            f"`{where}: parts` are not those of the first input, then those of the next, to the last",
            code="A026",
            expected=f"`input` from 0 to {len(inputs) - 1}, every one of them, in order",
        )


def read_inputs(value: Any, where: str, newer: bool = False) -> Inputs:
    """Check and read one of the `inputs`."""
    value = strictjson.members(value, INPUTS_MEMBERS, where=where, open_ended=newer)
    if not is_digest(value["rollouts_file"]):
        raise ArtifactError(f"`{where}.rollouts_file` is not a digest")
    rollouts, sft_audit, rollouts_audit = (value[name] for name in ("rollouts", "sft_audit", "rollouts_audit"))
    return Inputs(
        domain=optional_name(value["domain"], f"{where}.domain"),
        teacher=ModelIdentity.from_json(value["teacher"], where=f"{where}.teacher", open_ended=newer),
        license=License.from_json(value["license"], where=f"{where}.license", open_ended=newer),
        scoring=_scoring(value["scoring"], f"{where}.scoring", newer),
        sft=SftProvenance.from_json(value["sft"], where=f"{where}.sft", open_ended=newer),
        rollouts_file=value["rollouts_file"],
        rollouts=None
        if rollouts is None
        else RolloutsRecord.from_json(rollouts, where=f"{where}.rollouts", open_ended=newer),
        sft_audit=None
        if sft_audit is None
        else SftAudit.from_json(sft_audit, where=f"{where}.sft_audit", open_ended=newer),
        rollouts_audit=None
        if rollouts_audit is None
        else Statistic.from_json(rollouts_audit, where=f"{where}.rollouts_audit", open_ended=newer),
    )


@contextmanager
def _coded(code: str) -> Iterator[None]:
    """Errors in here break the rule with this code, where they do not say another."""
    try:
        yield
    except ArtifactError as error:
        error.code = error.code or code
        raise


def _check_version(version: Any, where: str) -> int:
    match = _VERSION.fullmatch(version) if isinstance(version, str) else None
    if match is None:
        raise ArtifactError(f"`{where}: version` is not a version", expected="MAJOR.MINOR", actual=repr(version)[:100])
    if int(match[1]) != MAJOR:
        raise ArtifactError(
            f"`{where}` has format version {version}, which this lopd does not read",
            expected=f"{MAJOR}.x",
            actual=version,
            hint="pip install --upgrade lopd",
        )
    return int(match[2])


def _check_seal(value: dict[str, Any], data: bytes, where: str) -> None:
    content = {name: member for name, member in value.items() if name != SEAL}
    if value.get(SEAL) != digest_json(content):
        raise ArtifactError(
            f"`{where}` was changed after it was sealed",
            code="A011",
            expected=digest_json(content),
            actual=repr(value.get(SEAL))[:100],
        )
    if strictjson.pretty(value) != data:
        raise ArtifactError(
            f"`{where}` is not in the form in which manifests are stored",
            code="A012",
            expected="sorted names, two spaces of indentation, a final newline",
        )


def _counts(value: Any, where: str, open_ended: bool) -> Counts:
    names = {item.name for item in fields(Counts)}
    value = strictjson.members(value, names, where=where, open_ended=open_ended)
    for name in names:
        if type(value[name]) is not int or not 0 <= value[name] < _COUNT_LIMIT:
            raise ArtifactError(f"`{where}.{name}` is not a count", actual=repr(value[name])[:100])
    return Counts(**{name: value[name] for name in names})


def _scoring(value: Any, where: str, open_ended: bool) -> Scoring:
    value = strictjson.members(
        value, {"engine", "dtype", "logprobs", "temperature"}, where=where, open_ended=open_ended
    )
    if value["logprobs"] != "raw" or type(value["temperature"]) is not float or value["temperature"] != 1:
        raise ArtifactError(
            f"`{where}` says that the log-probs were processed",
            code="A019",
            expected="raw log-probs at temperature 1",
            actual=f"{value['logprobs']!r} at temperature {value['temperature']!r}"[:200],
        )
    if not isinstance(value["engine"], str) or not isinstance(value["dtype"], str):
        raise ArtifactError(f"`{where}` does not name an engine and a dtype")
    return Scoring(engine=value["engine"], dtype=value["dtype"])


def _render_part(number: int, part: PartEntry) -> dict[str, Any]:
    return {
        "counts": part.counts.to_json(),
        "input": part.input,
        "files": {
            kind: {
                "path": layout.part_file(number, kind),
                "size": digests.size,
                "sha256": digests.sha256,
                "xxh3_128": digests.xxh3_128,
            }
            for kind, digests in part.files.items()
        },
    }


def _part(value: Any, number: int, where: str, open_ended: bool) -> PartEntry:
    value = strictjson.members(value, {"counts", "input", "files"}, where=where, open_ended=open_ended)
    entries = strictjson.members(value["files"], layout.FILE_KINDS, where=f"{where}.files", open_ended=open_ended)
    files = {}
    for kind in layout.FILE_KINDS:
        place = f"{where}.files.{kind}"
        entry = strictjson.members(entries[kind], _FILE_MEMBERS, where=place, open_ended=open_ended)
        if entry["path"] != layout.part_file(number, kind):
            raise ArtifactError(
                f"`{place}.path` is not a path of this part",
                expected=layout.part_file(number, kind),
                actual=repr(entry["path"])[:200],
            )
        if type(entry["size"]) is not int or not 0 <= entry["size"] <= layout.MAX_FILE_BYTES:
            raise ArtifactError(
                f"`{place}.size` is not a size",
                expected=f"at most {layout.MAX_FILE_BYTES} bytes",
                actual=repr(entry["size"])[:100],
            )
        if not is_digest(entry["sha256"]):
            raise ArtifactError(f"`{place}.sha256` is not a digest", actual=repr(entry["sha256"])[:100])
        if not isinstance(entry["xxh3_128"], str) or not XXH3_PATTERN.fullmatch(entry["xxh3_128"]):
            raise ArtifactError(f"`{place}.xxh3_128` is not 32 hex digits", actual=repr(entry["xxh3_128"])[:100])
        files[kind] = FileDigests(size=entry["size"], sha256=entry["sha256"], xxh3_128=entry["xxh3_128"])
    if type(value["input"]) is not int or not 0 <= value["input"] < MAX_DOMAINS:
        raise ArtifactError(f"`{where}.input` is not the index of an input", actual=repr(value["input"])[:100])
    counts = _counts(value["counts"], f"{where}.counts", open_ended)
    return PartEntry(counts=counts, input=value["input"], files=files)
