"""Artifacts of released versions of the format, kept for ever: main reads every value that was in them.

Each folder here is a version; `expected.json` in it has the digest of every decoded array as it was read on the day of
the release. Nothing in these folders is ever written again.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lopd_store
from lopd_store.reader import Artifact

HERE = Path(__file__).parent
EXPECTED: dict[str, dict[str, Any]] = {
    f"{path.parent.name}/{name}": value
    for path in sorted(HERE.glob("*/expected.json"))
    for name, value in json.loads(path.read_text(encoding="utf-8")).items()
}


def decoded(artifact: Artifact) -> dict[str, str]:
    """Name and digest of every array of every part."""
    digests = {}
    for number in artifact.view.parts:
        part = artifact.part(number)
        arrays = {field.name: getattr(part, field.name) for field in fields(part)}
        if part.topk is not None:
            arrays |= {f"topk.{field.name}": getattr(part.topk, field.name) for field in fields(part.topk)}
        for name, values in arrays.items():
            if isinstance(values, np.ndarray):
                form = f"{values.dtype} {len(values)} ".encode() + values.tobytes()
                digests[f"{number}.{name}"] = hashlib.sha256(form).hexdigest()
    return digests


def test_there_is_something_to_keep() -> None:
    assert len(EXPECTED) >= 5


@pytest.mark.parametrize("name", EXPECTED)
def test_an_artifact_of_a_released_version_is_read_value_by_value(name: str) -> None:
    version, artifact_name = name.split("/")
    artifact = lopd_store.open(HERE / version / artifact_name)
    assert artifact.fingerprint == EXPECTED[name]["fingerprint"]
    assert decoded(artifact) == EXPECTED[name]["arrays"]


@pytest.mark.parametrize("name", EXPECTED)
def test_an_artifact_of_a_released_version_verifies(name: str) -> None:
    assert lopd_store.verify(HERE / name).findings == ()
