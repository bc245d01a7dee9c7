"""The plan of a build: everything that decides the bytes of an artifact, settled before the first token is scored.

Part borders follow from the rollouts alone, so one worker and sixty-four make the same parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lopd_store import layout
from lopd_store.container import MAX_VALUES
from lopd_store.encoding import Encoding
from lopd_store.errors import DataError, InputError
from lopd_store.identity import ModelIdentity, identify
from lopd_store.license import read_license
from lopd_store.manifest import Inputs, Scoring
from lopd_store.models import PROVENANCE_FILE, pick_device
from lopd_store.provenance import (
    SftProvenance,
    declared,
    parse_checkpoint_record,
    sft_of_checkpoint,
    sft_of_data,
    sft_of_policy,
)
from lopd_store.rollouts import RolloutsFile

MAX_PART_POSITIONS = 1 << 20
MIN_PART_POSITIONS = 1 << 13
_PARTS_WANTED = 16  # enough to share among workers and to lose little when killed


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that decides the bytes of an artifact, settled before the first token is scored."""

    teacher_path: str  # where to load it; not part of what is planned
    rollouts_path: str  # likewise
    reference_path: str | None  # likewise
    sft_data_path: str | None  # likewise
    sft_data: str | None  # digest of the SFT data to audit
    inputs: Inputs
    encoding: Encoding
    reference_logprobs: bool
    text: bool
    device: str
    threads: int
    batch_tokens: int
    parts: tuple[tuple[int, int], ...]  # rows [start, stop) of each part

    def to_json(self) -> dict[str, Any]:
        """What plan.json holds; equal plans make equal artifacts."""
        return {
            "teacher": self.inputs.teacher.to_json(),
            "rollouts": self.inputs.rollouts_file,
            "sft": self.inputs.sft.to_json(),
            "sft_data": self.sft_data,
            "encoding": self.encoding.to_json(),
            "scoring": self.inputs.scoring.to_json(),
            "text": self.text,
            "device": self.device,
            "threads": self.threads,
            "batch_tokens": self.batch_tokens,
            "parts": [list(part) for part in self.parts],
        }


def make_plan(
    *,
    teacher: str,
    rollouts: Path,
    sft: Path | None,
    sft_data: Path | None = None,
    encoding: Encoding,
    scoring: Scoring,
    reference: str | None = None,
    text: bool = True,
    device: str | None = None,
    threads: int = 1,
    batch_tokens: int = 4096,
    part_positions: int | None = None,
) -> Plan:
    """Read the inputs, check what can be checked before scoring, and draw the borders of the parts."""
    for name, number in (("threads", threads), ("batch_tokens", batch_tokens)):
        if number < 1:
            raise InputError(f"`{name}` is out of range", expected="1 or more", actual=number)
    file = RolloutsFile(rollouts)
    if len(file) == 0:
        raise DataError(f"`{rollouts}` has no rollouts", hint="sample some with `lopd-store generate`")
    identity = identify(teacher)
    _check_tokenizer(file, identity)
    if reference is not None:
        _check_reference(file, reference)
    provenance = _sft_provenance(file, sft_data if sft is None else sft)
    return Plan(
        teacher_path=teacher,
        rollouts_path=str(rollouts),
        reference_path=reference,
        sft_data_path=None if sft_data is None else str(sft_data),
        sft_data=None if sft_data is None else _sft_data_digest(sft_data, provenance),
        inputs=Inputs(
            teacher=identity,
            license=read_license(teacher),
            scoring=scoring,
            sft=provenance,
            rollouts_file=file.digest(),
            rollouts=file.record,
        ),
        encoding=encoding,
        reference_logprobs=file.has_logprobs() or reference is not None,
        text=text,
        device=pick_device(device),
        threads=threads,
        batch_tokens=batch_tokens,
        parts=part_borders(file.response_lengths.tolist(), part_positions, most_entries=encoding.most_entries),
    )


def part_borders(
    response_lengths: Sequence[int], part_positions: int | None = None, *, most_entries: int = 1
) -> tuple[tuple[int, int], ...]:
    """Rows [start, stop) of each part: whole rollouts, each part closed once it has `part_positions` positions.

    A part has at most `MAX_VALUES` entries, so one with a great `k_max` has fewer positions.
    """
    room = MAX_VALUES // most_entries
    if (too_long := next((row for row, length in enumerate(response_lengths) if 2 * length > room), None)) is not None:
        raise DataError(
            f"rollout {too_long} has too many positions for this `k_max`",
            expected=f"at most {room // 2}",
            actual=response_lengths[too_long],
        )
    limit = min(MAX_PART_POSITIONS, room // 2)
    if part_positions is None:
        wanted = sum(response_lengths) // _PARTS_WANTED
        part_positions = min(max(wanted, MIN_PART_POSITIONS), limit)
    elif not 1 <= part_positions <= limit:
        raise InputError("`part_positions` is out of range", expected=f"1 to {limit}", actual=part_positions)
    borders, start, positions = [], 0, 0
    for row, length in enumerate(response_lengths):
        positions += length
        if positions >= part_positions:
            borders.append((start, row + 1))
            start, positions = row + 1, 0
    if start < len(response_lengths):
        borders.append((start, len(response_lengths)))
    if len(borders) > layout.MAX_PARTS:
        raise InputError(f"{len(borders)} parts are too many", expected=f"at most {layout.MAX_PARTS}")
    return tuple(borders)


def read_sft(path: Path, policy: ModelIdentity | None) -> SftProvenance:
    """What `build --sft RECORD` names: SFT data (Parquet), a checkpoint directory, or a checkpoint record.

    It is `declared` where only the user's word ties it to the policy that sampled the rollouts. Raises InputError
    where it is the record of another checkpoint.
    """
    if path.is_dir():
        path = path / PROVENANCE_FILE
    if not path.is_file():
        raise InputError(f"no SFT provenance at `{path}`", hint="name SFT data, a checkpoint directory, or its record")
    if path.suffix == ".parquet":
        file = RolloutsFile(path)
        return declared(sft_of_data(file.record, file.digest()))
    record = parse_checkpoint_record(path.read_bytes(), where=str(path))
    if policy is None:
        return declared(sft_of_checkpoint(record))
    policy.require(
        record.model,
        f"`--sft {path}` is the record of another checkpoint than the policy that sampled the rollouts",
        hint="name the checkpoint that sampled the rollouts, or the SFT data that it was trained on",
    )
    return sft_of_checkpoint(record)


def _sft_provenance(file: RolloutsFile, sft: Path | None) -> SftProvenance:
    carried = sft_of_policy(file.record)
    if sft is None:
        return carried
    named = read_sft(sft, None if file.record is None else file.record.policy)
    if carried.teacher and named.teacher and (differences := carried.teacher.differences(named.teacher)):
        raise InputError(
            f"`--sft {sft}` names another teacher than the rollouts themselves",
            expected=f"{carried.teacher.name}, as recorded in `{file.path}`",
            actual=f"{named.teacher.name}, which differs in {', '.join(differences)}",
            hint="leave `--sft` out: the rollouts carry the record of their policy",
        )
    if carried.teacher is not None:
        return carried
    is_recorded = file.record is not None and file.record.status == "recorded"
    return named if is_recorded else declared(named)  # of a policy that only a person's word ties to these rollouts


def _sft_data_digest(path: Path, sft: SftProvenance) -> str:
    """The digest of the SFT data to audit, which must be what the policy was trained on, where that is known."""
    digest = RolloutsFile(path).digest()
    if sft.data not in (None, digest):
        raise InputError(
            f"`{path}` is not the SFT data of the reference policy",
            expected=sft.data,
            actual=digest,
            hint="name the file that the reference policy was trained on, or leave `--sft-data` out",
        )
    return digest


def _check_tokenizer(file: RolloutsFile, teacher: ModelIdentity) -> None:
    if file.record is None:
        return
    policy = file.record.policy
    if policy.tokenizer != teacher.tokenizer:
        raise DataError(
            f"the rollouts in `{file.path}` were tokenised by another tokenizer than the teacher's",
            expected=f"{teacher.tokenizer}  ({teacher.name})",
            actual=f"{policy.tokenizer}  ({policy.name})",
            hint="score with a teacher that shares the student's tokenizer",
        )


def _check_reference(file: RolloutsFile, reference: str) -> None:
    """The model beside the teacher must be the policy that sampled the rollouts, or its log-probs mean nothing."""
    if file.record is None:
        raise InputError(
            f"`{file.path}` does not say which policy sampled it, so `{reference}` may be another",
            hint="sample the rollouts with `lopd-store generate`, which records the policy",
        )
    file.record.policy.require(identify(reference), f"`{reference}` is not the policy that sampled the rollouts")
