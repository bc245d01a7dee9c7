from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import lopd_store
from lopd_store.errors import InputError
from lopd_store.grid import Grid
from lopd_store.models import SplitModel
from lopd_train import TrainConfig, losses, student
from lopd_train.batches import BatchTopK, collate, read_artifact
from lopd_train.student import Student, chunked_token_logprobs, chunked_topk_logprobs
from tests.train.records import record

POSITIONS, WIDTH, VOCABULARY = 10, 4, 9
COUNTS = [0, 1, 3, 2, 9, 1, 0, 2, 4, 1]


class Head:
    """A float64 head that remembers how many positions it was given at once."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
        self.states = torch.randn(POSITIONS, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
        self.largest = 0
        self.split = SplitModel(body=lambda: None, logits=self.logits, output_width=VOCABULARY)

    def logits(self, states: Tensor) -> Tensor:
        self.largest = max(self.largest, len(states))
        return states @ self.weight.T

    def dense(self) -> Tensor:
        return torch.log_softmax(self.states @ self.weight.T, dim=-1)

    def gradients(self, value: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(value, (self.states, self.weight))


def stored() -> BatchTopK:
    rng = np.random.default_rng(0)
    ids = np.concatenate([rng.permutation(VOCABULARY)[:count] for count in COUNTS])
    return BatchTopK(
        offsets=np.concatenate([[0], np.cumsum(COUNTS)]),
        positions=torch.from_numpy(np.repeat(np.arange(POSITIONS), COUNTS)),
        ids=torch.from_numpy(ids),
        logprobs=torch.zeros(len(ids)),
        tail_logprobs=torch.zeros(POSITIONS),
    )


@pytest.mark.parametrize("chunk", [1, 3, 10, 64])
def test_the_chunked_head_gives_the_values_and_gradients_of_full_logits(chunk: int) -> None:
    head, targets = Head(), torch.tensor([0, 8, 3, 3, 1, 7, 2, 5, 5, 4])
    weights = torch.linspace(-1, 2, POSITIONS, dtype=torch.float64)
    expected = head.dense().gather(1, targets[:, None])[:, 0]
    actual = chunked_token_logprobs(head.split, head.states, targets, chunk=chunk)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(head.gradients((actual * weights).sum()), head.gradients((expected * weights).sum()))
    assert head.largest == min(chunk, POSITIONS)


@pytest.mark.parametrize("chunk", [1, 3, 10])
def test_the_chunked_head_gives_logprobs_and_tail_of_ragged_ids(chunk: int) -> None:
    head, topk = Head(), stored()
    at_ids, tails = chunked_topk_logprobs(head.split, head.states, topk, chunk=chunk)
    dense = head.dense()
    torch.testing.assert_close(at_ids, dense[topk.positions, topk.ids])
    outside = torch.ones(POSITIONS, VOCABULARY, dtype=torch.bool)
    outside[topk.positions, topk.ids] = False
    torch.testing.assert_close(tails, torch.where(outside, dense.exp(), 0).sum(dim=-1).log())
    assert tails[4] == -torch.inf  # all of the vocabulary is stored there
    assert head.largest == min(chunk, POSITIONS)


def test_reverse_kl_through_the_chunked_head_is_differentiable() -> None:
    head, topk = Head(), stored()
    keep = topk.positions != 4  # a tail without mass has no gradient
    at_ids, tails = chunked_topk_logprobs(head.split, head.states, topk, chunk=3)
    values = losses.reverse_kl_topk(
        at_ids[keep], tails, at_ids[keep].detach() - 0.5, tails.detach(), topk.positions[keep]
    )
    assert all(
        bool(gradient.isfinite().all()) for gradient in head.gradients(values[[0, 1, 2, 3, 5, 6, 7, 8, 9]].sum())
    )


def test_a_tail_of_next_to_no_mass_keeps_its_digits() -> None:
    states = torch.tensor([[60.0, 1.0]])
    split = SplitModel(body=lambda: None, logits=lambda h: h @ torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]), output_width=3)
    topk = BatchTopK(
        offsets=np.array([0, 1]),
        positions=torch.tensor([0]),
        ids=torch.tensor([0]),
        logprobs=torch.zeros(1),
        tail_logprobs=torch.zeros(1),
    )
    _, tail = chunked_topk_logprobs(split, states, topk)
    assert tail.item() == pytest.approx(np.log(np.exp(1.0) + 1) - 60, rel=1e-6)


def rigged() -> Student:
    """A student that is sure that each token is followed by its successor, and looks at nothing else."""

    def body(*, input_ids: Tensor, use_cache: bool) -> Any:
        assert not use_cache
        return SimpleNamespace(last_hidden_state=torch.nn.functional.one_hot(input_ids, 50).float())

    def logits(states: Tensor) -> Tensor:
        return 40 * states.roll(1, dims=-1)

    split = SplitModel(body=body, logits=logits, output_width=50)
    return Student(model=None, tokenizer=None, split=split, device="cpu", dtype=torch.float32)


def test_a_student_that_knows_the_next_token_is_right_at_every_position() -> None:
    batch = collate([record([3, 4], [5, 6, 7]), record([30], [31, 32]), record([8, 9, 10], [11])], "cpu")
    assert rigged().token_logprobs(batch).tolist() == pytest.approx([0.0] * 6, abs=1e-6)


def test_a_surprise_is_charged_to_its_own_position_and_to_the_one_after_it() -> None:
    batch = collate([record([3, 4], [5, 20, 7, 8])], "cpu")
    assert rigged().token_logprobs(batch).tolist() == pytest.approx([0.0, -40.0, -40.0, 0.0], abs=1e-6)


def test_logprobs_of_a_padded_batch_are_those_of_the_model_one_by_one(artifact: Path, reference: Path) -> None:
    loaded = student.load(reference, TrainConfig(device="cpu"))
    records = read_artifact(lopd_store.open(artifact))[::3]
    model = AutoModelForCausalLM.from_pretrained(reference)
    expected = []
    for item in records:
        ids = torch.from_numpy(item.token_ids.astype(np.int64))
        with torch.no_grad():
            logprobs = torch.log_softmax(model(input_ids=ids[None]).logits[0].double(), dim=-1)
        expected += [logprobs[j - 1, ids[j]].item() for j in range(item.prompt_length, len(ids))]
    batch = collate(records, "cpu")
    assert len({len(item.token_ids) for item in records}) > 1
    assert loaded.token_logprobs(batch).tolist() == pytest.approx(expected, abs=1e-4)


def test_the_teacher_as_student_gives_the_stored_logprobs(artifact: Path, teacher_dir: Path) -> None:
    loaded = student.load(teacher_dir, TrainConfig(device="cpu"))
    batch = collate(read_artifact(lopd_store.open(artifact)), "cpu")
    assert batch.sampled_logprobs is not None
    assert batch.topk is not None
    with torch.inference_mode():
        sampled, (at_ids, tails) = loaded.token_logprobs(batch), loaded.topk_logprobs(batch)
    encoding = lopd_store.open(artifact).manifest.encoding
    assert_within_rounding(sampled, batch.sampled_logprobs, encoding.sampled_grid, noise=1e-4)
    assert_within_rounding(at_ids, batch.topk.logprobs, encoding.topk_grid, noise=1e-4)
    assert_within_rounding(tails, batch.topk.tail_logprobs, encoding.topk_grid, noise=1e-3)


def assert_within_rounding(found: Tensor, stored: Tensor, grid: Grid | None, *, noise: float) -> None:
    """Each difference is at most the greatest error of the level that was stored."""
    assert grid is not None
    errors = torch.from_numpy(grid.half_steps[grid.to_codes(stored.numpy())])
    assert bool(((found - stored).abs() <= errors + noise).all())


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_weights(artifact: Path, reference: Path) -> None:
    precise, rough = (student.load(reference, TrainConfig(device="cpu", dtype=d)) for d in ("float32", "bfloat16"))
    batch = collate(read_artifact(lopd_store.open(artifact))[:4], "cpu")
    with torch.inference_mode():
        expected, actual = precise.token_logprobs(batch), rough.token_logprobs(batch)
    assert actual.dtype == torch.float32
    assert {parameter.dtype for parameter in rough.model.parameters()} == {torch.float32}
    assert not torch.equal(actual, expected)
    assert float((actual - expected).abs().mean()) < 0.1 * float(expected.abs().mean())


def test_a_device_that_is_not_there_is_refused(reference: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(InputError, match="there is no device `cuda:1` here"):
        student.load(reference, TrainConfig(device="cuda:1"))
