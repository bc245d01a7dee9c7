"""Building an artifact: plan, score part by part, seal.

    build(teacher="teacher", rollouts="rollouts.parquet", output="artifact")

Until it is sealed the build lives in `artifact.building`, where plan.json says what is to be made and `done/` which
parts are. Killed at any moment, the same call goes on with the next part. Part boundaries and batches follow from the
rollouts alone, and every worker uses the same number of threads, so any number of workers makes the same bytes.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from lopd_store import layout, reader, strictjson, topk
from lopd_store.card import render_card
from lopd_store.digest import FileDigests, digest_bytes, digest_json
from lopd_store.encoding import Encoding, make_encoding
from lopd_store.errors import DataError, InputError
from lopd_store.identity import ModelIdentity, identify
from lopd_store.manifest import Counts, Inputs, Manifest, PartEntry, Scoring, render
from lopd_store.part import Part, read_part, rollouts_file, round_part, tokens_file, topk_file
from lopd_store.provenance import SftProvenance, read_sft, sft_of_policy
from lopd_store.rollouts import Rollout, RolloutsFile
from lopd_store.teachers import RolloutScores, Teacher, load

OnProgress = Callable[[int, int], None]  # positions scored so far, positions in all
MAX_PART_POSITIONS = 1 << 20
MIN_PART_POSITIONS = 1 << 13
_PARTS_WANTED = 16  # enough to share among workers and to lose little when killed
_PLAN = "plan.json"
_DONE = "done"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that decides the bytes of an artifact, settled before the first token is scored."""

    teacher_path: str  # where to load it; not part of what is planned
    rollouts_path: str  # likewise
    inputs: Inputs
    encoding: Encoding
    reference_logprobs: bool
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
            "encoding": self.encoding.to_json(),
            "scoring": self.inputs.scoring.to_json(),
            "device": self.device,
            "threads": self.threads,
            "batch_tokens": self.batch_tokens,
            "parts": [list(part) for part in self.parts],
        }


def build(
    *,
    teacher: str | Path,
    rollouts: str | Path,
    output: str | Path,
    sft: str | Path | None = None,
    exact: bool = False,
    k_min: int = 1,
    k_max: int = 64,
    coverage: float = 0.99,
    engine: str = "transformers",
    dtype: str = "float32",
    device: str | None = None,
    workers: int | None = 1,
    threads: int = 1,
    batch_tokens: int = 4096,
    part_positions: int | None = None,
    on_progress: OnProgress | None = None,
) -> reader.Artifact:
    """Score rollouts with the teacher and seal the result as an artifact, which is returned opened.

    `sft` names the SFT data, checkpoint or record where the rollouts do not carry it. `workers` is the number of
    processes, None for one per processor (a script that asks for several needs `if __name__ == "__main__":`);
    `threads` is the number of CPU threads of each, which unlike `workers` can change the last bits of a log-prob.
    """
    output = Path(output)
    if output.exists():
        raise InputError(f"`{output}` exists", hint="choose another `--output`, or move it away")
    encoding = make_encoding(exact=exact, k_min=k_min, k_max=k_max, coverage=coverage)
    plan = make_plan(
        teacher=str(teacher),
        rollouts=Path(rollouts),
        sft=None if sft is None else Path(sft),
        encoding=encoding,
        scoring=Scoring(engine=engine, dtype=dtype),
        device=device,
        threads=threads,
        batch_tokens=batch_tokens,
        part_positions=part_positions,
    )
    building = layout.building_directory(output)
    _start_or_resume(building, plan)
    started = time.monotonic()
    count = _workers(workers, plan)
    _score_parts(plan, building, count, on_progress)
    _seal(plan, building, output, seconds=time.monotonic() - started, workers=count)
    return reader.open(output)


def make_plan(
    *,
    teacher: str,
    rollouts: Path,
    sft: Path | None,
    encoding: Encoding,
    scoring: Scoring,
    device: str | None = None,
    threads: int = 1,
    batch_tokens: int = 4096,
    part_positions: int | None = None,
) -> Plan:
    """Read the inputs, check what can be checked before scoring, and draw the borders of the parts."""
    from lopd_store.models import default_device

    file = RolloutsFile(rollouts)
    if len(file) == 0:
        raise DataError(f"`{rollouts}` has no rollouts", hint="sample some with `lopd-store generate`")
    identity = identify(teacher)
    _check_tokenizer(file, identity)
    return Plan(
        teacher_path=teacher,
        rollouts_path=str(rollouts),
        inputs=Inputs(
            teacher=identity,
            scoring=scoring,
            sft=_sft_provenance(file, sft),
            rollouts_file=file.digest(),
            rollouts=file.record,
        ),
        encoding=encoding,
        reference_logprobs=file.has_logprobs(),
        device=device or default_device(),
        threads=threads,
        batch_tokens=batch_tokens,
        parts=part_borders(file.response_lengths.tolist(), part_positions),
    )


def part_borders(response_lengths: Sequence[int], part_positions: int | None = None) -> tuple[tuple[int, int], ...]:
    """Rows [start, stop) of each part: whole rollouts, each part closed once it has `part_positions` positions."""
    if part_positions is None:
        wanted = sum(response_lengths) // _PARTS_WANTED
        part_positions = min(max(wanted, MIN_PART_POSITIONS), MAX_PART_POSITIONS)
    elif not 1 <= part_positions <= MAX_PART_POSITIONS:
        raise InputError(
            "`part_positions` is out of range", expected=f"1 to {MAX_PART_POSITIONS}", actual=part_positions
        )
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
            scores.ids,
            np.minimum(scores.logprobs, 0),
            scores.tail_logprobs,
            k_min=encoding.k_min,
            coverage=encoding.coverage,
        )
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
    columns = {
        "prompt": [rollout.prompt for rollout in rollouts],
        "response": [rollout.response for rollout in rollouts],
        "finish_reason": [rollout.finish_reason for rollout in rollouts],
        "prompt_length": part.prompt_lengths,
        "response_length": np.array([len(rollout.response_ids) for rollout in rollouts], np.int32),
        "mean_sampled_logprob": np.array([values.mean() if len(values) else 0 for values in sampled], np.float32),
        "mean_entropy": entropies,
    }
    return round_part(part, encoding), columns


def write_part(building: Path, number: int, part: Part, columns: dict[str, Any]) -> None:
    """Write the files of a part, read them back, and note it as done; the note comes last."""
    assert part.topk is not None
    contents = {
        layout.ROLLOUTS: rollouts_file(columns),
        layout.TOKENS: tokens_file(part),
        layout.TOPK: topk_file(part.topk),
    }
    paths = {kind: building / layout.part_file(number, kind) for kind in contents}
    for kind, data in contents.items():
        _write_durably(paths[kind], data)
    _check_written(part, read_part(paths[layout.TOKENS], paths[layout.TOPK]))
    counts = Counts(
        rollouts=len(part.prompt_lengths),
        tokens=len(part.token_ids),
        positions=len(part.sampled_logprobs),
        entries=len(part.topk.ids),
    )
    files = {kind: asdict(_digests(data)) for kind, data in contents.items()}
    note = strictjson.pretty({"counts": counts.to_json(), "files": files})
    _write_durably(building / _DONE / f"{number:05d}.json", note)


def _start_or_resume(building: Path, plan: Plan) -> None:
    """Make the directory of the build in progress, or check that the one there follows the same plan."""
    path, wanted = building / _PLAN, plan.to_json()
    if path.is_file():
        found = strictjson.loads(path.read_bytes(), where=str(path))
        if changed := [name for name in wanted if found.get(name) != wanted[name]]:
            raise InputError(
                f"`{building}` was begun with another plan",
                expected="the same " + ", ".join(f"`{name}`" for name in changed),
                actual="they changed since",
                hint=f"go on with the old settings, or remove `{building}` to begin anew",
            )
        return
    (building / layout.PARTS).mkdir(parents=True, exist_ok=True)
    (building / _DONE).mkdir(exist_ok=True)
    _write_durably(path, strictjson.pretty(wanted))


def _is_done(building: Path, number: int) -> bool:
    return (building / _DONE / f"{number:05d}.json").is_file()


def _score_parts(plan: Plan, building: Path, workers: int, on_progress: OnProgress | None) -> None:
    lengths = RolloutsFile(plan.rollouts_path).response_lengths
    positions = [int(lengths[start:stop].sum()) for start, stop in plan.parts]
    missing = [number for number in range(len(plan.parts)) if not _is_done(building, number)]
    before = sum(positions) - sum(positions[number] for number in missing)

    def report(scored: int) -> None:
        if on_progress is not None:
            on_progress(before + scored, sum(positions))

    report(0)
    if not missing:
        return
    if workers == 1:
        _score_here(plan, building, missing, report)
    else:
        _score_in_processes(plan, building, missing, min(workers, len(missing)), report)


def _score_here(plan: Plan, building: Path, missing: list[int], report: Callable[[int], None]) -> None:
    scored = 0

    def on_positions(count: int) -> None:
        nonlocal scored
        scored += count
        report(scored)

    with _torch_threads(plan.threads):
        teacher = _load_teacher(plan)
        for number in missing:
            write_part(building, number, *score_part(plan, teacher, number, on_positions))


def _score_in_processes(
    plan: Plan, building: Path, missing: list[int], workers: int, report: Callable[[int], None]
) -> None:
    context = multiprocessing.get_context("spawn")
    scored = context.Value("q", 0)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (plan, building, scored))
    try:
        waiting: set[Future[None]] = {pool.submit(_work, number) for number in missing}
        while waiting:
            finished, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            report(scored.value)
            for future in finished:
                future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(plan: Plan, building: Path, scored: Any) -> None:
    """Load the teacher once per process; Ctrl-C is the parent's to handle, after the part in hand."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(plan.threads)
    _worker.update(plan=plan, building=building, scored=scored, teacher=_load_teacher(plan))


_worker: dict[str, Any] = {}  # what one worker process keeps between parts


def _work(number: int) -> None:
    def on_positions(count: int) -> None:
        with _worker["scored"].get_lock():
            _worker["scored"].value += count

    part, columns = score_part(_worker["plan"], _worker["teacher"], number, on_positions)
    write_part(_worker["building"], number, part, columns)


def _load_teacher(plan: Plan) -> Teacher:
    inputs = plan.inputs
    return load(
        inputs.scoring.engine,
        plan.teacher_path,
        vocab_size=inputs.teacher.vocab_size,
        dtype=inputs.scoring.dtype,
        device=plan.device,
        batch_tokens=plan.batch_tokens,
    )


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _workers(asked: int | None, plan: Plan) -> int:
    if asked is not None:
        if asked < 1:
            raise InputError("`workers` is out of range", expected="1 or more", actual=asked)
        return min(asked, len(plan.parts))
    if plan.device != "cpu":
        return 1
    return min(max(1, (os.cpu_count() or 1) // plan.threads), len(plan.parts))


def _seal(plan: Plan, building: Path, output: Path, *, seconds: float, workers: int) -> None:
    entries = []
    for number in range(len(plan.parts)):
        path = building / _DONE / f"{number:05d}.json"
        note = strictjson.loads(path.read_bytes(), where=str(path))
        entries.append(
            PartEntry(
                counts=Counts(**note["counts"]),
                files={kind: FileDigests(**digests) for kind, digests in note["files"].items()},
            )
        )
    total = {name: sum(getattr(entry.counts, name) for entry in entries) for name in entries[0].counts.to_json()}
    manifest = Manifest(
        counts=Counts(**total),
        encoding=plan.encoding,
        inputs=plan.inputs,
        parts=tuple(entries),
        reference_logprobs=plan.reference_logprobs,
    )
    data = render(manifest)
    happened = {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "positions_per_second": round(manifest.counts.positions / max(seconds, 1e-9), 1),
        "workers": workers,
        "threads": plan.threads,
        "device": plan.device,
        "plan": digest_json(plan.to_json()),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("lopd", "torch", "transformers", "zarr", "numcodecs", "pyarrow")},
    }
    _write_durably(building / layout.BUILD_RECORD, strictjson.pretty(happened))
    _write_durably(building / layout.CARD, render_card(manifest, digest_bytes(data)).encode())
    shutil.rmtree(building / _DONE)
    (building / _PLAN).unlink()
    _write_durably(building / layout.MANIFEST, data)
    building.rename(output)
    _sync_directory(output.parent)


def _sft_provenance(file: RolloutsFile, sft: Path | None) -> SftProvenance:
    carried = sft_of_policy(file.record)
    if sft is None:
        return carried
    named = read_sft(sft)
    if carried.teacher and named.teacher and (differences := carried.teacher.differences(named.teacher)):
        raise InputError(
            f"`--sft {sft}` names another teacher than the rollouts themselves",
            expected=f"{carried.teacher.name}, as recorded in `{file.path}`",
            actual=f"{named.teacher.name}, which differs in {', '.join(differences)}",
            hint="leave `--sft` out: the rollouts carry the record of their policy",
        )
    return named if carried.teacher is None else carried


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
    rows = {len(scores.sampled_logprobs), len(scores.ids), len(scores.logprobs), len(scores.tail_logprobs)}
    if rows != {len(rollout.response_ids)}:
        raise DataError(
            f"{where}: the teacher gave another number of rows", expected=len(rollout.response_ids), actual=rows
        )
    if (
        np.isnan(scores.sampled_logprobs).any()
        or np.isnan(scores.logprobs).any()
        or np.isnan(scores.tail_logprobs).any()
    ):
        raise DataError(f"{where}: the teacher gave log-probs that are not numbers", hint="try `--dtype float32`")


def _reference_logprobs(rollouts: list[Rollout]) -> Any:
    return np.concatenate([rollout.logprobs for rollout in rollouts if rollout.logprobs is not None]).astype(np.float32)


def _check_written(part: Part, read: Part) -> None:
    """The writer's own check: what was written decodes to what was meant."""
    assert part.topk is not None and read.topk is not None
    for name in ("rollout_offsets", "prompt_lengths", "token_ids", "loss_mask", "sampled_logprobs"):
        assert np.array_equal(getattr(part, name), getattr(read, name)), name
    for name in ("counts", "ids", "logprobs", "tail_logprobs"):
        assert np.array_equal(getattr(part.topk, name), getattr(read.topk, name)), name
    if part.reference_logprobs is not None:
        assert read.reference_logprobs is not None
        assert np.array_equal(part.reference_logprobs, read.reference_logprobs)


def _digests(data: bytes) -> FileDigests:
    import xxhash

    return FileDigests(size=len(data), sha256=digest_bytes(data), xxh3_128=xxhash.xxh3_128_hexdigest(data))


def _write_durably(path: Path, data: bytes) -> None:
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
