from __future__ import annotations

import numpy as np
import pytest

from lopd_train.batches import Record, collate, micro_batches
from tests.train.records import ragged_topk, record


def test_targets_are_the_response_and_sources_the_tokens_before_them() -> None:
    batch = collate([record([10, 11], [12, 13, 14]), record([20], [21, 22])], "cpu")
    assert batch.input_ids.tolist() == [[10, 11, 12, 13, 14, 20, 21, 22]]
    assert batch.borders.tolist() == [0, 5, 8]
    assert batch.targets.tolist() == [12, 13, 14, 21, 22]
    assert batch.input_ids.flatten()[batch.sources].tolist() == [11, 12, 13, 20, 21]


def test_a_masked_position_takes_its_teacher_values_out_with_it() -> None:
    topk = ragged_topk([[(1, -0.1)], [(2, -0.2), (3, -0.3)], [(4, -0.4)]], tails=[-1, -2, -3])
    masked = record([10], [12, 13, 14], mask=[True, False, True], sampled_logprobs=[-0.5, -7, -0.6], topk=topk)
    plain = record([20], [21], sampled_logprobs=[-0.7], topk=ragged_topk([[(5, -0.5), (6, -0.6)]], tails=[-4]))
    batch = collate([masked, plain], "cpu")
    assert batch.targets.tolist() == [12, 14, 21]
    assert batch.sampled_logprobs is not None
    assert batch.sampled_logprobs.tolist() == pytest.approx([-0.5, -0.6, -0.7])
    assert batch.topk is not None
    assert batch.topk.ids.tolist() == [1, 4, 5, 6]
    assert batch.topk.teacher.positions.tolist() == [0, 1, 2, 2]
    assert batch.topk.offsets.tolist() == [0, 1, 2, 4]
    odds = (batch.topk.teacher.tail[:2] - batch.topk.teacher.logprobs[:2]).tolist()  # normalising leaves them
    assert odds == pytest.approx([-1 + 0.1, -3 + 0.4])


def test_micro_batches_hold_every_rollout_once_and_stay_within_the_limit() -> None:
    lengths = [3, 9, 4, 30, 5, 8, 3]
    records = [record([1], [2] * (length - 1), row=row) for row, length in enumerate(lengths)]
    cut = micro_batches(records, max_tokens=20)
    assert sorted(item.row for some in cut for item in some) == list(range(len(lengths)))
    assert [[item.row for item in some] for some in cut if _tokens(some) > 20] == [[3]]  # too long for any company
    assert sorted(_tokens(some) for some in cut) == [9, 11, 12, 30]


def test_micro_batches_are_of_about_equal_length() -> None:
    rng = np.random.default_rng(0)
    records = [record([1], [2] * int(length)) for length in rng.integers(10, 400, 200)]
    cut = micro_batches(records, max_tokens=4096)
    assert len(cut) == -(-_tokens(records) // 4096)
    assert max(map(_tokens, cut)) < 1.02 * min(map(_tokens, cut))


def _tokens(records: list[Record]) -> int:
    return sum(len(item.token_ids) for item in records)


def test_length_and_mask_are_separate_things() -> None:
    item = record([1, 2], [3, 4, 5], mask=[False, True, False])
    assert (item.positions, len(item.loss_mask), len(item.token_ids)) == (1, 3, 5)
    assert np.array_equal(collate([item], "cpu").targets.numpy(), [4])
