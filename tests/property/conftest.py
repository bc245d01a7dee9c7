"""The same examples on every machine, and no deadline: how fast a machine is decides nothing."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("lopd", max_examples=60, deadline=None, derandomize=True)
settings.load_profile("lopd")
