"""The reader that was written from the specification alone sees what the library sees."""

from __future__ import annotations

import ast
import sys
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lopd_store

PATH = Path(__file__).parents[2] / "spec" / "reference_reader.py"


@pytest.fixture(scope="module")
def reference_reader() -> Any:
    """The reader as a module."""
    spec = util.spec_from_file_location("reference_reader", PATH)
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_agrees_with_the_library_value_by_value(reference_reader: Any, sealed: Path) -> None:
    fingerprint, manifest, rollouts = reference_reader.read(sealed)
    artifact = lopd_store.open(sealed)
    assert fingerprint == artifact.fingerprint
    assert manifest["counts"] == artifact.manifest.counts.to_json()
    for index, found in enumerate(rollouts):
        stored = artifact.rollout(index)
        assert stored.topk is not None
        for name in ("prompt_ids", "response_ids", "loss_mask", "sampled_logprobs", "reference_logprobs"):
            np.testing.assert_array_equal(found[name], getattr(stored, name))
        np.testing.assert_array_equal(found["tail_logprobs"], stored.topk.tail_logprobs)
        np.testing.assert_array_equal(np.concatenate([ids for ids, _ in found["topk"]]), stored.topk.ids)
        np.testing.assert_array_equal(np.concatenate([lps for _, lps in found["topk"]]), stored.topk.logprobs)
        assert [len(ids) for ids, _ in found["topk"]] == stored.topk.counts.tolist()


def test_it_notices_a_changed_byte(reference_reader: Any, artifact: Path) -> None:
    path = artifact / "parts" / "00000.topk.zarr.zip"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(AssertionError, match=r"00000\.topk\.zarr\.zip"):
        reference_reader.read(artifact)


def test_it_imports_nothing_of_ours() -> None:
    names = {
        alias.name if isinstance(node, ast.Import) else node.module
        for node in ast.walk(ast.parse(PATH.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    others = {str(name).split(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert others == {"numpy", "pyarrow", "zarr"}
