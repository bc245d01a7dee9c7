"""Axolotl's prepared rows: row i is the distribution over token i + 1, and masks say what is stored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import lopd_store
from lopd_store.interop.target import IGNORED, NOTHING
from tests.commands import run_command
from tests.interop.conftest import KEPT


@pytest.mark.parametrize("k", [None, 4])
def test_every_row_predicts_the_next_token(mixed: Path, tmp_path: Path, k: int | None) -> None:
    lopd_store.export(mixed, "axolotl", output=tmp_path / "rows.parquet", k=k)
    artifact = lopd_store.open(mixed)
    for row, number in zip(pq.read_table(tmp_path / "rows.parquet").to_pylist(), KEPT, strict=True):
        rollout = artifact.rollout(number)
        tokens, prompt, topk = [*rollout.prompt_ids, *rollout.response_ids], len(rollout.prompt_ids), rollout.topk
        assert topk is not None
        assert row["input_ids"] == tokens and row["attention_mask"] == [1] * len(tokens)
        included = [False] * prompt + rollout.loss_mask.tolist()
        assert row["labels"] == [id if yes else IGNORED for id, yes in zip(tokens, included, strict=True)]
        for place in range(len(tokens)):
            ids, logprobs, mask = (row[f"target_{name}"][place] for name in ("token_ids", "logprobs", "mask"))
            assert len(ids) == len(logprobs) == len(mask) == len(set(ids)) == (k or 12)
            position = place + 1 - prompt
            is_position = 0 <= position < len(rollout.response_ids)
            count = min(len(ids), int(topk.counts[position])) if is_position else 0
            if is_position:
                entries = slice(topk.offsets[position], topk.offsets[position] + count)
                assert ids[:count] == topk.ids[entries].tolist()
                np.testing.assert_array_equal(np.array(logprobs[:count], np.float32), topk.logprobs[entries])
            assert logprobs[count:] == [NOTHING] * (len(ids) - count)
            shown = count if is_position and included[place + 1] else 0
            assert mask == [1] * shown + [0] * (len(ids) - shown)


def test_the_mask_selects_the_forward_kl_of_the_stored_entries(mixed: Path, tmp_path: Path) -> None:
    """The loss as Axolotl computes it, from logits of every token, is the one over the artifact's own rows."""
    lopd_store.export(mixed, "axolotl", output=tmp_path / "rows.parquet")
    artifact, generator = lopd_store.open(mixed), np.random.default_rng(0)
    for row, number in zip(pq.read_table(tmp_path / "rows.parquet").to_pylist(), KEPT, strict=True):
        rollout = artifact.rollout(number)
        topk = rollout.topk
        assert topk is not None
        logits = generator.normal(size=(len(row["input_ids"]), 300))
        student = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        ids, logprobs, mask = (np.array(row[f"target_{name}"]) for name in ("token_ids", "logprobs", "mask"))
        terms = np.exp(logprobs) * (logprobs - np.take_along_axis(student, ids, axis=1))
        wanted = 0.0
        for position in np.flatnonzero(rollout.loss_mask):
            entries = slice(topk.offsets[position], topk.offsets[position + 1])
            teacher = topk.logprobs[entries].astype(np.float64)
            at = len(rollout.prompt_ids) + position - 1
            wanted += float((np.exp(teacher) * (teacher - student[at, topk.ids[entries]])).sum())
        assert terms[mask == 1].sum() == pytest.approx(wanted, abs=1e-9)


def test_the_command_takes_k(mixed: Path, tmp_path: Path) -> None:
    ran = run_command(
        "lopd-store", "export", "axolotl", mixed, "--k", 3, "--output", tmp_path / "rows.parquet", "--json"
    )
    assert ran.code == 0 and ran.json["record"]["settings"] == {"k": 3}
