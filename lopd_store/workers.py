"""Who scores the parts: this process, or several of its kind.

Every worker loads the teacher once and takes the next part that is missing. All use the same number of threads, so
how many there are changes no byte.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lopd_store import models
from lopd_store.errors import InputError
from lopd_store.plan import Plan
from lopd_store.rollouts import RolloutsFile
from lopd_store.scoring import is_done, score_part, write_part
from lopd_store.teachers import Teacher, load

OnProgress = Callable[[int, int], None]  # positions scored so far, positions in all


def score_parts(plan: Plan, building: Path, workers: int, on_progress: OnProgress | None) -> None:
    """Score and write every part that is not done yet; a part that fails stops the build, the others stay."""
    lengths = RolloutsFile(plan.rollouts_path).response_lengths
    positions = [int(lengths[start:stop].sum()) for start, stop in plan.parts]
    missing = [number for number in range(len(plan.parts)) if not is_done(building, number)]
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


def count_workers(asked: int | None, plan: Plan) -> int:
    """How many processes to use: as many as asked for, else one per processor; never more than there are parts.

    Each holds the whole teacher, so unasked there are only as many as fit into half of the memory that is free.
    """
    if asked is not None:
        if asked < 1:
            raise InputError("`workers` is out of range", expected="1 or more", actual=asked)
        return min(asked, len(plan.parts))
    if plan.device != "cpu":
        return 1
    fit = _free_memory() // 2 // _teacher_bytes(plan)
    return max(1, min((os.cpu_count() or 1) // plan.threads, fit, len(plan.parts)))


def _free_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _teacher_bytes(plan: Plan) -> int:
    """A guess at what the loaded models take: their files, twice for safetensors, eight times for 4-bit GGUF."""
    found = [models.find(path) for path in (plan.teacher_path, plan.reference_path) if path]
    sizes = [(sum(path.stat().st_size for path in files.weights), files.gguf_file) for files in found]
    return sum(size * (2 if gguf is None else 8) for size, gguf in sizes)


def _score_here(plan: Plan, building: Path, missing: list[int], report: Callable[[int], None]) -> None:
    scored = 0

    def on_positions(count: int) -> None:
        nonlocal scored
        scored += count
        report(scored)

    with torch_threads(plan.threads):
        teacher = _load_teacher(plan)
        for number in missing:
            write_part(plan, building, number, *score_part(plan, teacher, number, on_positions))


def _score_in_processes(
    plan: Plan, building: Path, missing: list[int], workers: int, report: Callable[[int], None]
) -> None:
    context = multiprocessing.get_context("spawn")
    scored = context.Value("q", 0)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (plan, building, scored))
    try:
        with _interrupts_held_back():
            waiting: set[Future[None]] = {pool.submit(_work, number) for number in missing}
        while waiting:
            finished, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            report(scored.value)
            for future in finished:
                future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Processes started in here never see Ctrl-C, which is for this one to handle, after the parts in hand."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_worker: dict[str, Any] = {}  # what one worker process keeps between parts


def _start_worker(plan: Plan, building: Path, scored: Any) -> None:
    import torch

    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(plan.threads)
    _worker.update(plan=plan, building=building, scored=scored)


def _end_with_parent() -> None:
    """Leave when the parent was killed; nothing would ever tell this process otherwise."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(number: int) -> None:
    def on_positions(count: int) -> None:
        with _worker["scored"].get_lock():
            _worker["scored"].value += count

    if "teacher" not in _worker:  # here and not at the start, where an error would be lost
        _worker["teacher"] = _load_teacher(_worker["plan"])
    part, columns = score_part(_worker["plan"], _worker["teacher"], number, on_positions)
    write_part(_worker["plan"], _worker["building"], number, part, columns)


def _load_teacher(plan: Plan) -> Teacher:
    inputs = plan.inputs
    return load(
        inputs.scoring.engine,
        plan.teacher_path,
        vocab_size=inputs.teacher.vocab_size,
        dtype=inputs.scoring.dtype,
        device=plan.device,
        batch_tokens=plan.batch_tokens,
        reference=plan.reference_path,
    )


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """What runs in here computes with so many threads, which can change the last bits of a log-prob."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
