"""The reader that was written from the specification alone sees what the library sees."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lopd_store
from lopd_store.reader import StoredRollout
from lopd_store.topk import TopK
from tests.conformance import example
from tests.conformance.text import SPEC

PATH = SPEC / "reference_reader.py"
VECTORS = sorted((SPEC / "vectors" / "valid").glob("*"))
ARRAYS = ("prompt_ids", "response_ids", "loss_mask", "sampled_logprobs", "reference_logprobs")


@pytest.fixture(scope="module")
def reference_reader() -> Any:
    """The reader as a module."""
    spec = util.spec_from_file_location("reference_reader", PATH)
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def exact(teacher_dir: Path, rollouts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A redacted artifact in the profile `exact`."""
    output = tmp_path_factory.mktemp("artifacts") / "exact"
    return lopd_store.build(
        teacher=teacher_dir, rollouts=rollouts_file, output=output, exact=True, text=False, k_max=8
    ).path


@pytest.fixture(scope="module")
def union(teacher_dir: Path, student_dir: Path, rollouts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with the top-k of teacher and reference policy."""
    output = tmp_path_factory.mktemp("artifacts") / "union"
    return lopd_store.build(
        teacher=teacher_dir, reference=student_dir, rollouts=rollouts_file, output=output, k_max=8, coverage=0.9
    ).path


def assert_agrees(reference_reader: Any, directory: Path) -> list[StoredRollout]:
    """Both readers see the same rollouts, which are returned as the library sees them."""
    found, artifact = reference_reader.read(directory), lopd_store.open(directory)
    assert found.fingerprint == artifact.fingerprint
    assert tuple(found.kinds) == artifact.view.kinds
    assert found.manifest["counts"].items() >= artifact.manifest.counts.to_json().items()
    first = sum(part.counts.rollouts for part in artifact.manifest.parts[: artifact.view.parts.start])
    stored = [artifact.rollout(first + index) for index in range(len(found.rollouts))]
    assert len(stored) == sum(artifact.manifest.parts[number].counts.rollouts for number in artifact.view.parts)
    for one, rollout in zip(found.rollouts, stored, strict=True):
        assert_equal({name: one.get(name) for name in ARRAYS}, rollout)
        assert ("topk" in one) == artifact.view.has_topk
        if rollout.topk is not None:
            assert_equal({name: one["topk"].get(name) for name in TopK.__dataclass_fields__}, rollout.topk)
    return stored


def assert_equal(found: dict[str, Any], wanted: Any) -> None:
    """The arrays are the attributes of an object, dtypes included."""
    for name, array in found.items():
        expected = getattr(wanted, name)
        assert (array is None) == (expected is None), name
        if array is not None:
            assert array.dtype == expected.dtype, name
            np.testing.assert_array_equal(array, expected, err_msg=name)


def test_it_agrees_with_the_library_value_by_value(reference_reader: Any, sealed: Path) -> None:
    stored = assert_agrees(reference_reader, sealed)
    assert len(lopd_store.open(sealed).manifest.parts) > 1
    assert all(rollout.reference_logprobs is not None for rollout in stored)


def test_it_agrees_on_exact_log_probs_without_text(reference_reader: Any, exact: Path) -> None:
    assert_agrees(reference_reader, exact)


def test_it_agrees_on_the_top_k_of_two_models(reference_reader: Any, union: Path) -> None:
    stored = assert_agrees(reference_reader, union)
    assert all(rollout.topk is not None and rollout.topk.reference_logprobs is not None for rollout in stored)


def test_it_agrees_on_the_example_of_the_text(reference_reader: Any, tmp_path: Path) -> None:
    assert_agrees(reference_reader, example.write_example(tmp_path / "example"))


def test_it_agrees_on_a_sampled_only_view(reference_reader: Any, sealed: Path, tmp_path: Path) -> None:
    assert_agrees(reference_reader, lopd_store.subset(sealed, output=tmp_path / "view", only="sampled").path)


def test_it_agrees_on_a_view_of_some_parts(reference_reader: Any, sealed: Path, tmp_path: Path) -> None:
    assert_agrees(reference_reader, lopd_store.subset(sealed, output=tmp_path / "view", parts=range(1, 2)).path)


@pytest.mark.parametrize("directory", VECTORS, ids=lambda directory: directory.name)
def test_it_agrees_on_every_valid_vector(reference_reader: Any, directory: Path) -> None:
    assert_agrees(reference_reader, directory)


def test_it_notices_a_changed_byte(reference_reader: Any, artifact: Path) -> None:
    path = artifact / "parts" / "00000.topk.zarr.zip"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"00000\.topk\.zarr\.zip was damaged"):
        reference_reader.read(artifact)


def test_it_notices_a_changed_manifest(reference_reader: Any, artifact: Path) -> None:
    path = artifact / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"annotations": {}', b'"annotations": {"a": 1}'))
    with pytest.raises(ValueError, match="after it was sealed"):
        reference_reader.read(artifact)


def test_the_command_reads_folders_and_says_what_does_not_read(tmp_path: Path) -> None:
    for name in ("one", "two"):
        example.write_example(tmp_path / name)
    fine = subprocess.run([sys.executable, PATH, tmp_path], capture_output=True, text=True, check=False)
    assert (fine.returncode, fine.stderr, len(fine.stdout.splitlines())) == (0, "", 2)
    (tmp_path / "two" / "parts" / "00000.tokens.zarr.zip").unlink()
    broken = subprocess.run([sys.executable, PATH, tmp_path], capture_output=True, text=True, check=False)
    assert broken.returncode == 1
    assert broken.stdout.splitlines()[0] == fine.stdout.splitlines()[0]
    assert "does not read" in broken.stdout.splitlines()[1]


def test_it_is_short_and_imports_nothing_of_ours() -> None:
    source = PATH.read_text(encoding="utf-8")
    assert len(source.splitlines()) < 200
    names = {
        alias.name if isinstance(node, ast.Import) else node.module
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    others = {str(name).split(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert others == {"numpy", "pyarrow", "zarr"}
