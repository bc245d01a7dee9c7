from __future__ import annotations

from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

import lopd_store
from lopd_store.errors import InputError
from lopd_store.grid import Grid
from lopd_store.models import SplitModel
from lopd_store.topk import concatenate
from lopd_train import TrainConfig, student
from lopd_train.batches import Batch, collate
from lopd_train.head import Predictions, Sums
from lopd_train.student import Student
from lopd_train.world import ALONE
from tests.train.records import record, records_of


def measured(student: Student, batch: Batch) -> Predictions:
    """All predictions of a batch, chunk after chunk."""
    pieces: list[Predictions] = []

    def keep(predicted: Predictions, _: Batch) -> Sums:
        pieces.append(predicted)
        return {}

    with torch.no_grad():
        student.sums(student.states(batch), batch, keep)
    (whole,) = pieces
    return whole


def rigged() -> Student:
    """A student that is sure that each token is followed by its successor, and looks at nothing else."""

    def body(*, input_ids: Tensor, **_: Any) -> Any:
        return SimpleNamespace(last_hidden_state=torch.nn.functional.one_hot(input_ids, 50).float())

    def logits(states: Tensor) -> Tensor:
        return 40 * states.roll(1, dims=-1)

    split = SplitModel(body=body, logits=logits, output_width=50)
    return Student(
        model=SimpleNamespace(get_output_embeddings=torch.nn.Identity),
        tokenizer=None,
        split=split,
        config=TrainConfig(),
        device="cpu",
        world=ALONE,
        gathered=lambda function, *arguments: function(*arguments),
    )


def test_a_student_that_knows_the_next_token_is_right_at_every_position() -> None:
    batch = collate([record([3, 4], [5, 6, 7]), record([30], [31, 32]), record([8, 9, 10], [11])], "cpu")
    assert measured(rigged(), batch).sampled.tolist() == pytest.approx([0.0] * 6, abs=1e-6)


def test_a_surprise_is_charged_to_its_own_position_and_to_the_one_after_it() -> None:
    batch = collate([record([3, 4], [5, 20, 7, 8])], "cpu")
    assert measured(rigged(), batch).sampled.tolist() == pytest.approx([0.0, -40.0, -40.0, 0.0], abs=1e-6)


def test_logprobs_of_a_packed_batch_are_those_of_the_model_one_by_one(artifact: Path, reference: Path) -> None:
    loaded = student.load(reference, TrainConfig(device="cpu"))
    records = records_of(artifact)[::3]
    model = AutoModelForCausalLM.from_pretrained(reference)
    expected = []
    for item in records:
        ids = torch.from_numpy(item.token_ids.astype(np.int64))
        with torch.no_grad():
            logprobs = torch.log_softmax(model(input_ids=ids[None]).logits[0].double(), dim=-1)
        expected += [logprobs[j - 1, ids[j]].item() for j in range(item.prompt_length, len(ids))]
    batch = collate(records, "cpu")
    assert len({len(item.token_ids) for item in records}) > 1
    assert measured(loaded, batch).sampled.tolist() == pytest.approx(expected, abs=1e-4)


def test_the_teacher_as_student_gives_the_stored_logprobs(artifact: Path, teacher_dir: Path) -> None:
    loaded = student.load(teacher_dir, TrainConfig(device="cpu"))
    records = records_of(artifact)
    batch, stored = collate(records, "cpu"), concatenate([item.topk for item in records if item.topk is not None])
    assert batch.sampled_logprobs is not None
    predicted = measured(loaded, batch)
    assert predicted.topk is not None
    encoding = lopd_store.open(artifact).manifest.encoding
    assert_within_rounding(predicted.sampled, batch.sampled_logprobs, encoding.sampled_grid, noise=1e-4)
    assert_within_rounding(predicted.topk.logprobs, torch.from_numpy(stored.logprobs), encoding.topk_grid, noise=1e-4)
    assert_within_rounding(predicted.topk.tail, torch.from_numpy(stored.tail_logprobs), encoding.topk_grid, noise=1e-3)


def assert_within_rounding(found: Tensor, stored: Tensor, grid: Grid | None, *, noise: float) -> None:
    """Each difference is at most the greatest error of the level that was stored."""
    assert grid is not None
    errors = torch.from_numpy(grid.half_steps[grid.to_codes(stored.numpy())])
    assert bool(((found - stored).abs() <= errors + noise).all())


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_weights(artifact: Path, reference: Path) -> None:
    precise, rough = (student.load(reference, TrainConfig(device="cpu", dtype=d)) for d in ("float32", "bfloat16"))
    batch = collate(records_of(artifact)[:4], "cpu")
    expected, actual = measured(precise, batch).sampled, measured(rough, batch).sampled
    assert actual.dtype == torch.float32
    assert {parameter.dtype for parameter in rough.model.parameters()} == {torch.float32}
    assert not torch.equal(actual, expected)
    assert float((actual - expected).abs().mean()) < 0.1 * float(expected.abs().mean())


def test_the_body_keeps_no_copy_of_its_weights_in_bfloat16(artifact: Path, reference: Path) -> None:
    made, caches = student.load(reference, TrainConfig(device="cpu", dtype="bfloat16")), list[bool]()
    for module in (made.model.base_model.norm, made.model.get_output_embeddings()):
        module.register_forward_pre_hook(lambda *_: caches.append(torch.is_autocast_cache_enabled()))
    measured(made, collate(records_of(artifact)[:1], "cpu"))
    assert caches == [False, True]  # the head is read for every chunk


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at the gradient of everything
@pytest.mark.parametrize("recomputes", [False, True])
def test_blocks_are_compiled_once_for_any_number_of_rollouts(
    recomputes: bool, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    made = student.load(reference, TrainConfig(device="cpu", compile=True, gradient_checkpointing=recomputes))
    made.model.train()
    graphs = []
    for lengths in ([6, 8], [9, 4, 5], [3, 4, 9, 7], [8]):
        batch = collate([record([1], [2] * length) for length in lengths], "cpu")
        made.states(batch).sum().backward()  # type: ignore[no-untyped-call]
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] < graphs[1]  # the second length is taken for any length
    assert graphs[1:] == [graphs[1]] * 3


def test_a_device_that_is_not_there_is_refused(reference: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(InputError, match="the device `cuda:1` cannot be used"):
        student.load(reference, TrainConfig(device="cuda:1"))
