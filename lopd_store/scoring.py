"""One part, from rollouts to files: scored by the teacher, rounded, written, read back."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lopd_store import layout, strictjson, topk
from lopd_store.digest import FileDigests, digest_contents
from lopd_store.durable import write_durably
from lopd_store.errors import DataError
from lopd_store.manifest import Counts, PartEntry, audited_at
from lopd_store.part import Part, read_part, rollouts_file, round_part, tokens_file, topk_file
from lopd_store.plan import Plan
from lopd_store.rollouts import Rollout, RolloutsFile
from lopd_store.statistic import Statistic, of_stored
from lopd_store.survey import BadRollout, OnBad, bad_rollout, check_rollout
from lopd_store.teachers import RolloutScores, Teacher
from lopd_store.topk import Floats, TopK

DONE = "done"

OnScored = Callable[[int, int], None]  # tokens and positions of a rollout


@dataclass(frozen=True, kw_only=True)
class ScoredPart:
    """A part that the teacher is done with; what else is to be done with it waits until somebody asks."""

    plan: Plan
    number: int
    scored: tuple[_Scored, ...]
    skipped: tuple[BadRollout, ...]  # that only scoring showed to be bad
    padding: float | None  # mass on ids beyond the tokenizer's, added up over its positions; None where nobody knows
    seconds: float  # that scoring took

    @property
    def part(self) -> Part:
        """The part, rounded as it will be stored."""
        return self._assembled[0]

    @property
    def columns(self) -> dict[str, Any]:
        """Of its rollouts table."""
        return self._assembled[1]

    @cached_property
    def _assembled(self) -> tuple[Part, dict[str, Any]]:
        part, columns = _assemble(self.plan, self.scored)
        return round_part(part, self.plan.encoding), columns


@dataclass(frozen=True, kw_only=True)
class DoneNote:
    """What is noted of a part that is written."""

    plan: str  # digest
    counts: Counts
    files: dict[str, FileDigests]  # by kind
    audit: Statistic | None  # of its rollouts under the reference policy
    skipped: tuple[BadRollout, ...]
    padding: float | None
    seconds: float

    @property
    def entry(self) -> PartEntry:
        """What the manifest will say of it."""
        return PartEntry(counts=self.counts, files=self.files)

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(file.size for file in self.files.values())

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        audit = None if self.audit is None else self.audit.sums()
        return {**asdict(self), "audit": audit, "skipped": [list(astuple(bad)) for bad in self.skipped]}

    @classmethod
    def from_json(cls, value: Any, *, where: str) -> DoneNote:
        """Read what `to_json` gave."""
        value = strictjson.members(value, [item.name for item in fields(cls)], where=where)
        return cls(
            plan=value["plan"],
            counts=Counts(**value["counts"]),
            files={kind: FileDigests(**digests) for kind, digests in value["files"].items()},
            audit=None if value["audit"] is None else Statistic.from_json(value["audit"], where=where),
            skipped=tuple(BadRollout(row=row, why=why) for row, why in value["skipped"]),
            padding=value["padding"],
            seconds=value["seconds"],
        )


def read_rollouts(plan: Plan, number: int) -> dict[int, Rollout]:
    """The rollouts of a part by their rows, without those that the plan skips."""
    part = plan.parts[number]
    skipped = {bad.row for bad in plan.skipped if part.start <= bad.row < part.stop}
    rows = (row for row in range(part.start, part.stop) if row not in skipped)
    return dict(zip(rows, RolloutsFile(plan.rollouts_path).read(part.start, part.stop, skip=skipped), strict=True))


def score_part(
    plan: Plan,
    teacher: Teacher,
    number: int,
    on_scored: OnScored,
    *,
    rollouts: dict[int, Rollout] | None = None,
    on_bad: OnBad = "fail",
) -> ScoredPart:
    """Score one part; its rollouts are read from the file of the plan where they are not given, by their rows.

    What is kept of a rollout is chosen in a second thread, while the teacher scores the next ones.
    """
    started = time.monotonic()
    by_row = read_rollouts(plan, number) if rollouts is None else rollouts
    limits = plan.limits(teacher.context_length)
    skipped: list[BadRollout] = []

    def bad(row: int, error: DataError) -> None:
        if on_bad == "fail":
            raise error
        skipped.append(bad_rollout(row, error))

    for row, rollout in list(by_row.items()):
        try:
            check_rollout(rollout, row, limits)  # again: an engine may have less room than the config says
        except DataError as error:
            bad(row, error)
            del by_row[row]
    rows, chosen = list(by_row), dict[int, Future[_Scored]]()
    with ThreadPoolExecutor(1) as behind:
        for index, scores in teacher.score([by_row[row] for row in rows], plan.encoding.k_max):
            row = rows[index]
            _check_rows(scores, by_row[row], row)
            try:
                _check_numbers(scores, row)
            except DataError as error:
                bad(row, error)
            else:
                chosen[row] = behind.submit(_select, plan, by_row[row], scores)
            on_scored(len(by_row[row].prompt_ids) + len(scores.sampled_logprobs), len(scores.sampled_logprobs))
    if not chosen:
        raise DataError(f"nothing is left of part {number}", actual=f"{skipped[0]}, and so on")
    kept = tuple(chosen[row].result() for row in rows if row in chosen)
    padding = [one.padding for one in kept if one.padding is not None]
    return ScoredPart(
        plan=plan,
        number=number,
        scored=kept,
        skipped=tuple(sorted(skipped, key=lambda one: one.row)),
        padding=sum(padding) if len(padding) == len(kept) else None,
        seconds=time.monotonic() - started,
    )


def keep_part(plan: Plan, building: Path, scored: ScoredPart) -> DoneNote:
    """All that follows the teacher: encode a part, write its files, and note it as done."""
    contents = part_files(plan, scored)
    note = note_of(plan, scored, contents)
    write_part(building, scored.number, contents, note)
    return note


def part_files(plan: Plan, scored: ScoredPart) -> dict[str, bytes]:
    """The bytes of the three files of a part by kind, after decoding them again."""
    part = scored.part
    contents = {
        layout.ROLLOUTS: rollouts_file(scored.columns),
        layout.TOKENS: tokens_file(part, plan.encoding),
        layout.TOPK: topk_file(part, plan.encoding),
    }
    where = layout.part_name(scored.number)
    read = read_part(contents[layout.TOKENS], contents[layout.TOPK], plan.encoding, part.counts, where=where)
    _check_written(part, read)
    return contents


def note_of(plan: Plan, scored: ScoredPart, contents: dict[str, bytes]) -> DoneNote:
    """What is to be noted of a part with these files."""
    return DoneNote(
        plan=plan.digest,
        counts=scored.part.counts,
        files={kind: digest_contents(data) for kind, data in contents.items()},
        audit=_audit(plan, scored.part),
        skipped=scored.skipped,
        padding=scored.padding,
        seconds=round(scored.seconds, 3),
    )


def write_part(building: Path, number: int, contents: dict[str, bytes], note: DoneNote) -> None:
    """Write the files of a part and note it as done; the note comes last."""
    for kind, data in contents.items():
        write_durably(building / layout.part_file(number, kind), data)
    write_durably(note_path(building, number), strictjson.pretty(note.to_json()))


def is_done(building: Path, number: int) -> bool:
    """Whether a part is written, all three files of it."""
    return note_path(building, number).is_file()


def read_note(building: Path, number: int) -> DoneNote:
    """What was noted of a part that is done."""
    path = note_path(building, number)
    return DoneNote.from_json(strictjson.loads(path.read_bytes(), where=str(path)), where=str(path))


def note_path(building: Path, number: int) -> Path:
    """The note that says that a part is done."""
    return building / DONE / f"{number:05d}.json"


@dataclass(frozen=True, kw_only=True)
class _Scored:
    """One rollout with what is kept of its scores."""

    rollout: Rollout
    sampled_logprobs: Floats  # [positions]
    topk: TopK
    mean_entropy: float | None
    padding: float | None  # added up over the positions


def _audit(plan: Plan, part: Part) -> Statistic | None:
    """The rollouts of a part under the reference policy, as far as what is stored of it can tell."""
    temperature = audited_at(plan.encoding, plan.inputs.rollouts)
    if temperature is None:
        return None
    stored = part.topk
    assert stored is not None and stored.reference_logprobs is not None and stored.reference_tail_logprobs is not None
    return of_stored(
        stored.counts,
        stored.reference_logprobs,
        stored.reference_tail_logprobs,
        stored.ids == part.response_ids[stored.positions],
        part.loss_mask,
        temperature,
    )


def _select(plan: Plan, rollout: Rollout, scores: RolloutScores) -> _Scored:
    encoding, positions = plan.encoding, len(rollout.response_ids)
    if rollout.logprobs is None:
        rollout = replace(rollout, logprobs=scores.reference_sampled_logprobs)
    return _Scored(
        rollout=rollout,
        sampled_logprobs=np.minimum(scores.sampled_logprobs, 0),
        topk=topk.select(
            replace(scores.candidates, logprobs=np.minimum(scores.candidates.logprobs, 0)),
            k_min=encoding.k_min,
            k_max=encoding.k_max,
            coverage=encoding.coverage,
        ),
        mean_entropy=None if scores.entropies is None else float(scores.entropies.mean()) if positions else 0.0,
        padding=None if scores.padding is None else float(scores.padding.sum(dtype=np.float64)),
    )


def _assemble(plan: Plan, scored: Sequence[_Scored]) -> tuple[Part, dict[str, Any]]:
    """The part, unrounded, and the columns of its rollouts table."""
    rollouts = [one.rollout for one in scored]
    offsets = np.zeros(len(rollouts) + 1, np.int64)
    np.cumsum([len(rollout.prompt_ids) + len(rollout.response_ids) for rollout in rollouts], out=offsets[1:])
    sampled = [one.sampled_logprobs for one in scored]
    part = Part(
        rollout_offsets=offsets,
        prompt_lengths=np.array([len(rollout.prompt_ids) for rollout in rollouts], np.int32),
        token_ids=np.concatenate([rollout.token_ids for rollout in rollouts]),
        loss_mask=np.concatenate([rollout.loss_mask for rollout in rollouts]),
        sampled_logprobs=np.concatenate(sampled).astype(np.float32),
        reference_logprobs=_reference_logprobs(rollouts) if plan.reference_logprobs else None,
        topk=topk.concatenate([one.topk for one in scored]),
    )
    text = {
        "prompt": [rollout.prompt for rollout in rollouts],
        "response": [rollout.response for rollout in rollouts],
    }
    columns = {
        **(text if plan.text else {}),
        "finish_reason": [rollout.finish_reason for rollout in rollouts],
        "prompt_length": part.prompt_lengths,
        "response_length": np.array([len(rollout.response_ids) for rollout in rollouts], np.int32),
        "mean_sampled_logprob": np.array([values.mean() if len(values) else 0 for values in sampled], np.float32),
        "mean_entropy": pa.array([one.mean_entropy for one in scored], pa.float32()),
    }
    return part, columns


def _check_rows(scores: RolloutScores, rollout: Rollout, row: int) -> None:
    candidates = [column for column in vars(scores.candidates).values() if column is not None]
    rows = {len(scores.sampled_logprobs), *map(len, candidates)}
    if rows != {len(rollout.response_ids)}:
        raise DataError(
            f"rollout {row}: the teacher gave another number of rows", expected=len(rollout.response_ids), actual=rows
        )


def _check_numbers(scores: RolloutScores, row: int) -> None:
    candidates = [column for column in vars(scores.candidates).values() if column is not None]
    if any(np.isnan(column).any() for column in (scores.sampled_logprobs, *candidates)):
        raise DataError(
            f"rollout {row}: the teacher gave log-probs that are not numbers",
            hint="try `--dtype float32`; `--on-bad-rollout skip` leaves it out",
        )


def _reference_logprobs(rollouts: list[Rollout]) -> Any:
    pieces = [rollout.logprobs for rollout in rollouts if rollout.logprobs is not None]
    return np.concatenate([np.zeros(0, np.float32), *pieces])


def _check_written(part: Part, read: Part) -> None:
    """The writer's own check: what was written decodes to what was meant."""
    assert part.topk is not None and read.topk is not None
    pairs: list[tuple[object, object, str]] = [(part, read, field.name) for field in fields(Part)]
    pairs += [(part.topk, read.topk, field.name) for field in fields(TopK)]
    for wanted, found, name in pairs:
        values = getattr(wanted, name)
        assert not isinstance(values, np.ndarray) or np.array_equal(values, getattr(found, name)), name
