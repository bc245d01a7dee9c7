"""Handing out parts: what every kind of worker has in common.

`Tally` counts what is done, `Interrupts` hears Ctrl-C, `hand_out` keeps workers busy with one part each.
"""

from __future__ import annotations

import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lopd_store.noise import Noise, probe
from lopd_store.plan import Plan
from lopd_store.rollouts import Rollout
from lopd_store.scoring import DoneNote, is_done, read_note
from lopd_store.teachers import Teacher, http, load

_MOST_RETRIES = 2
Result = TypeVar("Result")
OnNote = Callable[[str], None]  # a line for people


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a build is; what earlier runs have done counts."""

    rollouts: int
    tokens: int
    positions: int
    bytes: int  # of the parts that are written
    all_rollouts: int
    all_positions: int


OnProgress = Callable[[Progress], None]


class Tally:
    """Counts what is scored and written, and says so."""

    def __init__(self, plan: Plan, building: Path, numbers: Sequence[int], on_progress: OnProgress | None) -> None:
        done = [number for number in numbers if is_done(building, number)]
        self.missing = [number for number in numbers if number not in set(done)]
        self.scored = [0, 0, 0]  # rollouts, tokens, positions of this run
        self._before, self._all = _sizes(plan, done), _sizes(plan, numbers)
        self._bytes = sum(read_note(building, number).size for number in done)
        self._on_progress = on_progress
        self.report()

    def add(self, rollouts: int, tokens: int, positions: int) -> None:
        """So much more is scored."""
        self.scored = [a + b for a, b in zip(self.scored, (rollouts, tokens, positions), strict=True)]
        self.report()

    def written(self, note: DoneNote) -> None:
        """A part is written."""
        self._bytes += note.size
        self.report()

    def report(self) -> None:
        """Say how far the build is."""
        if self._on_progress is not None:
            rollouts, tokens, positions = (a + b for a, b in zip(self._before, self.scored, strict=True))
            self._on_progress(
                Progress(
                    rollouts=rollouts,
                    tokens=tokens,
                    positions=positions,
                    bytes=self._bytes,
                    all_rollouts=self._all[0],
                    all_positions=self._all[2],
                )
            )


class Interrupts:
    """Ctrl-C while parts are in hand: the first asks to stop after them, the second stops at once.

    Only the main thread of a process hears of Ctrl-C; elsewhere this does nothing.
    """

    def __init__(self, on_note: OnNote | None) -> None:
        self.asked = False
        self._on_note = on_note

    def __enter__(self) -> Interrupts:
        self._hears = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) not in (
            signal.SIG_IGN,
            None,
        )
        if self._hears:
            self._before = signal.signal(signal.SIGINT, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        if self._hears:
            signal.signal(signal.SIGINT, self._before)

    def tell(self) -> None:
        """Say once what the first Ctrl-C has brought about; not in the handler, which may have interrupted a print."""
        if self.asked and self._on_note is not None:
            self._on_note("finishing what is in hand; Ctrl-C again stops at once, and loses it")
            self._on_note = None

    def _hear(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def hand_out(
    missing: Sequence[int],
    submit: Callable[[int], Future[Result]],
    finish: Callable[[int, Result], None],
    *,
    width: int,
    interrupts: Interrupts,
    tick: Callable[[], None],
    again: tuple[type[Exception], ...] = (),
) -> None:
    """Keep `width` parts in hand until all are finished, or Ctrl-C asks to stop after those.

    A part that fails with one of the errors in `again` is handed out again, twice at most.
    """
    todo, in_hand, tries = deque(missing), dict[Future[Result], int](), Counter[int]()
    while in_hand or (todo and not interrupts.asked):
        while todo and len(in_hand) < width and not interrupts.asked:
            number = todo.popleft()
            in_hand[submit(number)] = number
        finished, _ = wait(in_hand, timeout=0.5, return_when=FIRST_COMPLETED)
        interrupts.tell()
        tick()
        for future in finished:
            number = in_hand.pop(future)
            try:
                finish(number, future.result())
            except again:
                tries[number] += 1
                if tries[number] > _MOST_RETRIES:
                    raise
                todo.append(number)


def load_teacher(plan: Plan) -> Teacher:
    """The teacher of a plan, and beside it the reference policy where there is one."""
    inputs = plan.inputs
    return load(
        inputs.scoring.engine,
        plan.teacher_path,
        vocab_size=inputs.teacher.vocab_size,
        dtype=inputs.scoring.dtype,
        device=plan.device,
        batch_tokens=plan.batch_tokens,
        reference=plan.reference_path,
        server=plan.server,
        reference_server=plan.reference_server,
        tensor_parallel_size=plan.tensor_parallel_size,
        k_min=plan.encoding.k_min,
        coverage=plan.encoding.coverage,
    )


def measure_noise(plan: Plan, teacher: Teacher, rollouts: Iterable[Rollout], most: float | None) -> Noise:
    """The noise of the engine on some of these rollouts; raises DataError where it is too large."""
    longest = teacher.context_length
    fitting = [rollout for rollout in rollouts if longest is None or len(rollout.token_ids) <= longest]
    return probe(teacher, fitting, plan.encoding.k_max, most=most)


def check_servers(plan: Plan, *, weights: bool) -> None:
    """Refuse servers that do not run the models of the plan; see `teachers.http.check_server`."""
    for url, model, what in (
        (plan.server, plan.teacher_path, "teacher"),
        (plan.reference_server, plan.reference_path, "reference policy"),
    ):
        if url is not None and model is not None:
            http.check_server(
                url,
                model,
                vocab_size=plan.inputs.teacher.vocab_size,
                dtype=plan.inputs.scoring.dtype,
                device=plan.device,
                weights=weights,
                what=what,
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


def _sizes(plan: Plan, numbers: Sequence[int]) -> tuple[int, int, int]:
    """Rollouts, tokens and positions of these parts."""
    parts = [plan.parts[number] for number in numbers]
    return sum(one.rollouts for one in parts), sum(one.tokens for one in parts), sum(one.positions for one in parts)
