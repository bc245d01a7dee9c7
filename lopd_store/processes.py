"""What processes that this one starts have in common."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

from lopd_store.errors import InputError


def require_main_guard() -> None:
    """Raise InputError in a process that was started for work and has come here while it imports its parent's script.

    Until that is imported, as `__mp_main__`, another module stands under `__main__`.
    """
    main = sys.modules["__main__"]
    if sys.modules.get("__mp_main__", main) is not main:
        raise InputError(
            "every process of a build begins with importing the script, which would build again",
            hint='put what the script does under `if __name__ == "__main__":`',
        )


@contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Processes started in here never see Ctrl-C, which is for this one to handle, after the parts in hand."""
    resource_tracker.ensure_running()  # it would let them through again where it began with the first process
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
