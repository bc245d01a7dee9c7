"""One part, from rollouts to files: scored by the teacher, rounded, written, read back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from lopd_store import layout, strictjson, topk
from lopd_store.digest import FileDigests, digest_contents
from lopd_store.durable import write_durably
from lopd_store.errors import DataError
from lopd_store.manifest import Counts, PartEntry, audited_at
from lopd_store.part import Part, read_part, rollouts_file, round_part, tokens_file, topk_file
from lopd_store.plan import Plan
from lopd_store.rollouts import Rollout, RolloutsFile
from lopd_store.statistic import Statistic, of_stored
from lopd_store.teachers import RolloutScores, Teacher
from lopd_store.topk import TopK

DONE = "done"


def score_part(
    plan: Plan, teacher: Teacher, number: int, on_positions: Callable[[int], None]
) -> tuple[Part, dict[str, Any]]:
    """One part in memory, rounded as it will be stored, and the columns of its rollouts table."""
    start, stop = plan.parts[number]
    rollouts = RolloutsFile(plan.rollouts_path).read(start, stop)
    for row, rollout in enumerate(rollouts, start=start):
        _check_rollout(rollout, f"rollout {row}", plan.inputs.teacher.vocab_size, teacher.context_length)
    encoding = plan.encoding
    sampled: list[Any] = [None] * len(rollouts)
    kept: list[Any] = [None] * len(rollouts)
    entropies = np.zeros(len(rollouts), np.float32)
    for index, scores in teacher.score(rollouts, encoding.k_max):
        _check_scores(scores, rollouts[index], f"rollout {start + index}")
        sampled[index] = np.minimum(scores.sampled_logprobs, 0)
        kept[index] = topk.select(
            replace(scores.candidates, logprobs=np.minimum(scores.candidates.logprobs, 0)),
            k_min=encoding.k_min,
            k_max=encoding.k_max,
            coverage=encoding.coverage,
        )
        if rollouts[index].logprobs is None:
            rollouts[index] = replace(rollouts[index], logprobs=scores.reference_sampled_logprobs)
        entropies[index] = scores.entropies.mean() if len(scores.entropies) else 0
        on_positions(len(scores.sampled_logprobs))
    offsets = np.zeros(len(rollouts) + 1, np.int64)
    np.cumsum([len(rollout.prompt_ids) + len(rollout.response_ids) for rollout in rollouts], out=offsets[1:])
    part = Part(
        rollout_offsets=offsets,
        prompt_lengths=np.array([len(rollout.prompt_ids) for rollout in rollouts], np.int32),
        token_ids=np.concatenate([rollout.token_ids for rollout in rollouts]),
        loss_mask=np.concatenate([rollout.loss_mask for rollout in rollouts]),
        sampled_logprobs=np.concatenate(sampled).astype(np.float32),
        reference_logprobs=_reference_logprobs(rollouts) if plan.reference_logprobs else None,
        topk=topk.concatenate(kept),
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
        "mean_entropy": entropies,
    }
    return round_part(part, encoding), columns


def write_part(plan: Plan, building: Path, number: int, part: Part, columns: dict[str, Any]) -> None:
    """Write the files of a part, after decoding them again, and note it as done; the note comes last."""
    contents = {
        layout.ROLLOUTS: rollouts_file(columns),
        layout.TOKENS: tokens_file(part, plan.encoding),
        layout.TOPK: topk_file(part, plan.encoding),
    }
    where = layout.part_name(number)
    read = read_part(contents[layout.TOKENS], contents[layout.TOPK], plan.encoding, part.counts, where=where)
    _check_written(part, read)
    for kind, data in contents.items():
        write_durably(building / layout.part_file(number, kind), data)
    files = {kind: asdict(digest_contents(data)) for kind, data in contents.items()}
    audited = _audit(plan, read)
    note = {"counts": part.counts.to_json(), "files": files, "audit": None if audited is None else audited.sums()}
    write_durably(_note(building, number), strictjson.pretty(note))


def is_done(building: Path, number: int) -> bool:
    """Whether a part is written, all three files of it."""
    return _note(building, number).is_file()


def read_note(building: Path, number: int) -> tuple[PartEntry, Statistic | None]:
    """What the manifest will say of a part that is done, and what the audit of its rollouts found."""
    path = _note(building, number)
    note = strictjson.loads(path.read_bytes(), where=str(path))
    files = {kind: FileDigests(**digests) for kind, digests in note["files"].items()}
    audited = None if note["audit"] is None else Statistic.from_json(note["audit"], where=str(path))
    return PartEntry(counts=Counts(**note["counts"]), files=files), audited


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


def _note(building: Path, number: int) -> Path:
    return building / DONE / f"{number:05d}.json"


def _check_rollout(rollout: Rollout, where: str, vocab_size: int, context_length: int | None) -> None:
    length = len(rollout.prompt_ids) + len(rollout.response_ids)
    if len(rollout.prompt_ids) == 0:
        raise DataError(f"{where} has no prompt", expected="one token at least: the first token has no distribution")
    if int(rollout.token_ids.max()) >= vocab_size:
        raise DataError(
            f"{where} has an id that the teacher's tokenizer does not know",
            expected=f"below {vocab_size}",
            actual=int(rollout.token_ids.max()),
        )
    if context_length is not None and length > context_length:
        raise DataError(
            f"{where} is longer than the teacher's context",
            expected=f"at most {context_length} tokens",
            actual=f"{len(rollout.prompt_ids)} prompt + {len(rollout.response_ids)} response tokens",
            hint="leave it out; a rollout is never cut",
        )


def _check_scores(scores: RolloutScores, rollout: Rollout, where: str) -> None:
    candidates = {name: column for name, column in vars(scores.candidates).items() if column is not None}
    rows = {len(scores.sampled_logprobs), *map(len, candidates.values())}
    if rows != {len(rollout.response_ids)}:
        raise DataError(
            f"{where}: the teacher gave another number of rows", expected=len(rollout.response_ids), actual=rows
        )
    if any(np.isnan(column).any() for column in (scores.sampled_logprobs, *candidates.values())):
        raise DataError(f"{where}: the teacher gave log-probs that are not numbers", hint="try `--dtype float32`")


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
