"""Lineage: the chain from the SFT teacher to a trained student, link by link, and how sure each link is.

    links = of_manifest(artifact.manifest, artifact.fingerprint)
    [(link.thing, link.mark) for link in links]     # [("SFT data", "recorded"), ..., ("artifact", "verified")]

A link leads from the thing before it to its own. Two tools identified the model or file where the two meet; only where
both sides are there and equal, and no person's word is in between, is a link `verified`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lopd_store.identity import ModelIdentity
from lopd_store.manifest import Inputs, Manifest
from lopd_store.provenance import CheckpointRecord, RolloutsRecord, SftProvenance, Status
from lopd_store.statistic import Statistic

# Broken: both sides are known, and differ. Recorded: a tool of ours wrote it down, and the other side is not here.
Mark = Literal["broken", "unknown", "declared", "recorded", "verified"]
MARKS: tuple[Mark, ...] = ("broken", "unknown", "declared", "recorded", "verified")  # from weak to strong
Records = Mapping[str, RolloutsRecord]  # by the digests of their files
_NOTHING: Records = {}
Thing = Literal["SFT data", "SFT checkpoint", "rollouts", "artifact", "student"]
_MADE: dict[Thing, str] = {
    "SFT data": "written by",
    "SFT checkpoint": "trained from",
    "rollouts": "sampled by",
    "artifact": "scored by",
    "student": "trained from",
}


@dataclass(frozen=True, kw_only=True)
class Link:
    """One thing of the chain, the model that made it, and how sure it is that it came of the thing before it."""

    thing: Thing
    mark: Mark
    reason: str
    model: ModelIdentity | None = None
    name: str | None = None  # of a checkpoint
    digest: str | None = None  # of the file, of the weights, or the artifact's fingerprint
    prompts: str | None = None  # digest
    audit: Statistic | None = None  # of the text at this link
    domain: str | None = None  # of the branch that it is in; None where all domains meet

    @property
    def made(self) -> str:
        """What the model did to make it: `written by`, `trained from`, `sampled by` or `scored by`."""
        return _MADE[self.thing]

    def to_json(self) -> dict[str, Any]:
        """A JSON object with one member per field, and `made`."""
        return {
            **vars(self),
            "made": self.made,
            "model": None if self.model is None else self.model.to_json(),
            "audit": None if self.audit is None else self.audit.to_json(),
        }


def of_manifest(manifest: Manifest, fingerprint: str, *, sft_data: Records = _NOTHING) -> tuple[Link, ...]:
    """The chain up to an artifact, one branch after the other where it has domains.

    `sft_data` are the records of files of SFT data by their digests, where they are at hand.
    """
    return tuple(
        replace(link, domain=one.domain) for one in manifest.inputs for link in _branch(one, fingerprint, sft_data)
    )


def of_checkpoint(
    record: CheckpointRecord,
    model: ModelIdentity,
    *,
    artifact: Manifest | None = None,
    sft_data: Records = _NOTHING,
) -> tuple[Link, ...]:
    """The chain up to a checkpoint, which `model` identifies as it lies there.

    `artifact` is the one whose fingerprint is `record.data`, `sft_data` as for `of_manifest`.
    """
    data = tuple(replace(_sft_data(one, sft_data), domain=one.domain) for one in record.sft)
    if record.method == "sft":
        return (*data, _held_to(_policy(record, record.sft, sft_data), record, model))
    if artifact is not None and record.data is not None:
        chain = of_manifest(artifact, record.data, sft_data=sft_data)
    else:
        lost = Link(thing="artifact", mark="unknown", reason="it is not here to look into", digest=record.data)
        chain = (*data, lost)
    return (*chain, _held_to(_student(record, artifact), record, model))


def weakest(links: Sequence[Link]) -> Mark:
    """How sure the whole chain is: as its weakest link."""
    return min((link.mark for link in links), key=MARKS.index)


def _branch(inputs: Inputs, fingerprint: str, sft_data: Records) -> tuple[Link, ...]:
    checkpoint = None if inputs.rollouts is None else inputs.rollouts.policy_checkpoint
    return (
        _sft_data(inputs.sft, sft_data),
        _policy(checkpoint, [inputs.sft], sft_data),
        _audited(_rollouts(inputs.rollouts, inputs.rollouts_file), inputs.rollouts_audit, "it did not sample them"),
        _audited(
            _artifact(inputs.teacher, inputs.sft, fingerprint),
            None if inputs.sft_audit is None else inputs.sft_audit.found,
            "the teacher did not write the SFT data",
        ),
    )


def _sft_data(sft: SftProvenance, records: Records) -> Link:
    record = records.get(sft.data or "")
    mark: Mark
    if sft.teacher is None:
        mark, reason = "unknown", "nothing says which teacher wrote it"
    elif record is not None and record.policy.differences(sft.teacher):
        mark, reason = "broken", "the file itself names another teacher"
    elif record is None:
        mark, reason = _recorded(sft.status, "the file is not here to compare")
    else:
        mark, reason = _verified([sft.status, record.status], "the file itself names this teacher")
    prompts = None if record is None else record.prompts
    return Link(thing="SFT data", mark=mark, reason=reason, model=sft.teacher, digest=sft.data, prompts=prompts)


def _policy(record: CheckpointRecord | None, sfts: Sequence[SftProvenance], records: Records) -> Link:
    """The reference policy, as the checkpoint that SFT on this data made."""
    mark: Mark
    if record is None:
        named = all(sft.status == "declared" for sft in sfts)
        mark = "declared" if named else "unknown"
        reason = "a person named the SFT data of this policy" if named else "nothing says how it was trained"
        return Link(thing="SFT checkpoint", mark=mark, reason=reason)
    trained_on = {record.data or sft.data for sft in record.sft} - {None}
    data = [records.get(sft.data or "") for sft in sfts]
    if record.method == "opd":
        mark, reason = _recorded(record.status, "it is a student itself; the artifact it learnt from is not here")
    elif trained_on and any(sft.data not in (None, *trained_on) for sft in sfts):
        mark, reason = "broken", "it was trained on other data"
    elif None in data:
        mark, reason = _recorded(record.status, "the data is not here to compare")
    else:
        statuses = [one.status for one in data if one is not None]
        mark, reason = _verified([*statuses, record.status], "this data is what it was trained on")
    return _checkpoint("SFT checkpoint", record, mark, reason)


def _rollouts(record: RolloutsRecord | None, digest: str) -> Link:
    mark: Mark
    if record is None:
        reason = "the file did not say who sampled it"
        return Link(thing="rollouts", mark="unknown", reason=reason, digest=digest)
    if record.policy_checkpoint is None:
        mark, reason = _recorded(record.status, "there is no checkpoint record to compare the policy with")
    elif differences := record.policy_checkpoint.model.differences(record.policy):
        mark, reason = "broken", f"the policy is not this checkpoint: {', '.join(differences)} differ"
    else:
        mark, reason = _verified([record.policy_checkpoint.status, record.status], "the policy is this checkpoint")
    return Link(thing="rollouts", mark=mark, reason=reason, model=record.policy, digest=digest, prompts=record.prompts)


def _artifact(teacher: ModelIdentity, sft: SftProvenance, fingerprint: str) -> Link:
    mark: Mark
    if sft.teacher is None:
        mark, reason = "recorded", "there is no SFT teacher to compare the teacher with"
    elif differences := sft.teacher.differences(teacher):
        mark, reason = "broken", f"the teacher is not the SFT teacher: {', '.join(differences)} differ"
    else:
        mark, reason = _verified([sft.status], "the teacher is the SFT teacher")
    return Link(thing="artifact", mark=mark, reason=reason, model=teacher, digest=fingerprint)


def _student(record: CheckpointRecord, artifact: Manifest | None) -> Link:
    mark: Mark
    rollouts = [] if artifact is None else [one.rollouts for one in artifact.inputs if one.rollouts is not None]
    differences = dict.fromkeys(name for one in rollouts for name in one.policy.differences(record.base))
    if artifact is None:
        mark, reason = _recorded(record.status, "the artifact is not here to compare")
    elif differences:
        mark, reason = "broken", f"it did not start as the policy: {', '.join(differences)} differ"
    elif len(rollouts) < len(artifact.inputs):
        mark, reason = _recorded(record.status, "there is no policy to compare its start with")
    else:
        mark, reason = _verified([*(one.status for one in rollouts), record.status], "it started as the policy")
    if record.overrides:
        reason += f"; trained with {', '.join(f'--{name}' for name in record.overrides)}"
    return _checkpoint("student", record, mark, reason)


def _audited(link: Link, audit: Statistic | None, otherwise: str) -> Link:
    """The link with what an audit found, broken where that speaks against it."""
    if audit is not None and audit.verdict == "inconsistent":
        return replace(link, mark="broken", reason=f"the audit finds that {otherwise}", audit=audit)
    return replace(link, audit=audit)


def _held_to(link: Link, record: CheckpointRecord, model: ModelIdentity) -> Link:
    """The link to a checkpoint, broken where its record lies beside another model than it speaks of."""
    if differences := record.model.differences(model):
        return replace(
            link, mark="broken", reason=f"its record speaks of another model: {', '.join(differences)} differ"
        )
    return link


def _checkpoint(thing: Thing, record: CheckpointRecord, mark: Mark, reason: str) -> Link:
    model = record.model
    return Link(thing=thing, mark=mark, reason=reason, model=record.base, name=model.name, digest=model.weights)


def _recorded(status: Status, reason: str) -> tuple[Mark, str]:
    """The mark of a link whose other side is not here."""
    return status, {"recorded": reason, "declared": "on a person's word", "unknown": "nobody knows"}[status]


def _verified(statuses: Sequence[Status], reason: str) -> tuple[Mark, str]:
    """The mark of a link whose two sides are equal: verified, where tools of ours wrote down both."""
    status = min(statuses, key=MARKS.index)
    return ("verified", reason) if status == "recorded" else _recorded(status, "")
