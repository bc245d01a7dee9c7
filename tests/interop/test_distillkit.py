"""DistillKit's files, read by a decoder that shares nothing with the writer, and by DistillKit's own where it is there.

`DISTILLKIT=path/to/DistillKit pytest tests/interop` names a checkout of it.
"""

from __future__ import annotations

import json
import math
import os
import struct
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

import lopd_store
from lopd_store import gate
from lopd_store.errors import InputError
from lopd_store.interop.distillkit import pack_ids
from tests.interop.conftest import KEPT

Rows = list[tuple[list[int], list[float]]]


def decode(row: dict[str, Any], config: dict[str, Any]) -> Rows:
    """Ids and log-probs of each row, bit by bit as the format says."""
    assert config["exact_k"] == config["k"] and config["exact_dtype"] == "float32"
    assert not config["residual_bins"] and not config["polynomial_terms"] and not config["delta_encoding"]
    bits = math.ceil(math.log2(config["d"]))
    rows = []
    for values, packed in zip(row["compressed_logprobs"], row["bytepacked_indices"], strict=True):
        stream = "".join(f"{byte:08b}" for byte in packed)
        assert set(stream[config["k"] * bits :]) <= {"0"} and len(stream) - config["k"] * bits < 8
        ids = [int(stream[place * bits : (place + 1) * bits], 2) for place in range(config["k"])]
        rows.append((ids, list(struct.unpack(f"<{config['k']}f", bytes(values)))))
    return rows


def read(directory: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    config = yaml.safe_load((directory / "compression_config.yaml").read_bytes())
    return pq.read_table(directory / "data_0.parquet").to_pylist(), config


def assert_same(row: dict[str, Any], decoded: Rows, rollout: Any, k: int) -> None:
    """The rows hold what the artifact does at each position, and nothing anywhere else."""
    prompt, topk = len(rollout.prompt_ids), rollout.topk
    assert row["input_ids"] == [*rollout.prompt_ids, *rollout.response_ids]
    assert len(decoded) == len(row["input_ids"]) - 1
    for ids, logprobs in decoded[: prompt - 1]:
        assert ids == list(range(k)) and logprobs == [-1e4] * k
    for position, (ids, logprobs) in enumerate(decoded[prompt - 1 :]):
        stored = slice(topk.offsets[position], topk.offsets[position] + min(k, topk.counts[position]))
        count = stored.stop - stored.start
        assert ids[:count] == topk.ids[stored].tolist()
        np.testing.assert_array_equal(np.array(logprobs[:count], np.float32), topk.logprobs[stored])
        assert len(set(ids)) == k and logprobs[count:] == [-1e4] * (k - count)
    counted = [False] * (prompt - 1) + rollout.loss_mask.tolist() + [False]
    wanted = [id if counts else -100 for id, counts in zip(row["input_ids"], counted, strict=True)]
    assert row["labels"] == wanted


@pytest.mark.parametrize("k", [None, 5])
def test_an_independent_decoder_finds_the_artifact(mixed: Path, tmp_path: Path, k: int | None) -> None:
    lopd_store.export(mixed, "distillkit", output=tmp_path / "rows", k=k)
    rows, config = read(tmp_path / "rows")
    artifact = lopd_store.open(mixed)
    assert config["k"] == (k or 12) and config["d"] == artifact.manifest.inputs[0].teacher.vocab_size
    for row, number in zip(rows, KEPT, strict=True):
        assert_same(row, decode(row, config), artifact.rollout(number), config["k"])


@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field` is deprecated")
@pytest.mark.skipif("DISTILLKIT" not in os.environ, reason="DISTILLKIT names no checkout")
def test_distillkits_own_decoder_finds_the_artifact(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(sys, "path", [*sys.path, os.environ["DISTILLKIT"]])
    codec = import_module("distillkit.compression")
    lopd_store.export(mixed, "distillkit", output=tmp_path / "rows")
    rows, config = read(tmp_path / "rows")
    compressor = codec.LogprobCompressor(config=codec.DistributionQuantizationConfig(**config))
    artifact = lopd_store.open(mixed)
    for row, number in zip(rows, KEPT, strict=True):
        batch = {name: torch.tensor(row[name])[None] for name in ("compressed_logprobs", "bytepacked_indices")}
        ids, logprobs = (found[0].tolist() for found in compressor.decompress_to_sparse(batch))
        assert_same(row, list(zip(ids, logprobs, strict=True)), artifact.rollout(number), config["k"])


@pytest.mark.parametrize(("bits", "k"), [(1, 3), (7, 8), (17, 5), (18, 4), (32, 2)])
def test_ids_are_packed_most_significant_bit_first(bits: int, k: int) -> None:
    ids = np.random.default_rng(bits).integers(0, 1 << bits, (20, k), np.int64).astype(np.uint32)
    for row, packed in zip(ids.tolist(), pack_ids(ids, bits), strict=True):
        stream = "".join(f"{id:0{bits}b}" for id in row)
        padded = stream + "0" * (-len(stream) % 8)
        assert packed.tobytes() == int(padded, 2).to_bytes(len(padded) // 8, "big")


def test_what_the_gate_found_lies_beside_the_data_too(unknown: Path, tmp_path: Path) -> None:
    output = tmp_path / "rows"
    exported = lopd_store.export(unknown, "distillkit", output=output, overrides=gate.OVERRIDES)
    record = json.loads((output / "lopd-export.json").read_bytes())
    assert record == exported.record and record["overrides"] == [gate.ALLOW_UNKNOWN]
    assert record["settings"] == {"k": 64}
    assert exported.bytes == sum(file.stat().st_size for file in output.iterdir())


def test_an_interrupted_export_leaves_no_directory(mixed: Path, tmp_path: Path) -> None:
    def stop(done: float, total: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lopd_store.export(mixed, "distillkit", output=tmp_path / "rows", on_positions=stop)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("k", [0, 13])
def test_a_k_that_no_position_has_is_refused(mixed: Path, tmp_path: Path, k: int) -> None:
    with pytest.raises(InputError, match="`k` is out of range\n  expected  1 to 12"):
        lopd_store.export(mixed, "distillkit", output=tmp_path / "rows", k=k)


def test_a_copy_without_top_k_is_refused(mixed: Path, tmp_path: Path) -> None:
    copy = lopd_store.subset(mixed, output=tmp_path / "copy", only="sampled")
    with pytest.raises(InputError, match="is a copy without top-k"):
        lopd_store.export(copy.path, "distillkit", output=tmp_path / "rows")


def test_k_goes_with_formats_of_fixed_k_alone(mixed: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="`k` does not go with `trl`"):
        lopd_store.export(mixed, "trl", output=tmp_path / "rows.parquet", k=4)


@pytest.mark.system
def test_the_directory_loads_in_datasets(mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    import datasets

    lopd_store.export(mixed, "distillkit", output=tmp_path / "rows")
    rows = datasets.load_dataset(str(tmp_path / "rows"), split="train", cache_dir=str(tmp_path / "cache"))
    assert list(rows) == read(tmp_path / "rows")[0]
