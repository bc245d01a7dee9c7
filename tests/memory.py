"""Memory that is used and freed, to see whether it is the same again."""

from __future__ import annotations

import mmap
import resource
from pathlib import Path

import torch

ONE_USE = 56 << 20  # bytes, fewer than `use_memory` has at a time


def use_memory() -> int:
    """Have several blocks at a time, ten times over, and free them; returns at least how many bytes were handed out."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        [torch.ones(size << 20) for size in (1, 2, 4, 8)]
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * mmap.PAGESIZE


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
