"""Provenance: small JSON records that the tools write into their own files, each carrying the one before it.

    SFT data (a `rollouts` record whose policy is the SFT teacher)
      -> SFT checkpoint (a `checkpoint` record, lopd-provenance.json beside the weights)
        -> rollouts (a `rollouts` record in the Parquet schema) -> artifact (its manifest's `inputs`)

A record says what its tool saw (`recorded`) or what a person claims (`declared`); what rests on a declared record is
declared, whatever our tools make of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from lopd_store import strictjson
from lopd_store.digest import is_digest
from lopd_store.errors import ArtifactError, InputError
from lopd_store.identity import ModelIdentity
from lopd_store.models import PROVENANCE_FILE

Status = Literal["recorded", "declared", "unknown"]
Method = Literal["sft", "opd"]
MAX_DOMAINS = 64
MAX_STOPS, MAX_STOP_LENGTH = 64, 1000
DOMAINS_EXPECTED = "different names of a-z, 0-9, `.`, `_` and `-`, of at most 64 characters"
_DOMAIN = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How responses were sampled: part of what the log-probs mean; None is what a person who declares does not know."""

    temperature: float | None
    top_p: float | None
    max_response_tokens: int | None
    samples_per_prompt: int | None
    seed: int | None
    stop: tuple[str, ...] | None = None  # a response ends with the token that completes one of these

    def to_json(self) -> dict[str, Any]:
        """A JSON object with one member per field."""
        return {**vars(self), "stop": None if self.stop is None else list(self.stop)}

    @classmethod
    def from_json(cls, value: Any, *, where: str, open_ended: bool = False) -> Sampling:
        """Parse what `to_json` gave."""
        names = [field.name for field in fields(cls)]
        value = dict(strictjson.members(value, names, where=where, open_ended=open_ended))
        stop = value.pop("stop")
        if stop is not None and not (
            isinstance(stop, list)
            and len(stop) <= MAX_STOPS
            and all(isinstance(text, str) and 1 <= len(text) <= MAX_STOP_LENGTH for text in stop)
        ):
            raise ArtifactError(
                f"`{where}.stop` is not a list of texts",
                expected=f"at most {MAX_STOPS}, of 1 to {MAX_STOP_LENGTH} characters",
                actual=repr(stop)[:100],
            )
        for name, number in value.items():
            kinds = (int, float) if name in ("temperature", "top_p") else (int,)
            if number is not None and (type(number) not in kinds or number < 0):
                raise ArtifactError(f"`{where}.{name}` is not a number that fits", actual=repr(number)[:100])
        return cls(**value, stop=None if stop is None else tuple(stop))


def require_sampling_ranges(temperature: float | None, top_p: float | None) -> None:
    """Raise InputError where one of them is out of range; None is not known, and passes."""
    for name, value, fits, expected in (
        ("temperature", temperature, temperature is None or 0 <= temperature <= 100, "0 to 100"),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1, "above 0, at most 1"),
    ):
        if not fits:
            raise InputError(f"`{name}` is out of range", expected=expected, actual=value)


@dataclass(frozen=True, kw_only=True)
class RolloutsRecord:
    """Who sampled a file of rollouts (or of SFT data, which is the same thing by a teacher), from what, and how."""

    status: Status
    policy: ModelIdentity
    policy_checkpoint: CheckpointRecord | None  # how the policy was made, where its directory says so
    prompts: str | None  # digest of the prompts file
    sampling: Sampling

    def to_json(self) -> dict[str, Any]:
        """A JSON object, `"record": "rollouts"`."""
        return {
            "record": "rollouts",
            "status": self.status,
            "policy": self.policy.to_json(),
            "policy_checkpoint": None if self.policy_checkpoint is None else self.policy_checkpoint.to_json(),
            "prompts": self.prompts,
            "sampling": self.sampling.to_json(),
        }

    @classmethod
    def from_json(cls, value: Any, *, where: str, open_ended: bool = False) -> RolloutsRecord:
        """Parse what `to_json` gave; raises ArtifactError at any other shape."""
        value = strictjson.members(
            value,
            {"record", "status", "policy", "policy_checkpoint", "prompts", "sampling"},
            where=where,
            open_ended=open_ended,
        )
        if value["record"] != "rollouts":
            raise ArtifactError(f"`{where}` is not a rollouts record", actual=repr(value["record"])[:100])
        checkpoint = value["policy_checkpoint"]
        return cls(
            status=_status(value["status"], where),
            policy=ModelIdentity.from_json(value["policy"], where=f"{where}.policy", open_ended=open_ended),
            policy_checkpoint=None
            if checkpoint is None
            else CheckpointRecord.from_json(checkpoint, where=f"{where}.policy_checkpoint", open_ended=open_ended),
            prompts=_optional_digest(value["prompts"], f"{where}.prompts"),
            sampling=Sampling.from_json(value["sampling"], where=f"{where}.sampling", open_ended=open_ended),
        )


@dataclass(frozen=True, kw_only=True)
class CheckpointRecord:
    """How a checkpoint was trained: from which model, on which data, and who taught its SFT."""

    status: Status
    method: Method
    model: ModelIdentity  # the checkpoint itself
    base: ModelIdentity  # what the training started from
    data: str | None  # digest of the SFT data, or fingerprint of the artifact; None where `sft` has several, or unknown
    sft: tuple[SftProvenance, ...]  # one per domain of the SFT data
    overrides: tuple[str, ...] = ()  # gates that were overridden, by the names of their flags

    def to_json(self) -> dict[str, Any]:
        """A JSON object, `"record": "checkpoint"`."""
        return {
            "record": "checkpoint",
            "status": self.status,
            "method": self.method,
            "model": self.model.to_json(),
            "base": self.base.to_json(),
            "data": self.data,
            "sft": [one.to_json() for one in self.sft],
            "overrides": list(self.overrides),
        }

    @classmethod
    def from_json(cls, value: Any, *, where: str, open_ended: bool = False) -> CheckpointRecord:
        """Parse what `to_json` gave; raises ArtifactError at any other shape."""
        value = strictjson.members(
            value,
            {"record", "status", "method", "model", "base", "data", "sft", "overrides"},
            where=where,
            open_ended=open_ended,
        )
        if value["record"] != "checkpoint" or value["method"] not in ("sft", "opd"):
            raise ArtifactError(f"`{where}` is not a checkpoint record", actual=repr(value["record"])[:100])
        overrides = value["overrides"]
        if not isinstance(overrides, list) or not all(isinstance(name, str) for name in overrides):
            raise ArtifactError(f"`{where}.overrides` is not a list of names")
        listed = value["sft"]
        if not isinstance(listed, list) or not 1 <= len(listed) <= MAX_DOMAINS:
            raise ArtifactError(f"`{where}.sft` is not a list of 1 to {MAX_DOMAINS} provenances")
        sft = tuple(
            SftProvenance.from_json(one, where=f"{where}.sft[{index}]", open_ended=open_ended)
            for index, one in enumerate(listed)
        )
        if not are_domains([one.domain for one in sft]):
            raise ArtifactError(f"`{where}.sft` do not have a domain each", expected=DOMAINS_EXPECTED)
        return cls(
            status=_status(value["status"], where),
            method=value["method"],
            model=ModelIdentity.from_json(value["model"], where=f"{where}.model", open_ended=open_ended),
            base=ModelIdentity.from_json(value["base"], where=f"{where}.base", open_ended=open_ended),
            data=_optional_digest(value["data"], f"{where}.data"),
            sft=sft,
            overrides=tuple(overrides),
        )


@dataclass(frozen=True, kw_only=True)
class SftProvenance:
    """Which teacher wrote the SFT data of a policy, or of one domain; what the gate compares with the scoring one."""

    domain: str | None = None
    status: Status
    teacher: ModelIdentity | None
    data: str | None  # digest of the SFT data file

    def to_json(self) -> dict[str, Any]:
        """A JSON object with one member per field."""
        teacher = None if self.teacher is None else self.teacher.to_json()
        return {"domain": self.domain, "status": self.status, "teacher": teacher, "data": self.data}

    @classmethod
    def from_json(cls, value: Any, *, where: str, open_ended: bool = False) -> SftProvenance:
        """Parse what `to_json` gave; a status of `unknown` goes with no teacher, and only with none."""
        value = strictjson.members(value, {"domain", "status", "teacher", "data"}, where=where, open_ended=open_ended)
        status, teacher = _status(value["status"], where), value["teacher"]
        if (status == "unknown") != (teacher is None):
            raise ArtifactError(
                f"`{where}` has status `{status}`, but its teacher is {'null' if teacher is None else 'named'}"
            )
        return cls(
            domain=optional_name(value["domain"], f"{where}.domain"),
            status=status,
            teacher=None
            if teacher is None
            else ModelIdentity.from_json(teacher, where=f"{where}.teacher", open_ended=open_ended),
            data=_optional_digest(value["data"], f"{where}.data"),
        )


UNKNOWN_SFT = SftProvenance(status="unknown", teacher=None, data=None)


def sft_of_policy(record: RolloutsRecord | None, domain: str | None = None) -> SftProvenance:
    """The SFT provenance that a rollouts record carries in its policy's checkpoint record, or unknown."""
    if record is None or record.status == "unknown" or record.policy_checkpoint is None:
        return UNKNOWN_SFT
    if record.policy_checkpoint.model.differences(record.policy):
        return UNKNOWN_SFT  # the record lay beside other weights than it speaks of
    sft = sft_of_checkpoint(record.policy_checkpoint, domain)
    return declared(sft) if record.status == "declared" else sft


def sft_of_checkpoint(record: CheckpointRecord, domain: str | None = None) -> SftProvenance:
    """The SFT provenance that a checkpoint record carries for a domain: no better known than the record itself.

    Raises InputError where the record has domains and this is none of them; of a single one none need be named.
    """
    if record.status == "unknown":
        return UNKNOWN_SFT
    by_domain = {one.domain: one for one in record.sft}
    if len(by_domain) == 1 and (domain is None or None in by_domain):
        domain = record.sft[0].domain
    if domain not in by_domain:
        raise InputError(
            f"`{record.model.name}` was fine-tuned on SFT data of several domains, and none is named"
            if domain is None
            else f"`{record.model.name}` was fine-tuned on no SFT data of the domain `{domain}`",
            expected=", ".join(str(name) for name in by_domain),
            actual=domain,
            hint="name the domain of the rollouts, `--domain NAME`",
        )
    return declared(by_domain[domain]) if record.status == "declared" else by_domain[domain]


def sft_of_data(record: RolloutsRecord | None, digest: str, domain: str | None = None) -> SftProvenance:
    """The SFT provenance of a model trained on a data file with this record and digest."""
    if record is None or record.status == "unknown":
        return SftProvenance(domain=domain, status="unknown", teacher=None, data=digest)
    return SftProvenance(domain=domain, status=record.status, teacher=record.policy, data=digest)


def declared(sft: SftProvenance) -> SftProvenance:
    """The same on a person's word."""
    return sft if sft.teacher is None else replace(sft, status="declared")


def read_checkpoint_record(directory: Path) -> CheckpointRecord | None:
    """The record beside a checkpoint's weights, or None where there is none."""
    path = directory / PROVENANCE_FILE
    return parse_checkpoint_record(path.read_bytes(), where=str(path)) if path.is_file() else None


def parse_checkpoint_record(data: bytes, *, where: str) -> CheckpointRecord:
    """The checkpoint record in these bytes; raises ArtifactError where there is none."""
    return CheckpointRecord.from_json(strictjson.loads(data, where=where), where=where)


def are_domains(domains: Sequence[str | None]) -> bool:
    """Whether each has a name of its own that a domain can have; one that stands alone needs none."""
    if list(domains) == [None]:
        return True
    fit = all(name is not None and _DOMAIN.fullmatch(name) for name in domains)
    return fit and 1 <= len(set(domains)) == len(domains) <= MAX_DOMAINS


def by_domain(named: str | Path | Mapping[str, str | Path], what: str) -> dict[str | None, str | Path]:
    """Files or models by their domains; one alone has none. Raises InputError where a domain cannot have its name."""
    found: dict[str | None, str | Path] = dict(named.items() if isinstance(named, Mapping) else [(None, named)])
    if not are_domains(domains := list(found)):
        raise InputError(
            f"`{what}` does not name domains", expected=DOMAINS_EXPECTED, actual=", ".join(map(str, domains))
        )
    return found


def _status(value: Any, where: str) -> Status:
    if value not in ("recorded", "declared", "unknown"):
        raise ArtifactError(
            f"`{where}.status` is not known", expected="recorded, declared or unknown", actual=repr(value)[:100]
        )
    status: Status = value
    return status


def optional_name(value: Any, where: str) -> str | None:
    """A string or null, as JSON has it."""
    if value is not None and not isinstance(value, str):
        raise ArtifactError(f"`{where}` is neither a name nor null", actual=repr(value)[:100])
    return value


def _optional_digest(value: Any, where: str) -> str | None:
    if value is not None and not is_digest(value):
        raise ArtifactError(f"`{where}` is neither a digest nor null", actual=repr(value)[:100])
    return None if value is None else str(value)
