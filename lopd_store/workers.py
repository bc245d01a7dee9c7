"""Who scores the parts: this process, several of its kind, or actors of a Ray cluster.

Every worker loads the teacher once and takes the next part that is missing; while its teacher scores one, a second
thread writes the part before it. All use the same number of threads, so how many there are changes no byte.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from lopd_store import models
from lopd_store.building import read_noise, write_noise
from lopd_store.cluster import score_on_ray
from lopd_store.errors import InputError, UnavailableError
from lopd_store.handout import (
    Interrupts,
    OnNote,
    OnProgress,
    Tally,
    hand_out,
    load_teacher,
    measure_noise,
    torch_threads,
)
from lopd_store.noise import Noise
from lopd_store.plan import Plan
from lopd_store.processes import interrupts_held_back
from lopd_store.scoring import DoneNote, ScoredPart, keep_part, read_rollouts, score_part
from lopd_store.survey import OnBad

OnPart = Callable[[int], None]  # the number of a part that is written
Written = list[tuple[int, DoneNote]]  # parts that are written: at most one


def score_parts(
    plan: Plan,
    building: Path,
    numbers: Sequence[int],
    *,
    workers: int | None,
    ray: str | None = None,
    on_bad: OnBad = "fail",
    max_noise: float | None = None,
    on_progress: OnProgress | None = None,
    on_note: OnNote | None = None,
    on_part: OnPart | None = None,
) -> None:
    """Score and write those of these parts that are not done yet; a part that fails stops the build, others stay.

    `on_part` hears of every part that this call has written. Raises KeyboardInterrupt after the parts in hand where
    Ctrl-C asked for it.
    """
    tally = Tally(plan, building, numbers, on_progress)
    if not tally.missing:
        return

    def finish(number: int, note: DoneNote) -> None:
        tally.written(note)
        if on_part is not None:
            on_part(number)

    with Interrupts(on_note) as interrupts:
        if ray is not None:
            score_on_ray(
                plan, building, tally, finish, interrupts, address=ray, workers=workers, on_bad=on_bad, most=max_noise
            )
        elif workers == 1:
            _score_here(plan, building, tally, finish, interrupts, on_bad, max_noise)
        else:
            assert workers is not None
            width = min(workers, len(tally.missing))
            _score_in_processes(plan, building, tally, finish, interrupts, width, on_bad, max_noise)
        if interrupts.asked:
            raise KeyboardInterrupt


def gpus_of_worker(index: int, gpus: Sequence[str], size: int = 1) -> list[str]:
    """The `size` GPUs of a worker, counted from 0: each its own, where there are enough."""
    return [gpus[(index * size + number) % len(gpus)] for number in range(size)]


def count_workers(asked: int | None, plan: Plan, parts: int) -> int:
    """How many processes to use: as many as asked for, else one per GPU or processor; never more than there are parts.

    Each holds the whole teacher, so unasked there are only as many as fit into half of the memory that is free.
    """
    if asked is not None:
        if asked < 1:
            raise InputError("`workers` is out of range", expected="1 or more", actual=asked)
        return min(asked, parts)
    engine = plan.inputs.scoring.engine
    if plan.device == "cuda" and engine != "http":
        return max(1, min(len(_gpus()) // plan.tensor_parallel_size, parts))
    if plan.device != "cpu" or engine != "transformers":
        return 1
    fit = _free_memory() // 2 // _teacher_bytes(plan)
    return max(1, min((os.cpu_count() or 1) // (plan.threads * plan.tensor_parallel_size), fit, parts))


def _gpus() -> list[str]:
    """The GPUs that this process may use, by the names that `CUDA_VISIBLE_DEVICES` has for them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]


def _free_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _teacher_bytes(plan: Plan) -> int:
    """A guess at what the loaded models take: their files, twice for safetensors, eight times for 4-bit GGUF."""
    found = [models.find(path) for path in (plan.teacher_path, plan.reference_path) if path]
    sizes = [(sum(path.stat().st_size for path in files.weights), files.gguf_file) for files in found]
    return sum(size * (2 if gguf is None else 8) for size, gguf in sizes)


class Writer:
    """Writes one part at a time, in a thread of its own."""

    def __init__(self, plan: Plan, building: Path) -> None:
        self._plan, self._building = plan, building
        self._thread = ThreadPoolExecutor(1)
        self._writing: tuple[int, Future[DoneNote]] | None = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def begin(self, scored: ScoredPart) -> None:
        """Begin to write a part, where none is in hand."""
        self._writing = scored.number, self._thread.submit(keep_part, self._plan, self._building, scored)

    def end(self) -> Written:
        """The part in hand, where there is one, once it is written."""
        if self._writing is None:
            return []
        (number, future), self._writing = self._writing, None
        return [(number, future.result())]

    def check(self) -> None:
        """Raise at once what stopped the writing of the part in hand."""
        if self._writing is not None and self._writing[1].done():
            self._writing[1].result()


def _score_here(
    plan: Plan,
    building: Path,
    tally: Tally,
    finish: Callable[[int, DoneNote], None],
    interrupts: Interrupts,
    on_bad: OnBad,
    max_noise: float | None,
) -> None:
    """One part after the other."""

    def on_scored(tokens: int, positions: int) -> None:
        interrupts.tell()
        tally.add(1, tokens, positions)
        writer.check()

    with torch_threads(plan.threads), Writer(plan, building) as writer:
        teacher = load_teacher(plan)
        if read_noise(building) is None:
            rollouts = read_rollouts(plan, tally.missing[0]).values()
            write_noise(building, measure_noise(plan, teacher, rollouts, max_noise))
        for number in tally.missing:
            if interrupts.asked:
                break
            scored = score_part(plan, teacher, number, on_scored, on_bad=on_bad)
            for written in writer.end():
                finish(*written)
            writer.begin(scored)
            del scored
        for written in writer.end():
            finish(*written)


def _score_in_processes(
    plan: Plan,
    building: Path,
    tally: Tally,
    finish: Callable[[int, DoneNote], None],
    interrupts: Interrupts,
    workers: int,
    on_bad: OnBad,
    max_noise: float | None,
) -> None:
    context = multiprocessing.get_context("spawn")
    counts = context.Array("q", 3)
    ours, theirs = context.Pipe()
    # A pool for each worker, because a part that is not written yet is that worker's to finish.
    settings = [(plan, building, on_bad, counts, index, theirs) for index in range(workers)]
    pools = [ProcessPoolExecutor(1, context, _start_worker, initargs) for initargs in settings]
    last: dict[int, Future[Written]] = {}  # what a worker was given

    def submit(number: int) -> Future[Written]:
        index = next(index for index in range(workers) if index not in last or last[index].done())
        with interrupts_held_back():
            last[index] = pools[index].submit(_work, number)
        return last[index]

    def submit_probe(number: int) -> Future[Noise]:
        """The first worker measures the noise; the others load their teachers meanwhile."""
        with interrupts_held_back():
            for pool in pools[1:]:
                pool.submit(_load_teacher)
            return pools[0].submit(_measure_noise, number, max_noise)

    def finish_all(_: int, written: Written) -> None:
        for one in written:
            finish(*one)

    def tick() -> None:
        tally.scored = list(counts[:])
        tally.report()

    try:
        if read_noise(building) is None:
            first = tally.missing[:1]
            hand_out(
                first,
                submit_probe,
                lambda _, noise: write_noise(building, noise),
                width=1,
                interrupts=interrupts,
                tick=tick,
            )
        hand_out(tally.missing, submit, finish_all, width=workers, interrupts=interrupts, tick=tick)
        for index in last:
            finish_all(index, pools[index].submit(_end_writing).result())
    except KeyboardInterrupt:
        ours.close()  # which ends those that are still at work
        raise
    except BrokenProcessPool as error:
        ours.close()
        raise UnavailableError(
            "a worker was killed, perhaps because memory ran out",
            hint="run the same command again, with fewer `--workers` or a smaller `--batch-tokens`",
        ) from error
    finally:
        with ThreadPoolExecutor(workers) as ending:  # at once: a process takes more than a second to end
            list(ending.map(lambda pool: pool.shutdown(cancel_futures=True), pools))


_worker: dict[str, Any] = {}  # what one worker process keeps between parts


def _start_worker(plan: Plan, building: Path, on_bad: OnBad, counts: Any, index: int, parent: Connection) -> None:
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
    if plan.device == "cuda":  # before anything asks which there are
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus_of_worker(index, _gpus(), plan.tensor_parallel_size))
    import torch

    torch.set_num_threads(plan.threads)
    _worker.update(plan=plan, writer=Writer(plan, building), on_bad=on_bad, counts=counts)


def _end_with_parent(parent: Connection) -> None:
    """Leave when the parent has closed its end, or was killed; nothing else would ever tell this process."""
    with suppress(EOFError, OSError):
        parent.recv()
    os._exit(1)


def _work(number: int) -> Written:
    """Score a part and begin to write it; returns the one before it."""

    def on_scored(*scored: int) -> None:
        counts = _worker["counts"]
        with counts.get_lock():
            for index, more in enumerate((1, *scored)):
                counts[index] += more
        writer.check()

    plan: Plan = _worker["plan"]
    writer: Writer = _worker["writer"]
    _load_teacher()
    scored = score_part(plan, _worker["teacher"], number, on_scored, on_bad=_worker["on_bad"])
    written = writer.end()
    writer.begin(scored)
    return written


def _end_writing() -> Written:
    writer: Writer = _worker["writer"]
    return writer.end()


def _measure_noise(number: int, most: float | None) -> Noise:
    plan: Plan = _worker["plan"]
    _load_teacher()
    return measure_noise(plan, _worker["teacher"], read_rollouts(plan, number).values(), most)


def _load_teacher() -> None:
    """Load this worker's teacher, once; not where the process starts, where an error would be lost."""
    if "teacher" not in _worker:
        _worker["teacher"] = load_teacher(_worker["plan"])
