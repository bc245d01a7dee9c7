"""Memory that is used and freed, to see whether it is the same again."""

from __future__ import annotations

import resource

import torch

ONE_USE = 14 * 1024  # pages, fewer than `use_memory` has at a time


def use_memory() -> int:
    """Have several blocks at a time, ten times over, and free them; returns how many pages were handed out."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        [torch.ones(size << 20) for size in (1, 2, 4, 8)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
