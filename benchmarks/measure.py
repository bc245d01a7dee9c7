"""Measuring time on one core, memory of one process, and what machine it was."""

from __future__ import annotations

import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")


def pin(cores: Iterable[int]) -> None:
    """Keep every thread of this process, and all that it starts from now on, on these cores."""
    for thread in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):  # it ended meanwhile
            os.sched_setaffinity(int(thread.name), cores)


def medians(*functions: Callable[[], Any], repeats: int) -> list[float]:
    """Median seconds of each function. They take turns, so that a slow moment of the machine meets them all."""
    seconds: list[list[float]] = [[] for _ in functions]
    for function in functions:
        function()
    for _ in range(repeats):
        for function, times in zip(functions, seconds, strict=True):
            started = time.perf_counter()
            function()
            times.append(time.perf_counter() - started)
    return [statistics.median(times) for times in seconds]


def in_new_process(function: Callable[..., Result], *arguments: Any) -> tuple[Result, float]:
    """What a function of a module gives in a process of its own, and the most memory that this had, in MB.

    `resource.getrusage` would count the memory of the process that starts it, too.
    """
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_with_peak, function, *arguments).result()


def _with_peak(function: Callable[..., Result], *arguments: Any) -> tuple[Result, float]:
    result = function(*arguments)
    status = Path("/proc/self/status").read_text(encoding="ascii")
    kilobytes = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    return result, kilobytes * 1024 / 1e6


def machine() -> str:
    """Processor and memory in words."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return f"{os.cpu_count()} cores of {model or platform.machine()}, {memory:.0f} GB of memory, {platform.system()}"
