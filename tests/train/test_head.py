"""The chunked head against float64 twins that hold all logits."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from lopd_train import losses
from lopd_train.batches import Batch, BatchTopK
from lopd_train.head import Measure, Predictions, Sums, chunked_sums, predict
from lopd_train.losses import Categories

POSITIONS, WIDTH, VOCABULARY, CAP = 10, 4, 9, 3.0
COUNTS = [0, 1, 3, 2, 8, 1, 0, 2, 4, 1]
NAMES = ("sampled", "entries", "tail", "logsumexp", "entropy")


def float64(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stored(positions: npt.NDArray[Any], ids: npt.NDArray[Any]) -> BatchTopK:
    """These ids at these positions; what the teacher thinks of them is not asked."""
    count = int(positions[-1]) + 1
    teacher = Categories(logprobs=torch.zeros(len(ids)), tail=torch.zeros(count), positions=torch.from_numpy(positions))
    offsets = np.searchsorted(positions, np.arange(count + 1))
    return BatchTopK(offsets=offsets, ids=torch.from_numpy(ids), teacher=teacher, reference=None)


def batch(counts: list[int] | None = COUNTS) -> Batch:
    """Targets, and ids as an artifact has them."""
    rng = np.random.default_rng(0)
    topk = None
    if counts is not None:
        ids = np.concatenate([rng.permutation(VOCABULARY)[:count] for count in counts])
        topk = stored(np.repeat(np.arange(POSITIONS), counts), ids)
    return Batch(
        rows=(0,),
        input_ids=torch.zeros(1, POSITIONS, dtype=torch.int64),
        borders=torch.tensor([0, POSITIONS], dtype=torch.int32),
        sources=torch.arange(POSITIONS),
        targets=torch.tensor([0, 8, 3, 3, 1, 7, 2, 5, 5, 4]),
        rollouts=torch.zeros(POSITIONS, dtype=torch.int64),
        sampled_logprobs=None,
        reference_logprobs=None,
        topk=topk,
    )


class Head:
    """A head with a bias and a soft cap that remembers how many positions it was given at once."""

    def __init__(self) -> None:
        self.states = float64(POSITIONS, WIDTH, seed=0).requires_grad_()
        self.weight = float64(VOCABULARY, WIDTH, seed=1).requires_grad_()
        self.bias = float64(VOCABULARY, seed=2).requires_grad_()
        self.largest = 0

    def logits(self, states: Tensor) -> Tensor:
        self.largest = max(self.largest, len(states))
        return CAP * torch.tanh((states @ self.weight.T + self.bias) / CAP)

    def gradients(self, value: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(value, (self.states, self.weight, self.bias))


def dense(head: Head, batch: Batch) -> dict[str, Tensor]:
    """Everything there is to predict, from all logits at once."""
    logits = head.logits(head.states)
    logprobs = torch.log_softmax(logits, dim=-1)
    values = {
        "sampled": logprobs.gather(1, batch.targets[:, None])[:, 0],
        "logsumexp": logits.exp().sum(dim=-1).log(),
        "entropy": -(logprobs.exp() * logprobs).sum(dim=-1),
    }
    if batch.topk is None:
        return values
    outside = torch.ones(POSITIONS, VOCABULARY, dtype=torch.bool)
    outside[batch.topk.teacher.positions, batch.topk.ids] = False
    tail = torch.where(outside, logprobs.exp(), 0).sum(dim=-1).log()
    return {**values, "tail": tail, "entries": logprobs[batch.topk.teacher.positions, batch.topk.ids]}


def named(predicted: Predictions) -> dict[str, Tensor]:
    values = {"sampled": predicted.sampled, "logsumexp": predicted.logsumexp, "entropy": predicted.entropy}
    if predicted.topk is not None:
        values |= {"tail": predicted.topk.tail, "entries": predicted.topk.logprobs}
    return values


def everything(predicted: Predictions, piece: Batch) -> Sums:
    """A loss that depends on all of it, and differently on each position."""
    return {"loss": torch.stack([((value + 2) ** 2).sum() for value in named(predicted).values()]).sum()}


@pytest.mark.parametrize("counts", [None, COUNTS])
def test_predictions_are_those_of_all_logits(counts: list[int] | None) -> None:
    head, wanted = Head(), batch(counts)
    actual, expected = named(predict(head.logits(head.states), wanted)), dense(head, wanted)
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_of_each_prediction_is_that_of_all_logits(name: str) -> None:
    head, wanted = Head(), batch()
    actual, expected = named(predict(head.logits(head.states), wanted))[name], dense(head, wanted)[name]
    weights = torch.linspace(-1, 2, len(actual), dtype=torch.float64)
    torch.testing.assert_close(head.gradients((actual * weights).sum()), head.gradients((expected * weights).sum()))


def test_the_gradient_written_by_hand_agrees_with_finite_differences() -> None:
    def values(logits: Tensor) -> tuple[Tensor, ...]:
        return tuple(named(predict(logits, batch())).values())

    assert torch.autograd.gradcheck(values, (float64(POSITIONS, VOCABULARY, seed=3).requires_grad_(),))


@pytest.mark.parametrize("chunk", [1, 3, 10, 64])
@pytest.mark.parametrize("counts", [None, COUNTS])
def test_chunks_change_neither_sum_nor_gradient_and_no_more_logits_are_alive(
    chunk: int, counts: list[int] | None
) -> None:
    head, wanted = Head(), batch(counts)
    loss = chunked_sums(head.logits, head.states, wanted, everything, weights=(head.weight, head.bias), chunk=chunk)[
        "loss"
    ]
    assert head.largest == min(chunk, POSITIONS)
    expected = torch.stack([((value + 2) ** 2).sum() for value in dense(head, wanted).values()]).sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(head.gradients(loss / 7), head.gradients(expected / 7))


def test_the_logits_of_a_chunk_are_gone_before_those_of_the_next() -> None:
    head, wanted, alive = Head(), batch(), list[weakref.ref[Tensor]]()

    def logits(states: Tensor) -> Tensor:
        assert all(other() is None for other in alive)
        values = head.logits(states)
        alive.append(weakref.ref(values))
        return values

    chunked_sums(logits, head.states, wanted, everything, weights=(head.weight,), chunk=3)
    assert len(alive) == 4


def test_a_frozen_head_passes_the_gradient_on_to_the_states() -> None:
    head, wanted = Head(), batch()
    expected = torch.autograd.grad(everything(predict(head.logits(head.states), wanted), wanted)["loss"], head.states)
    head.weight.requires_grad_(False)
    head.bias.requires_grad_(False)
    loss = chunked_sums(head.logits, head.states, wanted, everything, weights=(head.weight, head.bias), chunk=4)["loss"]
    torch.testing.assert_close(torch.autograd.grad(loss, head.states), expected)


def test_without_gradients_a_measure_needs_no_loss() -> None:
    def entropy(predicted: Predictions, piece: Batch) -> Sums:
        return {"entropy": predicted.entropy.sum(), "of_rollouts": predicted.entropy.new_ones(3)}

    head, wanted = Head(), batch()
    with torch.inference_mode():
        sums = chunked_sums(head.logits, head.states, wanted, entropy, weights=(head.weight,), chunk=4)
    torch.testing.assert_close(sums["entropy"], dense(head, wanted)["entropy"].sum().detach())
    assert sums["of_rollouts"].tolist() == [3, 3, 3]


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd"])
def test_a_divergence_through_the_chunked_head_is_differentiable_where_nothing_is_left_for_the_tail(name: str) -> None:
    def loss(predicted: Predictions, piece: Batch) -> Sums:
        assert predicted.topk is not None
        topk = predicted.topk
        teacher = Categories(logprobs=topk.logprobs.detach() - 0.5, tail=topk.tail.detach(), positions=topk.positions)
        function = partial(losses.jsd, beta=0.5) if name == "jsd" else getattr(losses, name)
        return {"loss": function(topk, teacher).sum()}

    head = Head()
    wanted = batch([0, 1, 3, 2, VOCABULARY, 1, 0, 2, 4, 1])  # all of the vocabulary is stored at the fifth
    measure: Measure = loss
    value = chunked_sums(head.logits, head.states, wanted, measure, weights=(head.weight, head.bias), chunk=3)["loss"]
    assert all(bool(gradient.isfinite().all()) for gradient in head.gradients(value))


def test_a_tail_of_next_to_no_mass_keeps_its_digits() -> None:
    logits = torch.tensor([[60.0, 1.0, 0.0]])
    topk = stored(np.array([0]), np.array([0]))
    one = Batch(
        rows=(0,),
        input_ids=torch.zeros(1, 1, dtype=torch.int64),
        borders=torch.tensor([0, 1], dtype=torch.int32),
        sources=torch.zeros(1, dtype=torch.int64),
        targets=torch.zeros(1, dtype=torch.int64),
        rollouts=torch.zeros(1, dtype=torch.int64),
        sampled_logprobs=None,
        reference_logprobs=None,
        topk=topk,
    )
    predicted = predict(logits, one)
    assert predicted.topk is not None
    assert predicted.topk.tail.item() == pytest.approx(np.log(np.exp(1.0) + 1) - 60, rel=1e-6)
