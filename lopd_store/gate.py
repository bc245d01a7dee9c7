"""The gate: may this student be trained from this artifact?

    verdict = judge(manifest.inputs, student=identify("sft/"))     # each domain by itself
    verdict.state       # "consistent", "inconsistent" or "unknown"

Lightning OPD is unbiased only if the teacher that wrote the SFT data is the one that scored the rollouts
(arXiv 2604.13010, section on teacher consistency). One pure function decides; `enforce` refuses for it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lopd_store.errors import ConsistencyError
from lopd_store.identity import TOKENIZER_FIELDS, ModelIdentity
from lopd_store.manifest import Inputs
from lopd_store.statistic import Statistic

State = Literal["consistent", "inconsistent", "unknown"]
ALLOW_UNKNOWN = "allow-unknown-sft-teacher"
ALLOW_INCONSISTENT = "allow-inconsistent-teacher"
OVERRIDES = (ALLOW_UNKNOWN, ALLOW_INCONSISTENT)
Subject = Literal["teacher", "SFT data", "rollouts", "student", "tokenizer"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One comparison that did not come out equal, with the two identities side by side, or what an audit found."""

    subject: Subject
    state: State
    reason: str
    expected: ModelIdentity | None
    actual: ModelIdentity | None
    differences: tuple[str, ...]
    audit: Statistic | None = None  # of text that is not what `expected` samples

    @property
    def sides(self) -> tuple[str, str]:
        """What was expected and what was found, in a line each."""
        expected = describe(self.expected, self.differences)
        if self.audit is not None:
            return f"samples of {expected}", str(self.audit)
        return expected, describe(self.actual, self.differences)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the gate found; consistent where there are no findings."""

    findings: tuple[Finding, ...]

    @property
    def state(self) -> State:
        """The worst of the findings: inconsistent before unknown before consistent."""
        states = {finding.state for finding in self.findings}
        return "inconsistent" if "inconsistent" in states else "unknown" if states else "consistent"


def judge(inputs: Sequence[Inputs], student: ModelIdentity | None = None) -> Verdict:
    """Compare SFT teacher with scoring teacher and, given a student, reference policy and tokenizers with it.

    Each domain is compared by itself; what is not found of all of them names those that it is found of. What was
    audited when the artifact was built speaks, too, and against every record.
    """
    found = [(one, compare(one)) for one in inputs for compare in (_teacher, _sft_data, _rollouts)]
    if student is not None:
        found += [(one, _student(one, student)) for one in inputs]
        found += [(one, _tokenizer(inputs[0], student)) for one in inputs]  # all teachers have one
    domains: dict[Finding, list[str]] = {}
    for one, finding in found:
        if finding is not None:
            domains.setdefault(finding, []).append(one.domain or "")
    return Verdict(
        findings=tuple(
            finding if len(of) == len(inputs) else _in_domains(finding, of) for finding, of in domains.items()
        )
    )


def enforce(verdict: Verdict, overrides: Collection[str] = ()) -> tuple[str, ...]:
    """Raise ConsistencyError unless consistent; returns the overrides that were needed, to be written down.

    A tokenizer that differs is never overridden: ids would mean other text.
    """
    used: list[str] = []
    for finding in verdict.findings:
        override = ALLOW_UNKNOWN if finding.state == "unknown" else ALLOW_INCONSISTENT
        allowed = finding.subject != "tokenizer"
        if not (allowed and override in overrides):
            expected, actual = finding.sides
            raise ConsistencyError(
                f"teacher consistency is {finding.state}: {finding.reason}",
                expected=expected,
                actual=actual,
                hint=_hint(finding, override if allowed else None),
            )
        used.append(override)
    return tuple(sorted(set(used)))


def _in_domains(finding: Finding, domains: Sequence[str]) -> Finding:
    """The finding with the domains that it is found of at the head of its reason."""
    return replace(finding, reason=f"domain{'s' * (len(domains) > 1)} {', '.join(domains)}: {finding.reason}")


def _teacher(inputs: Inputs) -> Finding | None:
    if inputs.sft.teacher is None:
        return Finding(
            subject="teacher",
            state="unknown",
            reason="nothing says which teacher wrote the SFT data of the reference policy",
            expected=inputs.teacher,
            actual=None,
            differences=(),
        )
    if differences := inputs.sft.teacher.differences(inputs.teacher):
        return Finding(
            subject="teacher",
            state="inconsistent",
            reason="the SFT data was written by another teacher than the one that scored the rollouts"
            + _explained(inputs.sft.teacher, inputs.teacher),
            expected=inputs.sft.teacher,
            actual=inputs.teacher,
            differences=differences,
        )
    return None


def _sft_data(inputs: Inputs) -> Finding | None:
    if inputs.sft_audit is None or inputs.sft_audit.found.verdict != "inconsistent":
        return None
    return Finding(
        subject="SFT data",
        state="inconsistent",
        reason="the audit finds that the teacher did not write the SFT data",
        expected=inputs.teacher,
        actual=None,
        differences=(),
        audit=inputs.sft_audit.found,
    )


def _rollouts(inputs: Inputs) -> Finding | None:
    if inputs.rollouts_audit is None or inputs.rollouts_audit.verdict != "inconsistent":
        return None
    return Finding(
        subject="rollouts",
        state="inconsistent",
        reason="the audit finds that the reference policy did not sample the rollouts",
        expected=None if inputs.rollouts is None else inputs.rollouts.policy,
        actual=None,
        differences=(),
        audit=inputs.rollouts_audit,
    )


def _student(inputs: Inputs, student: ModelIdentity) -> Finding | None:
    if inputs.rollouts is None or inputs.rollouts.status == "unknown":
        return Finding(
            subject="student",
            state="unknown",
            reason="nothing says which reference policy sampled the rollouts",
            expected=None,
            actual=student,
            differences=(),
        )
    reference = inputs.rollouts.policy
    if differences := reference.differences(student):
        return Finding(
            subject="student",
            state="inconsistent",
            reason="the student is not the reference policy that sampled the rollouts" + _explained(reference, student),
            expected=reference,
            actual=student,
            differences=differences,
        )
    return None


def _tokenizer(inputs: Inputs, student: ModelIdentity) -> Finding | None:
    differences = tuple(name for name in inputs.teacher.differences(student) if name in TOKENIZER_FIELDS)
    if not differences:
        return None
    return Finding(
        subject="tokenizer",
        state="inconsistent",
        reason="the student's tokenizer is not the teacher's",
        expected=inputs.teacher,
        actual=student,
        differences=differences,
    )


def _explained(expected: ModelIdentity, actual: ModelIdentity) -> str:
    """What is known of a difference, to follow the reason."""
    if expected.is_rounding_of(actual):
        return " (the same values in another precision)"
    if expected.quantization != actual.quantization:
        return f" (quantised: {expected.quantization or 'no'} and {actual.quantization or 'no'})"
    if expected.adapter != actual.adapter:
        return " (with another adapter)"
    return ""


def describe(identity: ModelIdentity | None, differences: tuple[str, ...]) -> str:
    """An identity in one line: its name and the fields in question, digests cut short."""
    if identity is None:
        return "unknown"
    shown = [f"{name} {_short(getattr(identity, name))}" for name in differences or ("weights",)]
    return f"{identity.name}  ({', '.join(shown)})"


def _short(value: object) -> str:
    text = str(value)
    return f"{text[7:19]}…" if text.startswith("sha256:") else text


def _hint(finding: Finding, override: str | None) -> str:
    remedy = {
        "teacher": {
            "unknown": "name the SFT data or the SFT checkpoint with `lopd-store build --sft …`",
            "inconsistent": "score the rollouts with the teacher that wrote the SFT data",
        },
        "SFT data": {"inconsistent": "look at `lopd-store audit --model TEACHER --data SFT_DATA`, and who wrote it"},
        "rollouts": {"inconsistent": "sample new ones with `lopd-store generate`, or declare how they were sampled"},
        "student": {
            "unknown": "sample the rollouts with `lopd-store generate`, which records the policy",
            "inconsistent": "start from the checkpoint that sampled the rollouts, or sample new ones",
        },
        "tokenizer": {"inconsistent": "use a student with the teacher's tokenizer"},
    }[finding.subject][finding.state]
    return remedy if override is None else f"{remedy}; or, knowing that the gradient is biased, pass `--{override}`"
