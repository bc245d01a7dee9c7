"""Rollouts files: read back as written, by rows, and every way in which one is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lopd_store.digest import digest_contents
from lopd_store.errors import ArtifactError, DataError, InputError
from lopd_store.rollouts import METADATA_KEY, ROWS_PER_GROUP, Rollout, RolloutsFile, write_rollouts
from tests.artifacts import identity_named, random_pairs, save_rollouts
from tests.records import ROLLOUTS

GOOD: dict[str, Any] = {"prompt_ids": [[1, 2], [3]], "response_ids": [[4], [5, 6]]}


def save_table(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(GOOD | columns), path / "r.parquet")
    return path / "r.parquet"


def read_table(path: Path, **columns: Any) -> list[Rollout]:
    return RolloutsFile(save_table(path, **columns)).read()


def test_rows_come_back_as_written(tmp_path: Path) -> None:
    row = {
        "prompt": "p",
        "response": "r",
        "prompt_ids": np.array([1, 2], np.uint32),
        "response_ids": [3, 4],
        "loss_mask": [True, False],
        "logprobs": [-0.5, 0.0],
        "finish_reason": "stop",
    }
    write_rollouts(tmp_path / "r.parquet", [row], ROLLOUTS)
    file = RolloutsFile(tmp_path / "r.parquet")
    (read,) = file.read()
    assert file.record == ROLLOUTS and file.has_logprobs()
    assert {name: getattr(read, name) for name in ("prompt", "response", "finish_reason")} == {
        "prompt": "p",
        "response": "r",
        "finish_reason": "stop",
    }
    assert read.token_ids.tolist() == [1, 2, 3, 4] and read.loss_mask.tolist() == [True, False]
    assert read.logprobs is not None and read.logprobs.tolist() == [-0.5, 0.0]


def test_any_range_of_rows_over_several_row_groups_is_read(tmp_path: Path) -> None:
    pairs = random_pairs([(1 + n % 3, n % 4) for n in range(2 * ROWS_PER_GROUP + 5)])
    file = RolloutsFile(save_rollouts(tmp_path / "r.parquet", pairs))
    for start, stop in ((0, 1), (ROWS_PER_GROUP - 1, ROWS_PER_GROUP + 1), (5, 2 * ROWS_PER_GROUP + 2), (2052, None)):
        rows = [(r.prompt_ids.tolist(), r.response_ids.tolist()) for r in file.read(start, stop)]
        assert rows == [(list(prompt), list(response)) for prompt, response in pairs[start:stop]]
    assert len(file) == len(pairs) and file.read(7, 7) == []
    assert file.response_lengths.tolist() == [len(response) for _, response in pairs]


def test_lists_are_written_with_offsets_of_64_bits(tmp_path: Path) -> None:
    schema = pq.read_schema(save_rollouts(tmp_path / "r.parquet", random_pairs([(2, 3)]), logprob=-1.0))
    lists = ("prompt_ids", "response_ids", "loss_mask", "logprobs")
    assert all(pa.types.is_large_list(schema.field(name).type) for name in lists)


def test_lengths_are_read_a_thousand_rows_at_a_time_however_large_a_row_group_is(tmp_path: Path) -> None:
    rows, length = 20 * ROWS_PER_GROUP, 200
    offsets = np.arange(0, rows * length + 1, length, dtype=np.int32)
    ids = pa.ListArray.from_arrays(offsets, np.zeros(rows * length, np.int32))
    path = save_table(tmp_path, prompt_ids=ids, response_ids=ids)
    before, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(pool)
    try:
        lengths = RolloutsFile(path).response_lengths
    finally:
        pa.set_memory_pool(before)
    assert lengths.tolist() == [length] * rows
    assert 0 < pool.max_memory() < ids.nbytes / 2


def test_only_the_ids_are_needed(tmp_path: Path) -> None:
    first, second = read_table(tmp_path)
    assert first.loss_mask.tolist() == [True] and second.loss_mask.tolist() == [True, True]
    assert (first.logprobs, first.prompt, first.response, first.finish_reason) == (None, None, None, None)


@pytest.mark.parametrize("kind", [pa.int8(), pa.int32(), pa.int64(), pa.uint16(), pa.uint64()])
@pytest.mark.parametrize("make_list", [pa.list_, pa.large_list])
def test_ids_of_any_integer_type_are_read(tmp_path: Path, kind: pa.DataType, make_list: Any) -> None:
    ids = pa.array([[1, 2], [3]], make_list(kind))
    rows = read_table(tmp_path, prompt_ids=ids)
    assert [row.prompt_ids.tolist() for row in rows] == [[1, 2], [3]] and rows[0].prompt_ids.dtype == np.uint32


def test_other_columns_are_not_read(tmp_path: Path) -> None:
    assert len(read_table(tmp_path, reward=[0.5, 1.0], prompt_text=["a", "b"])) == 2


@pytest.mark.parametrize(
    ("logprobs", "has"),
    [([[-1.0], [-1.0, -2.0]], True), ([[-1.0], None], False), ([None, None], False), ([[-1.0], [-1.0]], False)],
)
def test_a_file_has_logprobs_where_every_response_token_has_one(tmp_path: Path, logprobs: Any, has: bool) -> None:
    column = pa.array(logprobs, pa.list_(pa.float32()))
    assert RolloutsFile(save_table(tmp_path, logprobs=column)).has_logprobs() is has


def test_an_impossible_sampled_token_is_legal(tmp_path: Path) -> None:
    rows = read_table(tmp_path, logprobs=[[-np.inf], [0.0, -1.0]])
    assert rows[0].logprobs is not None and rows[0].logprobs.tolist() == [-np.inf]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (
            {"loss_mask": [[True], [True]]},
            "row 1: `loss_mask` does not fit the response\n  expected  2 values.*\n  actual    1",
        ),
        ({"logprobs": [[-1.0, -1.0], [-1.0, -2.0]]}, "row 0: `logprobs` does not fit the response"),
        ({"logprobs": [[-1.0], [-1.0, 0.5]]}, "row 1: a log-prob is not a number <= 0\n  actual    0.5"),
        ({"logprobs": [[np.nan], [-1.0, -1.0]]}, "row 0: a log-prob is not a number <= 0\n  actual    nan"),
        ({"logprobs": [[-1.0], [-1.0, None]]}, "row 1: a log-prob is not a number <= 0"),
        ({"loss_mask": [[True], [True, None]]}, "row 1: a flag of `loss_mask` is null"),
        ({"prompt_ids": [[1, 2], [-1]]}, "row 1, `prompt_ids` are not token ids\n  actual    from -1 to -1"),
        ({"prompt_ids": [[1], [1 << 31]]}, "row 1, `prompt_ids` are not token ids"),
        ({"response_ids": [[4], None]}, "row 1, `response_ids` are not token ids\n  actual    null"),
        ({"response_ids": [[4], [5, None]]}, "row 1, `response_ids` are not token ids"),
    ],
)
def test_a_row_that_is_wrong_is_named(tmp_path: Path, columns: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=f"`r.parquet`, {said}"):
        read_table(tmp_path, **columns)


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        ({"prompt_ids": ["a", "b"]}, "prompt_ids"),
        ({"prompt_ids": [1, 2]}, "prompt_ids"),
        ({"prompt_ids": [[1.0], [2.0]]}, "prompt_ids"),
        ({"prompt_ids": [["1"], ["2"]]}, "prompt_ids"),
        ({"prompt_ids": pa.array([[1], [2]], pa.list_(pa.int32(), 1))}, "prompt_ids"),
        ({"loss_mask": [True, False]}, "loss_mask"),
        ({"loss_mask": [[1], [1, 0]]}, "loss_mask"),
        ({"logprobs": [-1.0, -2.0]}, "logprobs"),
        ({"logprobs": [["x"], ["y", "z"]]}, "logprobs"),
        ({"prompt": [[{"role": "user"}], []]}, "prompt"),
        ({"finish_reason": [1, 2]}, "finish_reason"),
    ],
)
def test_a_column_of_another_type_is_named(tmp_path: Path, columns: dict[str, Any], name: str) -> None:
    with pytest.raises(DataError, match=f"the column `{name}` is of another type\n  expected  .*\n  actual    "):
        read_table(tmp_path, **columns)


@pytest.mark.parametrize("name", ["prompt_ids", "response_ids"])
def test_a_file_without_ids_is_refused(tmp_path: Path, name: str) -> None:
    pq.write_table(
        pa.table({"text": ["x", "y"]} | {n: v for n, v in GOOD.items() if n != name}), tmp_path / "r.parquet"
    )
    with pytest.raises(DataError, match=f"has no column `{name}`(?s:.)*hint: rollouts are token ids as sampled"):
        RolloutsFile(tmp_path / "r.parquet")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no rollouts at `.*r\.parquet`"):
        RolloutsFile(tmp_path / "r.parquet")


@pytest.mark.parametrize("kept", [0, 3, 200, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, kept: int) -> None:
    path = save_table(tmp_path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"(?s)is not a Parquet file.*hint: .*`lopd-store generate`"):
        RolloutsFile(path)


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    table = pa.table(GOOD).replace_schema_metadata({METADATA_KEY: b'{"record": "rollouts"}'})
    pq.write_table(table, tmp_path / "r.parquet")
    with pytest.raises(ArtifactError, match=r"`r\.parquet` lacks `policy`, "):
        RolloutsFile(tmp_path / "r.parquet")


@pytest.mark.parametrize(("field", "value"), [("tokenizer", digest_contents(b"other").sha256), ("vocab_size", 310)])
def test_ids_that_mean_something_else_to_a_model_are_refused(tmp_path: Path, field: str, value: Any) -> None:
    file = RolloutsFile(save_rollouts(tmp_path / "r.parquet", random_pairs([(2, 3)]), record=ROLLOUTS))
    file.require_tokenizer_of(identity_named("teacher"), "the teacher")
    with pytest.raises(DataError, match="has ids of another tokenizer than that of the teacher") as refused:
        file.require_tokenizer_of(identity_named("teacher", **{field: value}), "the teacher")
    mine = getattr(ROLLOUTS.policy, field)
    assert (refused.value.expected, refused.value.actual) == (f"{value}  (teacher)", f"{mine}  (student)")


def test_a_file_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    def rows() -> Any:
        yield {"prompt_ids": [1], "response_ids": [2]}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_rollouts(tmp_path / "r.parquet", rows(), None)
    assert list(tmp_path.iterdir()) == []


def test_the_digest_is_that_of_the_bytes(tmp_path: Path) -> None:
    path = save_table(tmp_path)
    assert RolloutsFile(path).digest() == digest_contents(path.read_bytes()).sha256
