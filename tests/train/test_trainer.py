from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lopd_store.errors import DataError
from lopd_train import TrainConfig, student
from lopd_train.batches import Record
from lopd_train.data import Cursor
from lopd_train.trainer import Trainer
from tests.train.records import feed_of, records_of, trainer_of

TINY_SETTINGS = TrainConfig(steps=4, batch_rollouts=4, learning_rate=1e-3, device="cpu", checkpoint_every=1)


@pytest.fixture(scope="module")
def records(artifact: Path) -> list[Record]:
    """Rollouts of different lengths, some of whose positions do not count."""
    rng = np.random.default_rng(0)
    return [replace(item, loss_mask=rng.random(len(item.loss_mask)) < 0.8) for item in records_of(artifact)]


def trainer(
    model: Path, records: list[Record], directory: Path, config: TrainConfig = TINY_SETTINGS, held_out: int = 0
) -> Trainer:
    directory.mkdir(exist_ok=True)
    feed = feed_of(records[held_out:] or records, config, records[:held_out])
    return trainer_of(student.load(model, config), feed, directory)


def gradients(
    model: Path, records: list[Record], directory: Path, config: TrainConfig = TINY_SETTINGS
) -> tuple[float, torch.Tensor]:
    """Loss and gradient of one optimiser step over all of these rollouts, with a body in float64."""
    made = trainer(model, records, directory, config)
    made.student.model.double()
    loss = made.backward(records, made.terms[0])["loss"]
    return loss, torch.cat([parameter.grad.flatten() for parameter in made.student.model.parameters()])


def test_cutting_a_step_into_micro_batches_changes_neither_loss_nor_gradient(
    records: list[Record], reference: Path, tmp_path: Path
) -> None:
    eight = records[:8]
    longest = max(len(item.token_ids) for item in eight)
    whole_loss, whole = gradients(reference, eight, tmp_path)
    for max_tokens in (4 * longest, 1):  # two micro-batches of four or so, and eight of one
        loss, gradient = gradients(reference, eight, tmp_path, replace(TINY_SETTINGS, micro_batch_tokens=max_tokens))
        assert loss == pytest.approx(whole_loss, rel=1e-6)
        assert float((gradient - whole).norm() / whole.norm()) < 1e-6


def test_the_mean_is_over_positions_and_not_over_rollouts(
    records: list[Record], reference: Path, tmp_path: Path
) -> None:
    pair = sorted(records[:12], key=lambda item: item.positions)
    short, long = pair[0], pair[-1]
    assert short.positions < long.positions
    losses = [gradients(reference, [item], tmp_path)[0] for item in (short, long)]
    together = gradients(reference, [short, long], tmp_path)[0]
    weighted = losses[0] * short.positions + losses[1] * long.positions
    assert together == pytest.approx(weighted / (short.positions + long.positions), rel=1e-5)


def test_a_student_equal_to_the_teacher_has_no_advantage(
    records: list[Record], teacher_dir: Path, reference: Path, tmp_path: Path
) -> None:
    trainers = [trainer(model, records, tmp_path) for model in (teacher_dir, reference)]
    same, other = (made.backward(records, made.terms[0]) for made in trainers)
    assert abs(same["advantage"]) < 1 / 512
    assert abs(same["loss"]) < 1e-2
    assert other["advantage"] < -1


def test_the_gradient_follows_the_teachers_signal(records: list[Record], reference: Path, tmp_path: Path) -> None:
    def with_signal(change: float) -> torch.Tensor:
        return gradients(reference, [shifted(item, change) for item in records[:4]], tmp_path)[1]

    def shifted(item: Record, change: float) -> Record:
        assert item.sampled_logprobs is not None
        return replace(item, sampled_logprobs=np.minimum(item.sampled_logprobs + np.float32(change), 0))

    plain, changed = with_signal(0), with_signal(-3)
    assert float((plain - changed).norm() / plain.norm()) > 0.05


def test_what_the_teacher_said_at_masked_positions_changes_nothing(
    records: list[Record], reference: Path, tmp_path: Path
) -> None:
    def spoiled(item: Record) -> Record:
        assert item.sampled_logprobs is not None
        return replace(item, sampled_logprobs=np.where(item.loss_mask, item.sampled_logprobs, np.float32(np.nan)))

    assert not all(item.loss_mask.all() for item in records[:4])
    plain = gradients(reference, records[:4], tmp_path)
    masked = gradients(reference, [spoiled(item) for item in records[:4]], tmp_path)
    assert masked[0] == plain[0]
    assert torch.equal(masked[1], plain[1])


def test_evaluation_counts_only_positions_in_the_loss(records: list[Record], reference: Path, tmp_path: Path) -> None:
    def reverse_kl(*items: Record) -> tuple[float, int]:
        measures = trainer(reference, [*items], tmp_path, held_out=len(items)).evaluate()
        return measures["reverse_kl"], measures["tokens"]

    first, second = records[0], replace(records[1], loss_mask=np.ones_like(records[1].loss_mask))
    whole, part = replace(first, loss_mask=np.ones_like(first.loss_mask)), first
    assert reverse_kl(part, second)[1] == part.positions + second.positions
    assert reverse_kl(part)[0] != reverse_kl(whole)[0]
    mean = (reverse_kl(part)[0] * part.positions + reverse_kl(second)[0] * second.positions) / reverse_kl(part, second)[
        1
    ]
    assert reverse_kl(part, second)[0] == pytest.approx(mean, rel=1e-5)


def test_held_out_reverse_kl_of_the_teacher_itself_is_the_cost_of_rounding(
    records: list[Record], teacher_dir: Path, reference: Path, tmp_path: Path
) -> None:
    same, other = (
        trainer(model, records, tmp_path, held_out=8).evaluate()["reverse_kl"] for model in (teacher_dir, reference)
    )
    assert 0 <= same < 1e-3
    assert other > 1


def test_recomputing_activations_leaves_the_gradient_where_it_is(
    records: list[Record], reference: Path, tmp_path: Path
) -> None:
    plain = gradients(reference, records[:4], tmp_path)[1]
    again = gradients(reference, records[:4], tmp_path, replace(TINY_SETTINGS, gradient_checkpointing=True))[1]
    torch.testing.assert_close(again, plain)


def test_weights_of_norms_do_not_decay(reference: Path, tmp_path: Path, records: list[Record]) -> None:
    groups = trainer(reference, records, tmp_path).optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert {p.ndim for p in groups[0]["params"]} == {2}
    assert {p.ndim for p in groups[1]["params"]} == {1}


def test_a_loss_that_is_not_finite_stops_the_run_names_the_rollouts_and_keeps_the_last_checkpoint(
    records: list[Record], reference: Path, tmp_path: Path
) -> None:
    training = [replace(item, loss_mask=np.ones_like(item.loss_mask)) for item in records]
    steps = feed_of(training, TINY_SETTINGS).steps(Cursor(), batch=4, count=2)
    first, second = ({item.row for item in some} for some, _ in steps)
    (bad, *_) = second - first
    impossible = np.full_like(training[bad].loss_mask, -math.inf, dtype=np.float32)
    training[bad] = replace(training[bad], sampled_logprobs=impossible)
    made = trainer(reference, training, tmp_path, replace(TINY_SETTINGS, micro_batch_tokens=1))
    with pytest.raises(DataError, match=rf"the loss of step 2 is not finite, from the rollouts {training[bad].row}\n"):
        made.train()
    assert all(bool(parameter.isfinite().all()) for parameter in made.student.model.parameters())
    assert trainer(reference, training, tmp_path).step == 1


def test_a_gradient_that_is_not_finite_stops_the_run_too(
    records: list[Record], reference: Path, tmp_path: Path
) -> None:
    made = trainer(reference, records, tmp_path)
    next(iter(made.student.model.parameters())).register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(
        DataError, match=r"the gradient of step 1 is not finite, from the rollouts \d+, \d+, \d+, \d+\n"
    ):
        made.train()


def test_an_evaluation_that_is_not_finite_stops_the_run_before_it_begins(
    records: list[Record], reference: Path, tmp_path: Path
) -> None:
    made = trainer(reference, records, tmp_path, held_out=2)
    with torch.no_grad():
        next(iter(made.student.model.parameters())).fill_(math.nan)
    with pytest.raises(DataError, match=r"the evaluation after step 0 is not finite, from the rollouts 0, 1\n"):
        made.train()
