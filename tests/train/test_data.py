from __future__ import annotations

import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import lopd_store
from lopd_store import reader
from lopd_store.errors import ArtifactError, DataError
from lopd_store.rollouts import RolloutsFile, write_rollouts
from lopd_train import TrainConfig
from lopd_train.batches import Record
from lopd_train.data import Cursor, Feed, Limits, Source, artifact_source, rollouts_source
from tests.artifacts import read_first_part, replace_part
from tests.train.records import ragged_topk, record, source_of

CONFIG = TrainConfig(shuffle_parts=2, eval_fraction=0, batch_rollouts=4)
LIMITS = Limits(vocab_size=1000, context_length=None)


def parts(count: int = 5, size: int = 6) -> list[list[Record]]:
    """Parts of rollouts that all have the prompt that is their row."""
    rows = [range(part * size, (part + 1) * size) for part in range(count)]
    return [[record([row], [1, 2], row=row) for row in some] for some in rows]


def rows_of(feed: Feed, cursor: Cursor, *, batch: int, count: int) -> list[list[int]]:
    return [[item.row for item in records] for records, _ in feed.steps(cursor, batch=batch, count=count)]


def feed(config: TrainConfig = CONFIG, source: Source | None = None, limits: Limits = LIMITS) -> Feed:
    return Feed(source or source_of(*parts()), limits, config=config)


def test_every_epoch_holds_every_rollout_once_in_another_order() -> None:
    order = [row for rows in rows_of(feed(), Cursor(), batch=4, count=15) for row in rows]
    assert sorted(order[:30]) == sorted(order[30:]) == list(range(30))
    assert order[:30] != order[30:] != sorted(order[30:])
    assert rows_of(feed(replace(CONFIG, seed=1)), Cursor(), batch=4, count=1)[0] != order[:4]


def test_a_window_of_parts_is_shuffled_together() -> None:
    first, *later = rows_of(feed(), Cursor(), batch=6, count=5)
    assert len({row // 6 for row in first}) == 1
    window = [row // 6 for rows in later[:2] for row in rows]
    assert len(set(window)) == 2
    assert window != sorted(window) != sorted(window, reverse=True)


def test_the_first_window_has_a_part_of_every_input_and_what_a_step_takes() -> None:
    source = replace(source_of(*parts(count=9)), inputs={number: int(number > 6) for number in range(9)})
    for seed in range(5):
        begun: list[int] = []

        def read(number: int, begun: list[int] = begun) -> list[Record]:
            begun.append(number)
            return source.read(number)

        counting = replace(source, read=read)
        feed(replace(CONFIG, seed=seed), counting)
        assert sorted(number > 6 for number in begun) == [False, True]
        begun.clear()
        feed(replace(CONFIG, seed=seed, batch_rollouts=13), counting)
        assert len(begun) == 3 and {number > 6 for number in begun} == {False, True}


def test_what_is_in_a_step_follows_from_the_cursor_alone() -> None:
    steps = list(feed().steps(Cursor(), batch=7, count=12))
    for number, (_, cursor) in enumerate(steps[:-1], 1):
        (following, after), *_ = feed().steps(cursor, batch=7, count=1)
        assert [item.row for item in following] == [item.row for item in steps[number][0]]
        assert after == steps[number][1]


def test_memory_holds_two_windows_and_the_first_step_needs_one() -> None:
    made, first_step = parts(count=7), threading.Event()
    begun: list[int] = []

    def read(number: int) -> list[Record]:
        if len(begun) >= 4:  # one for the held-out split, one for the first window, two for the next
            assert first_step.wait(10)
        begun.append(number)
        return made[number]

    source = Source(where="parts", sizes=dict.fromkeys(range(7), 6), inputs=dict.fromkeys(range(7), 0), read=read)
    steps = feed(source=source).steps(Cursor(), batch=6, count=7)
    next(steps)
    assert len(begun) <= 4
    first_step.set()
    next(steps)
    assert len(begun) <= 6
    list(steps)
    assert len(begun) == 8  # nothing is read that is not needed


def test_held_out_rollouts_do_not_keep_the_window_that_they_came_from(artifact: Path) -> None:
    made = feed(replace(CONFIG, eval_fraction=0.2), artifact_source(lopd_store.open(artifact)))
    assert made.held_out
    for item in made.held_out:
        assert item.topk is not None
        arrays = [value for part in (item, item.topk) for value in vars(part).values() if isinstance(value, np.ndarray)]
        assert len(arrays) > 6
        assert all(array.base is None for array in arrays)


def test_no_prompt_is_on_both_sides_of_the_held_out_split_in_whatever_window_it_is() -> None:
    made = [[record([prompt], [2], row=20 * part + prompt) for prompt in range(20)] for part in range(6)]
    split = feed(replace(CONFIG, eval_fraction=0.2), source_of(*made))
    trained = [item for items, _ in split.steps(Cursor(), batch=8, count=12) for item in items]
    held_out = {item.prompt for item in split.held_out}
    assert len(held_out) == 4
    assert len(split.held_out) == 4  # those of the first window
    expected = [item.row for part in made for item in part if item.prompt not in held_out]
    assert sorted(item.row for item in trained) == expected
    assert split.rollouts == 96


@pytest.mark.parametrize(("fraction", "count"), [(0.001, 1), (0.0, 0), (0.34, 1), (0.999, 2)])
def test_at_least_one_prompt_is_held_out_unless_none_is_wanted_and_one_is_left(fraction: float, count: int) -> None:
    three = source_of([record([prompt], [2], row=3 * i + prompt) for prompt in range(3) for i in range(2)])
    made = feed(replace(CONFIG, eval_fraction=fraction), three)
    assert len({item.prompt for item in made.held_out}) == count
    assert len(made.held_out) == 2 * count
    assert made.rollouts == 2 * (3 - count)


def test_a_single_prompt_is_trained_on() -> None:
    assert not feed(replace(CONFIG, eval_fraction=0.5), source_of([record([1], [2])])).held_out


def test_records_of_an_artifact_are_its_rollouts(artifact: Path) -> None:
    opened = lopd_store.open(artifact)
    assert len(opened.manifest.parts) > 1
    source = artifact_source(opened)
    records = [item for part in source.sizes for item in source.read(part)]
    assert [item.row for item in records] == list(range(len(opened)))
    for item in records:
        stored = opened.rollout(item.row)
        assert item.token_ids.tolist() == [*stored.prompt_ids, *stored.response_ids]
        assert item.sampled_logprobs is not None
        assert item.sampled_logprobs.tolist() == stored.sampled_logprobs.tolist()
        assert item.reference_logprobs is not None
        assert item.reference_logprobs.tolist() == stored.reference_logprobs.tolist()  # type: ignore[union-attr]
        assert item.topk is not None
        assert item.topk.ids.tolist() == stored.topk.ids.tolist()  # type: ignore[union-attr]
        assert item.positions == len(stored.response_ids)


def test_tokens_that_the_policy_did_not_sample_are_out_of_the_loss_from_the_rollouts_on(
    teacher_dir: Path, tmp_path: Path
) -> None:
    masks = [[True, False, False, True], [False, True], [True, True, False]]
    rows = [{"prompt_ids": [9, 7], "response_ids": [8] * len(mask), "loss_mask": mask} for mask in masks]
    write_rollouts(tmp_path / "rollouts.parquet", rows, None)
    artifact = lopd_store.build(
        teacher=teacher_dir, rollouts=tmp_path / "rollouts.parquet", output=tmp_path / "artifact", workers=1
    )
    for source in (artifact_source(artifact), rollouts_source(RolloutsFile(tmp_path / "rollouts.parquet"))):
        records = source.read(0)
        assert [item.loss_mask.tolist() for item in records] == masks
        assert [(item.prompt_length, len(item.token_ids), item.positions) for item in records] == [
            (2, 2 + len(mask), sum(mask)) for mask in masks
        ]


def test_values_that_nobody_has_verified_are_checked_before_they_are_trained_on(artifact: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(artifact, tmp_path / "copy")
    replace_part(copy, sampled_logprobs=read_first_part(copy).sampled_logprobs - 1)  # honest digests
    source = artifact_source(lopd_store.open(copy))
    assert source.read(1)
    for _ in range(2):  # what was refused has not been checked
        with pytest.raises(ArtifactError, match="sampled log-prob and the entry"):
            source.read(0)


def test_values_are_checked_once_in_a_run(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[int] = []

    def check(number: int, *_: object) -> tuple[()]:
        checked.append(number)
        return ()

    monkeypatch.setattr(reader, "check_contents", check)
    source = artifact_source(lopd_store.open(artifact))
    for number in (1, 0, 1, 0):
        source.read(number)
    assert checked == [1, 0]


def test_a_copy_of_some_parts_is_trained_on_with_the_rows_of_the_whole(artifact: Path, tmp_path: Path) -> None:
    source = artifact_source(lopd_store.subset(artifact, output=tmp_path / "copy", parts=range(1, 3)))
    assert sorted(source.sizes) == [1, 2]
    assert source.read(1)[0].row == lopd_store.open(artifact).manifest.parts[0].counts.rollouts


def test_topk_that_training_does_not_need_stays_with_the_held_out_rollouts(artifact: Path) -> None:
    made = Feed(artifact_source(lopd_store.open(artifact)), LIMITS, config=TrainConfig(objective="sampled"))
    (records, _), *_ = made.steps(Cursor(), batch=4, count=1)
    assert all(item.topk is None for item in records)
    assert all(item.topk is not None for item in made.held_out)


def test_sft_data_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt_ids": [1, row], "response_ids": [3] * (row % 3 + 1)} for row in range(10)]
    write_rollouts(tmp_path / "sft.parquet", rows, None)
    monkeypatch.setattr("lopd_train.data.ROWS_PER_GROUP", 4)
    source = rollouts_source(RolloutsFile(tmp_path / "sft.parquet"))
    assert source.sizes == {0: 4, 1: 4, 2: 2}
    records = [item for part in source.sizes for item in source.read(part)]
    assert [(item.row, item.token_ids.tolist()) for item in records] == [
        (row, [1, row] + [3] * (row % 3 + 1)) for row in range(10)
    ]


def test_rollouts_without_a_position_that_counts_are_left_out_and_none_at_all_is_an_error() -> None:
    nothing, something = record([1], [2], mask=[False]), record([1], [2, 3], row=1, mask=[True, False])
    made = feed(source=source_of([nothing, something]))
    assert made.rollouts == 1
    assert rows_of(made, Cursor(), batch=1, count=2) == [[1], [1]]
    with pytest.raises(DataError, match=r"`records` has nothing to train on"):
        feed(source=source_of([nothing, nothing]))


def test_a_rollout_that_the_student_cannot_read_whole_is_refused_by_its_row() -> None:
    source = source_of([record([1], [2, 3], row=6), record([1], [2, 3, 4], row=7)])
    feed(source=source, limits=Limits(vocab_size=5, context_length=4))
    with pytest.raises(
        DataError,
        match=r"rollout 7 is longer than the student's context\n  expected  at most 3 tokens.*\n.*\n\n.*--drop",
    ):
        feed(source=source, limits=Limits(vocab_size=5, context_length=3))
    with pytest.raises(DataError, match=r"rollout 7 has a token id that the student does not know\n.*below 4\n.*4"):
        feed(source=source, limits=Limits(vocab_size=4, context_length=8))
    with pytest.raises(DataError, match=r"rollout 8 has no prompt"):
        feed(source=source_of([record([], [2], row=8)]))


def test_a_stored_id_beyond_the_students_vocabulary_is_refused_too() -> None:
    item = record([1], [2], row=3, topk=ragged_topk([[(2, -0.1), (7, -3.0)]], tails=[-9]))
    with pytest.raises(DataError, match=r"rollout 3 has a token id .*\n.*below 7\n.*7"):
        feed(source=source_of([item]), limits=Limits(vocab_size=7, context_length=None))


def test_rollouts_that_are_too_long_are_dropped_when_asked_and_counted_once() -> None:
    made = [
        [record([row], [1] * (9 if row % 5 == 0 else 3), row=row) for row in range(6 * i, 6 * i + 6)] for i in range(5)
    ]
    config, limits = replace(CONFIG, drop_long=True), Limits(vocab_size=1000, context_length=4)
    dropping = feed(config, source_of(*made), limits)
    steps = list(dropping.steps(Cursor(), batch=4, count=12))
    assert sorted(item.row for items, _ in steps[:6] for item in items) == [row for row in range(30) if row % 5]
    assert [cursor.dropped for _, cursor in steps][5:] == [6] * 7
    (_, resumed), *_ = feed(config, source_of(*made), limits).steps(steps[2][1], batch=4, count=1)
    assert resumed == steps[3][1]


def test_a_rollout_that_is_too_long_stops_the_run_when_its_window_comes() -> None:
    made = parts()
    late = feed(source=source_of(*made)).steps(Cursor(), batch=6, count=4)
    (row, *_) = [item.row for item in list(late)[-1][0]]
    made[row // 6][row % 6] = record([row], [1] * 9, row=row)
    steps = feed(source=source_of(*made), limits=Limits(vocab_size=1000, context_length=4)).steps(
        Cursor(), batch=6, count=5
    )
    assert [len(items) for items, _ in [next(steps), next(steps)]] == [6, 6]
    with pytest.raises(DataError, match=f"rollout {row} is longer"):
        list(steps)
