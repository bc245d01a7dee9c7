from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import lopd_store
from lopd_store.errors import DataError
from lopd_store.rollouts import RolloutsFile, write_rollouts
from lopd_train.batches import (
    check_records,
    collate,
    hold_out,
    micro_batches,
    read_artifact,
    read_rollouts,
    rollouts_of_step,
)
from tests.train.records import ragged_topk, record


def test_targets_are_the_response_and_sources_the_tokens_before_them() -> None:
    batch = collate([record([10, 11], [12, 13, 14]), record([20], [21, 22])], "cpu")
    assert batch.input_ids.tolist() == [[10, 11, 12, 13, 14], [20, 21, 22, 0, 0]]
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
    assert batch.topk.positions.tolist() == [0, 1, 2, 2]
    assert batch.topk.offsets.tolist() == [0, 1, 2, 4]
    assert batch.topk.tail_logprobs.tolist() == [-1, -3, -4]


def test_micro_batches_hold_every_rollout_once_and_stay_within_the_limit() -> None:
    lengths = [3, 9, 4, 30, 5, 8, 3]
    records = [record([1], [2] * (length - 1), row=row) for row, length in enumerate(lengths)]
    batches = list(micro_batches(records, max_tokens=20, device="cpu"))
    assert sorted(row for batch in batches for row in batch.rows) == list(range(len(lengths)))
    assert [batch.rows for batch in batches if batch.input_ids.numel() > 20] == [(3,)]  # too long for any company
    assert [batch.input_ids.shape[1] for batch in batches] == [30, 9, 5]


def test_every_epoch_is_a_permutation_and_a_step_needs_no_step_before_it() -> None:
    steps = [rollouts_of_step(step, 10, batch=4, seed=1) for step in range(1, 6)]
    order = [row for rows in steps for row in rows]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]
    assert rollouts_of_step(3, 10, batch=4, seed=1) == steps[2]
    assert rollouts_of_step(1, 10, batch=4, seed=2) != steps[0]


def test_no_prompt_is_on_both_sides_of_the_held_out_split() -> None:
    records = [record([prompt, 1], [2], row=4 * prompt + i) for prompt in range(50) for i in range(4)]
    training, held_out = hold_out(records, fraction=0.1, seed=0)
    assert len({item.prompt for item in held_out}) == 5
    assert not {item.prompt for item in training} & {item.prompt for item in held_out}
    assert sorted(item.row for item in training + held_out) == list(range(200))
    assert [item.row for item in hold_out(records, fraction=0.1, seed=0)[1]] == [item.row for item in held_out]
    assert [item.row for item in hold_out(records, fraction=0.1, seed=1)[1]] != [item.row for item in held_out]


def test_a_small_fraction_holds_out_one_prompt_and_zero_none_and_the_last_prompt_stays() -> None:
    records = [record([prompt], [2]) for prompt in range(3)]
    assert len(hold_out(records, fraction=0.001, seed=0)[1]) == 1
    assert len(hold_out(records, fraction=0.0, seed=0)[1]) == 0
    assert len(hold_out(records, fraction=0.999, seed=0)[0]) == 1
    assert len(hold_out(records[:1], fraction=0.5, seed=0)[0]) == 1


def test_records_of_an_artifact_are_its_rollouts(artifact: Path) -> None:
    opened = lopd_store.open(artifact)
    assert len(opened.manifest.parts) > 1
    records = read_artifact(opened)
    assert [item.row for item in records] == list(range(len(opened)))
    for item in records:
        stored = opened.rollout(item.row)
        assert item.token_ids.tolist() == [*stored.prompt_ids, *stored.response_ids]
        assert item.sampled_logprobs is not None
        assert item.sampled_logprobs.tolist() == stored.sampled_logprobs.tolist()
        assert item.topk is not None
        assert item.topk.ids.tolist() == stored.topk.ids.tolist()  # type: ignore[union-attr]
        assert item.positions == len(stored.response_ids)


def test_rollouts_without_a_position_that_counts_are_left_out_and_none_at_all_is_an_error(tmp_path: Path) -> None:
    def row(mask: list[bool]) -> dict[str, object]:
        return {"prompt_ids": [1, 2], "response_ids": [3] * len(mask), "loss_mask": mask}

    write_rollouts(tmp_path / "some.parquet", [row([False, False]), row([True, False]), row([])], None)
    records = read_rollouts(RolloutsFile(tmp_path / "some.parquet"))
    assert [(item.row, item.positions) for item in records] == [(1, 1)]
    write_rollouts(tmp_path / "none.parquet", [row([False]), row([])], None)
    with pytest.raises(DataError, match=r"none.parquet` has nothing to train on"):
        read_rollouts(RolloutsFile(tmp_path / "none.parquet"))


def test_a_rollout_that_the_student_cannot_read_whole_is_refused_by_its_row() -> None:
    records = [record([1], [2, 3], row=6), record([1], [2, 3, 4], row=7)]
    check_records(records, vocab_size=5, context_length=None)
    with pytest.raises(
        DataError, match=r"rollout 7 is longer than the student's context\n  expected  at most 3 tokens"
    ):
        check_records(records, vocab_size=5, context_length=3)
    with pytest.raises(DataError, match=r"rollout 7 has a token id that the student does not know\n.*below 4\n.*4"):
        check_records(records, vocab_size=4, context_length=8)
    with pytest.raises(DataError, match=r"rollout 8 has no prompt"):
        check_records([record([], [2], row=8)], vocab_size=5, context_length=8)


def test_length_and_mask_are_separate_things() -> None:
    item = record([1, 2], [3, 4, 5], mask=[False, True, False])
    assert (item.positions, len(item.loss_mask), len(item.token_ids)) == (1, 3, 5)
    assert np.array_equal(collate([item], "cpu").targets.numpy(), [4])
