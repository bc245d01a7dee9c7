"""SFT data mixed into opd: one mean over the rollouts, one over the SFT data, and a weight between them."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lopd_train
from lopd_store.digest import digest_contents
from lopd_store.errors import ConsistencyError, DataError, InputError
from lopd_store.gate import OVERRIDES
from lopd_store.rollouts import RolloutsFile, write_rollouts
from lopd_train import TrainConfig, opd, student
from lopd_train.batches import Record
from lopd_train.card import MODEL_CARD
from lopd_train.data import rollouts_source
from lopd_train.sft import cross_entropy
from lopd_train.trainer import Term, Trainer
from tests.train.records import feed_of, records_of

WEIGHT = 0.7
MIXED = TrainConfig(steps=4, batch_rollouts=4, learning_rate=1e-3, device="cpu", sft_weight=WEIGHT, sft_rollouts=3)


@pytest.fixture(scope="module")
def rows(artifact: Path, sft_data: Path) -> tuple[list[Record], list[Record]]:
    """Some rollouts, and some SFT data of other lengths."""
    return records_of(artifact)[:4], rollouts_source(RolloutsFile(sft_data)).read(0)[:7]


def gradients(
    model: Path, rows: tuple[list[Record], list[Record]], config: TrainConfig, directory: Path
) -> tuple[tuple[float, ...], Tensor]:
    """The losses of both terms and the gradient of one step on both, with a body in float64."""
    directory.mkdir(exist_ok=True)
    loaded = student.load(model, config)
    loaded.model.double()
    terms = [
        Term(measure=partial(opd.measure, config), feed=feed_of(rows[0], config), rollouts=4),
        Term(measure=cross_entropy, feed=feed_of(rows[1], config), rollouts=7, weight=config.sft_weight),
    ]
    trainer = Trainer(loaded, terms, directory)
    losses = [trainer.backward(some, term)["loss"] for some, term in zip(rows, terms, strict=True)]
    return tuple(losses), torch.cat([parameter.grad.flatten() for parameter in loaded.model.parameters()])


def test_the_gradient_is_that_of_the_two_means_over_whole_distributions(
    rows: tuple[list[Record], list[Record]], reference: Path, tmp_path: Path
) -> None:
    losses, gradient = gradients(reference, rows, MIXED, tmp_path)
    model = student.load(reference, MIXED).model.double()
    means = [
        torch.stack([dense(model, item) for item in some]).sum() / sum(item.positions for item in some) for some in rows
    ]
    (means[0] + WEIGHT * means[1]).backward()  # type: ignore[no-untyped-call]
    assert losses == pytest.approx([mean.item() for mean in means], rel=1e-4)
    twin = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert float((gradient - twin).norm() / twin.norm()) < 1e-4
    unmixed = gradients(reference, rows, replace(MIXED, sft_weight=0.0), tmp_path)[1]
    assert float((unmixed - twin).norm() / twin.norm()) > 0.01


def dense(model: Any, item: Record) -> Tensor:
    """What a rollout adds: the paper's loss where there is a teacher, else cross-entropy; from all logits."""
    ids = torch.from_numpy(item.token_ids.astype(np.int64))
    logprobs = torch.log_softmax(model(input_ids=ids[None]).logits[0], dim=-1)
    places = torch.arange(item.prompt_length, len(ids))[torch.from_numpy(item.loss_mask)]
    q = logprobs[places - 1, ids[places]]
    if item.sampled_logprobs is None:
        return -q.sum()
    return -((torch.from_numpy(item.sampled_logprobs[item.loss_mask]) - q.detach()) * q).sum()


def test_each_mean_has_one_denominator_however_it_is_cut(
    rows: tuple[list[Record], list[Record]], reference: Path, tmp_path: Path
) -> None:
    losses, gradient = gradients(reference, rows, MIXED, tmp_path)
    for max_tokens in (60, 1):
        cut_losses, cut = gradients(reference, rows, replace(MIXED, micro_batch_tokens=max_tokens), tmp_path)
        assert cut_losses == pytest.approx(losses, rel=1e-6)
        assert float((cut - gradient).norm() / gradient.norm()) < 1e-6


def test_a_mixed_run_lowers_the_loss_on_sft_data_says_so_and_is_resumed_exactly(
    artifact: Path, reference: Path, sft_data: Path, tmp_path: Path
) -> None:
    # All of the SFT data in every step, and with so much weight that its loss falls.
    config = replace(MIXED, checkpoint_every=1, eval_fraction=0, sft_rollouts=100, sft_weight=9.0)
    arguments: dict[str, Any] = {"artifact": artifact, "student": reference, "config": config, "sft_data": sft_data}

    def stop(progress: lopd_train.Progress) -> None:
        if progress.step == 2:
            raise RuntimeError("crash")

    whole = lopd_train.train(**arguments, output=tmp_path / "whole").output
    with pytest.raises(RuntimeError, match="crash"):
        lopd_train.train(**arguments, output=tmp_path / "opd", on_progress=stop)
    with pytest.raises(InputError, match=r"another `(config.sft_weight|inputs.sft_data.digest)`"):
        lopd_train.train(
            **(arguments | {"sft_data": None, "config": replace(config, sft_weight=0)}), output=tmp_path / "opd"
        )
    resumed = lopd_train.train(**arguments, output=tmp_path / "opd").output
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["sft_loss"] < lines[0]["sft_loss"]
    run = json.loads((whole / "run.json").read_text())
    digest = RolloutsFile(sft_data).digest()
    assert run["inputs"]["sft_data"] == {"path": str(sft_data), "digest": digest}
    assert f"| SFT data mixed in | `{digest}` |" in (whole / MODEL_CARD).read_text()


def test_sft_data_of_another_teacher_is_refused(
    artifact: Path, reference: Path, rollouts: Path, sft_data: Path, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"artifact": artifact, "student": reference, "output": tmp_path / "opd"}
    with pytest.raises(ConsistencyError, match="the SFT data was written by another teacher"):
        lopd_train.train(**arguments, config=MIXED, sft_data=rollouts)
    with pytest.raises(InputError, match="`sft_data` and `sft_weight` go together"):
        lopd_train.train(**arguments, config=MIXED)
    with pytest.raises(InputError, match="`sft_data` and `sft_weight` go together"):
        lopd_train.train(**arguments, config=replace(MIXED, sft_weight=0.0), sft_data=sft_data)
    assert not list(tmp_path.iterdir())


def test_sft_data_of_another_tokenizer_is_refused_whatever_is_overridden(
    artifact: Path, reference: Path, sft_data: Path, tmp_path: Path
) -> None:
    record = RolloutsFile(sft_data).record
    assert record is not None
    policy, other = replace(record.policy, tokenizer=digest_contents(b"other").sha256), tmp_path / "other.parquet"
    write_rollouts(other, [{"prompt_ids": [9], "response_ids": [8]}], replace(record, policy=policy))
    arguments: dict[str, Any] = {"artifact": artifact, "student": reference, "output": tmp_path / "opd"}
    with pytest.raises(DataError, match="has ids of another tokenizer than that of the student"):
        lopd_train.train(**arguments, config=MIXED, sft_data=other, overrides=OVERRIDES)
