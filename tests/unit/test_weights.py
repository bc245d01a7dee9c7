"""Digests of tensors: rounding by the book, remembered until the file changes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from lopd_store import weights
from lopd_store.weights import TensorDigest, round_to_bfloat16, tensor_digests, weights_digests

VALUES = torch.tensor([1.0, -2.5, 1 / 3, 1e-30, 0.0])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A safetensors file of two tensors, old enough to be remembered."""
    path = tmp_path / "model.safetensors"
    save_file({"a": VALUES, "b": torch.arange(3)}, path)
    return path


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """An empty cache that accepts files of any age; the list fills with the files that are really read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(weights, "_SETTLED_SECONDS", -1e9)
    read: list[Path] = []
    real = weights._safetensors

    def reading(path: Path, *rest: Any) -> Iterator[TensorDigest]:
        read.append(path)
        return real(path, *rest)

    monkeypatch.setattr(weights, "_safetensors", reading)
    return read


@given(st.lists(st.floats(width=32), max_size=50))
def test_values_round_to_bfloat16_as_torch_rounds_them(values: list[float]) -> None:
    bits = round_to_bfloat16(np.array(values, np.float32))
    wanted = torch.tensor(values, dtype=torch.float32).bfloat16()
    for found, value in zip(bits, wanted, strict=True):
        back = torch.tensor([int(found)], dtype=torch.int32).to(torch.int16).view(torch.bfloat16)[0]
        assert torch.equal(back, value) or (bool(back.isnan()) and bool(value.isnan()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_copies_in_other_precisions_have_one_rounded_digest(tmp_path: Path, dtype: torch.dtype) -> None:
    exact = VALUES.bfloat16()  # values that every one of them can hold
    save_file({"a": exact}, tmp_path / "one.safetensors")
    save_file({"a": exact.to(dtype)}, tmp_path / "other.safetensors")
    one, other = (weights_digests(tensor_digests([tmp_path / f"{name}.safetensors"])) for name in ("one", "other"))
    assert one.rounded == other.rounded
    assert (one.weights == other.weights) == (dtype is torch.bfloat16)


def test_one_bit_of_one_value_changes_the_digest(file: Path) -> None:
    before = weights_digests(tensor_digests([file]))
    changed = VALUES.clone()
    changed[2] = torch.nextafter(changed[2], torch.tensor(1.0))
    save_file({"a": changed, "b": torch.arange(3)}, file)
    after = weights_digests(tensor_digests([file]))
    assert after.weights != before.weights and after.rounded == before.rounded


def test_progress_ends_at_the_size_of_the_files(file: Path) -> None:
    heard: list[tuple[int, int]] = []
    tensor_digests([file], on_bytes=lambda read, total: heard.append((read, total)), cache=False)
    assert heard[-1] == (file.stat().st_size,) * 2 and heard == sorted(heard)


def test_a_file_is_read_once_and_then_remembered(file: Path, cached: list[Path]) -> None:
    first = tensor_digests([file])
    assert tensor_digests([file]) == first and cached == [file]


def test_a_changed_file_is_read_again_whatever_its_times_say(file: Path, cached: list[Path]) -> None:
    before, state = tensor_digests([file]), file.stat()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))  # size, time and inode as they were
    assert tensor_digests([file]) != before and len(cached) == 2


def test_another_file_in_its_place_is_read_again(file: Path, cached: list[Path]) -> None:
    before = tensor_digests([file])
    save_file({"a": VALUES + 1, "b": torch.arange(3)}, file.with_name("other"))
    file.with_name("other").replace(file)
    assert tensor_digests([file]) != before


def test_a_file_that_was_just_written_is_not_remembered(
    file: Path, cached: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_SETTLED_SECONDS", 3600.0)
    tensor_digests([file])
    tensor_digests([file])
    assert len(cached) == 2


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"tensors": 1}'])
def test_a_damaged_note_is_as_good_as_none(file: Path, cached: list[Path], damage: bytes) -> None:
    before = tensor_digests([file])
    weights._cache_file(file).write_bytes(damage)
    assert tensor_digests([file]) == before and len(cached) == 2


def test_a_cache_that_cannot_be_written_is_no_reason_to_fail(
    file: Path, cached: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))  # no directory
    assert set(tensor_digests([file])) == {"a", "b"}


def test_digests_do_not_depend_on_the_order_of_tensors() -> None:
    one = TensorDigest("a", "F32", (1,), "sha256:" + "0" * 64, "sha256:" + "1" * 64)
    two = TensorDigest("b", "F32", (1,), "sha256:" + "2" * 64, "sha256:" + "3" * 64)
    assert weights_digests({"a": one, "b": two}) == weights_digests({"b": two, "a": one})
