"""The plain table: what a reader of Parquet finds in it is what the artifact holds, value by value."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import lopd_store
from tests.interop.conftest import KEPT


def assert_same(row: dict[str, object], artifact: lopd_store.Artifact, number: int) -> None:
    rollout = artifact.rollout(number)
    assert row["prompt_ids"] == rollout.prompt_ids.tolist()
    assert row["completion_ids"] == rollout.response_ids.tolist()
    assert row["loss_mask"] == rollout.loss_mask.tolist()
    assert row["teacher_sampled_logprobs"] == rollout.sampled_logprobs.tolist()
    topk = rollout.topk
    assert topk is not None
    pieces = topk.offsets[1:-1]
    assert row["teacher_topk_ids"] == [piece.tolist() for piece in np.split(topk.ids, pieces)]
    assert row["teacher_topk_logprobs"] == [piece.tolist() for piece in np.split(topk.logprobs, pieces)]
    assert row["teacher_tail_logprobs"] == topk.tail_logprobs.tolist()
    if rollout.reference_logprobs is not None:
        assert row["reference_sampled_logprobs"] == rollout.reference_logprobs.tolist()


def test_every_value_is_the_artifacts(mixed: Path, tmp_path: Path) -> None:
    lopd_store.export(mixed, "trl", output=tmp_path / "rows.parquet")
    rows, artifact = pq.read_table(tmp_path / "rows.parquet").to_pylist(), lopd_store.open(mixed)
    assert len(rows) == len(KEPT) and "reference_sampled_logprobs" in rows[0]
    for row, number in zip(rows, KEPT, strict=True):
        assert_same(row, artifact, number)


def test_a_copy_without_top_k_has_no_columns_for_it(mixed: Path, tmp_path: Path) -> None:
    copy = lopd_store.subset(mixed, output=tmp_path / "copy", only="sampled")
    lopd_store.export(copy.path, "trl", output=tmp_path / "rows.parquet")
    names = pq.read_schema(tmp_path / "rows.parquet").names
    assert "teacher_sampled_logprobs" in names and not [name for name in names if "topk" in name or "tail" in name]


@pytest.mark.system
def test_it_loads_in_datasets(mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    import datasets

    lopd_store.export(mixed, "trl", output=tmp_path / "rows.parquet")
    rows = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "rows.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    artifact = lopd_store.open(mixed)
    for row, number in zip(rows, KEPT, strict=True):
        assert_same(row, artifact, number)
