"""The vectors: valid ones verify and read, invalid ones are found out, and the recipes give these very bytes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lopd_store
from lopd_store.errors import LopdError
from lopd_store.identity import ModelIdentity

ROOT = Path(__file__).parents[2]
VECTORS = ROOT / "spec" / "vectors"
VALID = sorted(path for path in (VECTORS / "valid").iterdir())
INVALID = sorted(path for path in (VECTORS / "invalid").iterdir())
# Codes that no tiny file can break, with the reason.
WITHOUT_VECTOR = {
    "A090": "to score rollouts again takes the teacher itself",
    "A091": "to audit SFT data again takes the teacher itself",
}


def names(path: Path) -> str:
    return path.name


def expectation(vector: Path) -> Any:
    return json.loads((vector / "expected.json").read_text(encoding="utf-8"))


def read_all(directory: Path) -> int:
    """Read everything that a copy holds; how many positions there are."""
    artifact = lopd_store.open(directory)
    first = sum(entry.counts.rollouts for entry in artifact.manifest.parts[: artifact.view.parts.start])
    positions = index = 0
    for part in artifact.parts():
        positions += len(part.sampled_logprobs)
        for index in range(min(len(part.prompt_lengths), 8)):
            artifact.rollout(first + index)
        first += len(part.prompt_lengths)
    return positions


def test_there_are_as_many_as_were_promised() -> None:
    assert len(VALID) >= 20 and len(INVALID) >= 150


@pytest.mark.parametrize("vector", VALID, ids=names)
def test_a_valid_artifact_verifies(vector: Path) -> None:
    report = lopd_store.verify(vector)
    assert report.findings == () and lopd_store.verify(vector, quick=True).ok
    assert report.partial == (vector / "view.json").exists()


@pytest.mark.parametrize("vector", VALID, ids=names)
def test_a_valid_artifact_reads(vector: Path) -> None:
    artifact = lopd_store.open(vector)
    parts = artifact.manifest.parts[artifact.view.parts.start : artifact.view.parts.stop]
    assert read_all(vector) == sum(part.counts.positions for part in parts)
    for part in artifact.parts():
        assert (part.topk is not None) == artifact.view.has_topk
        assert (part.reference_logprobs is not None) == artifact.manifest.reference_logprobs
        if part.topk is not None:
            mass = np.exp(part.topk.tail_logprobs, dtype=np.float64)
            np.add.at(mass, part.topk.positions, np.exp(part.topk.logprobs, dtype=np.float64))
            np.testing.assert_allclose(mass, 1, atol=0.15)


@pytest.mark.parametrize("vector", INVALID, ids=names)
def test_an_invalid_artifact_is_found_out_under_its_codes(vector: Path) -> None:
    expected = expectation(vector)
    student = expected["student"] and ModelIdentity.from_json(expected["student"], where="student")
    report = lopd_store.verify(vector / "artifact", student=student, signed_by=expected.get("signed_by"))
    assert {found.code for found in report.findings} == set(expected["codes"])
    assert vector.name[:4] in expected["codes"]
    json.dumps(report.to_json()).encode()  # whatever was found can be said


def test_a_signed_artifact_is_so_for_each_of_its_keys() -> None:
    vector = VECTORS / "valid" / "signed"
    keys = [one["public_key"] for one in json.loads((vector / "signatures.json").read_bytes())]
    assert len(keys) == 2 and all(lopd_store.verify(vector, signed_by=key).ok for key in keys)


@pytest.mark.parametrize("vector", INVALID, ids=names)
def test_reading_an_invalid_artifact_fails_as_it_should_or_not_at_all(vector: Path) -> None:
    try:
        read_all(vector / "artifact")
    except LopdError as error:
        assert str(error)


def test_every_code_has_a_vector() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "lopd_store").rglob("*.py")]
    codes = set(re.findall(r'"(A[0-9]{3})"', "\n".join(sources)))
    assert {vector.name[:4] for vector in INVALID} == codes - WITHOUT_VECTOR.keys()


def test_the_recipes_give_these_very_vectors(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(ROOT / "spec" / "make_vectors.py"), str(tmp_path)], check=True)
    made, kept = contents(tmp_path), contents(VECTORS)
    assert sorted(made) == sorted(kept)
    assert [name for name in kept if made[name] != kept[name]] == [], "`make vectors` makes a difference"


def contents(directory: Path) -> dict[str, bytes | str]:
    """Every file and link below a directory by its path: bytes, or where a link leads."""
    return {
        str(path.relative_to(directory)): str(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in directory.rglob("*")
        if path.is_symlink() or path.is_file()
    }
