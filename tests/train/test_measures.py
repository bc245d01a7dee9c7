from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import lopd_train
from lopd_train import TrainConfig, measures, student
from lopd_train.batches import collate
from tests.train.records import records_of


def measured(model: Path, artifact: Path) -> dict[str, float]:
    """The metrics of a model on all rollouts of an artifact, as an evaluation has them."""
    loaded = student.load(model, TrainConfig(device="cpu"))
    batch = collate(records_of(artifact), "cpu")
    with torch.inference_mode():
        sums = loaded.sums(loaded.states(batch), batch, measures.measure)
    return measures.finish({name: float(value) / len(batch.targets) for name, value in sums.items()})


def test_the_reference_policy_has_not_drifted_and_counts_in_full(reference: Path, artifact: Path) -> None:
    metrics = measured(reference, artifact)
    assert 0 <= metrics["drift"] < 1e-4
    assert metrics["effective_sample_size"] > 0.999
    assert measures.gauge(metrics) == "close to its rollouts"
    assert metrics["reverse_kl"] > 0
    assert 0 < metrics["coverage"] < 1
    assert 0 < metrics["entropy"] < 6  # log of the vocabulary


def test_a_student_that_is_the_teacher_is_covered_and_far_from_the_rollouts_of_another(
    teacher_dir: Path, artifact: Path
) -> None:
    metrics = measured(teacher_dir, artifact)
    assert abs(metrics["advantage"]) < 1 / 512
    assert 0 <= metrics["reverse_kl"] < 1e-3
    assert metrics["coverage"] > 0.98  # what the artifact was built to cover
    assert (measures.gauge(metrics) or "").startswith("far from its rollouts: new ones are worth their price")


def test_what_a_temperature_loses_of_the_teacher_is_measured(reference: Path, artifact: Path) -> None:
    tails = [item.topk.tail_logprobs for item in records_of(artifact) if item.topk is not None]
    kept = -np.expm1(np.concatenate(tails).astype(np.float64)).mean()
    assert kept < 0.999
    assert measured(reference, artifact)["teacher_coverage"] == pytest.approx(kept, abs=1e-3)


def test_a_token_that_a_model_rules_out_leaves_every_metric_a_number(reference: Path, artifact: Path) -> None:
    loaded = student.load(reference, TrainConfig(device="cpu"))
    batch = collate(records_of(artifact)[:2], "cpu")
    impossible = torch.full((len(batch.targets),), -torch.inf)
    with torch.inference_mode():
        batch = replace(batch, sampled_logprobs=impossible, reference_logprobs=impossible)
        sums = loaded.sums(loaded.states(batch), batch, measures.measure)
    metrics = measures.finish({name: float(value) for name, value in sums.items()})
    assert all(map(math.isfinite, metrics.values()))
    assert (measures.gauge(metrics) or "").startswith("far")


@pytest.mark.parametrize(
    ("drift", "size", "begins"),
    [
        *((0.0, 1.0, "close"), (0.02, 0.9, "close"), (0.021, 1.0, "drifting"), (0.0, 0.89, "drifting")),
        *((0.1, 0.5, "drifting"), (0.11, 1.0, "far"), (0.0, 0.49, "far"), (float("inf"), 1.0, "far")),
    ],
)
def test_the_gauge_speaks_for_the_worse_of_drift_and_sample_size(drift: float, size: float, begins: str) -> None:
    assert (measures.gauge({"drift": drift, "effective_sample_size": size}) or "").startswith(begins)


def test_the_gauge_is_silent_where_no_reference_log_probs_are_stored() -> None:
    assert measures.gauge({"loss": 1.0, "entropy": 0.5}) is None


def test_the_gauge_goes_from_close_to_far_while_a_student_trains_on(
    artifact: Path, reference: Path, tmp_path: Path
) -> None:
    config = TrainConfig(steps=6, learning_rate=1e-2, batch_rollouts=8, eval_fraction=0.2, device="cpu")
    result = lopd_train.train(artifact=artifact, student=reference, output=tmp_path / "opd", config=config)
    assert measures.gauge(result.first_eval) == "close to its rollouts"
    assert (measures.gauge(result.last_eval) or "").startswith("far")
    lines = [json.loads(line) for line in (result.output / "metrics.jsonl").read_text().splitlines()]
    drifts = [line["drift"] for line in lines if "drift" in line]
    assert drifts[0] < 1e-4 < drifts[2] < drifts[-1]


def test_weights_in_use_are_what_the_sample_size_is_of(artifact: Path, reference: Path, tmp_path: Path) -> None:
    config = TrainConfig(steps=3, learning_rate=1e-3, batch_rollouts=8, eval_fraction=0, device="cpu")

    def sizes(name: str, config: TrainConfig) -> list[float]:
        output = lopd_train.train(artifact=artifact, student=reference, output=tmp_path / name, config=config).output
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        return [line["effective_sample_size"] for line in lines]

    tokens, sequences = (
        sizes("token", replace(config, correction="token")),
        sizes("sequence", replace(config, correction="sequence")),
    )
    assert tokens[0] == pytest.approx(1, abs=1e-3)
    assert all(of_sequences < of_tokens for of_tokens, of_sequences in zip(tokens[1:], sequences[1:], strict=True))
