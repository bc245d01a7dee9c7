"""Where `lopd-store` and `lopd-train` begin: importing takes a moment, and Ctrl-C during it is no traceback."""

from __future__ import annotations

import sys
from importlib import import_module


def store() -> None:
    """The entry point of `lopd-store`."""
    _start("store")


def train() -> None:
    """The entry point of `lopd-train`."""
    _start("train")


def _start(name: str) -> None:
    try:
        commands = import_module(f"lopd_cli.{name}")
    except KeyboardInterrupt:
        sys.exit(130)
    commands.main()
