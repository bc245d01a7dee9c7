"""Scoring on a Ray cluster: an actor per worker, a part at a time; the part of an actor that died is done again.

Rollouts travel to the actors and files back to this process, which alone reads and writes. So the nodes share nothing
but the teacher: a Hub id, or a path that they all have.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lopd_store.building import read_noise, write_noise
from lopd_store.errors import InputError, LopdError, UnavailableError
from lopd_store.handout import Interrupts, Tally, hand_out, load_teacher, measure_noise
from lopd_store.noise import Noise
from lopd_store.plan import Plan
from lopd_store.rollouts import Rollout
from lopd_store.scoring import DoneNote, note_of, part_files, read_rollouts, score_part, write_part
from lopd_store.survey import OnBad

Scored = tuple[dict[str, bytes], DoneNote]


def score_on_ray(
    plan: Plan,
    building: Path,
    tally: Tally,
    finish: Callable[[int, DoneNote], None],
    interrupts: Interrupts,
    *,
    address: str,
    workers: int | None,
    on_bad: OnBad,
    most: float | None,
) -> None:
    """Score the missing parts on the cluster at `address`, or on one that is started here for `local`."""
    with _connected(address) as ray:
        width = min(workers or _room(ray, plan), len(tally.missing))
        size = plan.tensor_parallel_size
        needs = {"num_cpus": plan.threads * size, "num_gpus": 0 if plan.device == "cpu" else size}
        remote = ray.remote(**needs)(_Scorer)
        seats: list[tuple[Any, Future[Scored] | None]] = [(remote.remote(plan, on_bad), None) for _ in range(width)]

        def submit(number: int) -> Future[Scored]:
            seat = next(seat for seat, (_, last) in enumerate(seats) if last is None or last.done())
            actor, last = seats[seat]
            if last is not None and isinstance(last.exception(), ray.exceptions.RayActorError):
                actor = remote.remote(plan, on_bad)  # in place of one that died
            future: Future[Scored] = actor.score.remote(number, read_rollouts(plan, number)).future()
            seats[seat] = (actor, future)
            return future

        def written(number: int, scored: Scored) -> None:
            contents, note = scored
            write_part(building, number, contents, note)
            part = plan.parts[number]
            tally.add(part.rollouts, part.tokens, part.positions)
            finish(number, note)

        try:
            if read_noise(building) is None:
                rollouts = list(read_rollouts(plan, tally.missing[0]).values())
                write_noise(building, ray.get(seats[0][0].measure_noise.remote(rollouts, most)))
            hand_out(
                tally.missing,
                submit,
                written,
                width=width,
                interrupts=interrupts,
                tick=tally.report,
                again=(ray.exceptions.RayActorError,),
            )
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, LopdError):
                raise error.cause from None
            raise
        except ray.exceptions.RayActorError as error:
            raise UnavailableError(
                "an actor died again and again over the same part, perhaps because memory ran out",
                hint="run the same command again, with fewer `--workers` or a smaller `--batch-tokens`",
            ) from error


class _Scorer:
    """What an actor is: a teacher, loaded for the first part."""

    def __init__(self, plan: Plan, on_bad: OnBad) -> None:
        import torch

        torch.set_num_threads(plan.threads)
        self._plan, self._on_bad = plan, on_bad
        self._teacher: Any = None

    def score(self, number: int, rollouts: dict[int, Rollout]) -> Scored:
        """The files of a part and its note."""
        self._load()
        scored = score_part(
            self._plan, self._teacher, number, lambda tokens, positions: None, rollouts=rollouts, on_bad=self._on_bad
        )
        contents = part_files(self._plan, scored)
        return contents, note_of(self._plan, scored, contents)

    def measure_noise(self, rollouts: list[Rollout], most: float | None) -> Noise:
        """The noise of the engine here."""
        self._load()
        return measure_noise(self._plan, self._teacher, rollouts, most)

    def _load(self) -> None:
        if self._teacher is None:
            self._teacher = load_teacher(self._plan)


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    try:
        import ray
    except ImportError as error:
        raise InputError("`--ray` needs Ray", hint='pip install "lopd[ray]"') from error
    ours = not ray.is_initialized()
    if ours:
        _require_answer(address)
        try:
            dashboard = False if address == "local" else None
            ray.init(address, include_dashboard=dashboard, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UnavailableError(f"no Ray cluster at `{address}`", actual=str(error).partition("\n")[0]) from error
    try:
        yield ray
    finally:
        if ours:
            ray.shutdown()


def _require_answer(address: str) -> None:
    """Raise UnavailableError at once where nobody listens; Ray itself tries for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise UnavailableError(f"no Ray cluster at `{address}`", actual=error.strerror or str(error)) from error


def _room(ray: Any, plan: Plan) -> int:
    """Workers that the nodes of the cluster have room for; what one of them needs has to be on one node."""
    kind, needed = ("CPU", plan.threads) if plan.device == "cpu" else ("GPU", 1)
    here = [int(node["Resources"].get(kind, 0)) for node in ray.nodes() if node["Alive"]]
    return max(1, sum(count // (needed * plan.tensor_parallel_size) for count in here))
