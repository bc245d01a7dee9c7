"""Part files: which arrays they have, readable by plain Zarr, and refused where they do not fit together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr

from lopd_store.container import CHUNK, Group, pack
from lopd_store.encoding import Encoding, make_encoding
from lopd_store.errors import ArtifactError
from lopd_store.part import (
    Part,
    read_part,
    rollouts_file,
    round_part,
    tokens_arrays,
    tokens_file,
    topk_arrays,
    topk_file,
)
from tests.artifacts import change, make_topk

COMPACT, EXACT = make_encoding(), make_encoding(exact=True)
UNION = make_encoding(rule="teacher+reference")
TOPK = make_topk([[(5, -0.5), (7, -1.0)], [(5, 0.0)]], tails=[-3.0, -np.inf])
PART = Part(
    rollout_offsets=np.array([0, 3, 4], np.int64),
    prompt_lengths=np.array([1, 1], np.int32),
    token_ids=np.array([9, 5, 7, 8], np.uint32),
    loss_mask=np.array([True, False]),
    sampled_logprobs=np.array([-0.5, 0.0], np.float32),
    reference_logprobs=np.array([-0.25, -1.0], np.float32),
    topk=TOPK,
)
WITH_REFERENCE = replace(
    PART,
    topk=replace(
        TOPK,
        reference_logprobs=np.array([-2.0, -0.5, -np.inf], np.float32),
        reference_tail_logprobs=np.array([-1.0, 0.0], np.float32),
    ),
)


def files(part: Part, encoding: Encoding) -> dict[str, bytes]:
    return {"tokens": tokens_file(part, encoding), "topk": topk_file(part, encoding)}


def read(encoding: Encoding, contents: dict[str, bytes], part: Part = PART) -> Part:
    return read_part(contents["tokens"], contents["topk"], encoding, part.counts, where="parts/00000")


def with_arrays(data: bytes, kind: str, encoding: Encoding = COMPACT, **arrays: Any) -> bytes:
    """The same file with other stored arrays."""
    specs = tokens_arrays(encoding) if kind == "tokens" else topk_arrays(encoding)
    group = Group(data, specs, where=kind)
    return pack({name: group.read(name) for name in group.lengths} | arrays, specs)


def open_with_zarr(path: Path, data: bytes) -> zarr.Group:
    path.write_bytes(data)
    return zarr.open_group(zarr.storage.ZipStore(path, mode="r"), mode="r")


# What a stranger sees


@pytest.mark.parametrize(("encoding", "logprob"), [(COMPACT, "uint16"), (EXACT, "float32")])
def test_plain_zarr_opens_the_tokens_with_the_documented_types(
    tmp_path: Path, encoding: Encoding, logprob: str
) -> None:
    group = open_with_zarr(tmp_path / "tokens.zip", tokens_file(PART, encoding))
    assert {name: str(array.dtype) for name, array in group.arrays()} == {
        "rollout_offsets": "int64",
        "prompt_lengths": "int32",
        "token_ids": "uint32",
        "loss_mask": "bool",
        "sampled_logprobs": logprob,
        "reference_logprobs": logprob,
    }


@pytest.mark.parametrize(
    ("part", "encoding", "logprob"),
    [(PART, COMPACT, "uint16"), (PART, EXACT, "float32"), (WITH_REFERENCE, UNION, "uint16")],
)
def test_plain_zarr_opens_the_topk_with_the_documented_types(
    tmp_path: Path, part: Part, encoding: Encoding, logprob: str
) -> None:
    group = open_with_zarr(tmp_path / "topk.zip", topk_file(part, encoding))
    reference = {"reference_logprobs": logprob, "reference_tail_logprobs": logprob} if encoding is UNION else {}
    assert {name: str(array.dtype) for name, array in group.arrays()} == {
        "counts": "uint16",
        "id_table": "uint32",
        "ids": "uint32",
        "logprobs": logprob,
        "tail_logprobs": logprob,
        **reference,
    }


def test_with_the_levels_of_the_grid_plain_zarr_decodes_the_values(tmp_path: Path) -> None:
    group: Any = open_with_zarr(tmp_path / "topk.zip", topk_file(PART, COMPACT))
    assert COMPACT.topk_grid is not None
    levels = COMPACT.topk_grid.levels
    assert levels[group["logprobs"][:]].tolist() == [-0.5, -1.0, 0.0]
    assert levels[group["tail_logprobs"][:]].tolist() == [-3.0, -np.inf]
    assert (group["id_table"][:].tolist(), group["ids"][:].tolist()) == ([5, 7], [0, 2, 1])  # 5 is a response token


@pytest.mark.parametrize("encoding", [COMPACT, EXACT, UNION])
def test_the_fill_value_is_no_legal_value_but_of_flags(encoding: Encoding) -> None:
    fills = {name: spec.fill for name, spec in (tokens_arrays(encoding) | topk_arrays(encoding)).items()}
    logprob = "NaN" if encoding is EXACT else 65_535
    names = [name for name in fills if name.endswith("logprobs")]
    assert fills == {
        **{"rollout_offsets": -1, "prompt_lengths": -1, "loss_mask": False, "counts": 65_535},
        **dict.fromkeys(("token_ids", "id_table", "ids"), 0xFFFF_FFFF),
        **dict.fromkeys(names, logprob),
    }


def test_the_rollouts_table_opens_as_parquet(tmp_path: Path) -> None:
    (tmp_path / "table.parquet").write_bytes(rollouts_file({"prompt": ["hello", None], "prompt_length": [1, 2]}))
    assert pq.read_table(tmp_path / "table.parquet").to_pylist() == [
        {"prompt": "hello", "prompt_length": 1},
        {"prompt": None, "prompt_length": 2},
    ]


# Round trips


@pytest.mark.parametrize(
    ("part", "encoding"),
    [(PART, COMPACT), (PART, EXACT), (WITH_REFERENCE, UNION), (WITH_REFERENCE, replace(EXACT, rule=UNION.rule))],
)
def test_a_part_comes_back_from_its_files(part: Part, encoding: Encoding) -> None:
    found = read(encoding, files(part, encoding), part)
    assert part.topk is not None and found.topk is not None
    for wanted, got in ((part, found), (part.topk, found.topk)):
        for name, values in vars(wanted).items():
            if isinstance(values, np.ndarray):
                np.testing.assert_array_equal(getattr(got, name), values, err_msg=name, strict=True)
    assert (found.topk.reference_logprobs is None) == (part.topk.reference_logprobs is None)


def test_reference_logprobs_of_the_top_k_come_back_from_arrays_of_several_chunks() -> None:
    rng, positions, k = np.random.default_rng(0), CHUNK // 2 + 3, 2
    logprobs = -np.sort(rng.exponential(2, (positions, k)).astype(np.float32), axis=1).ravel()
    topk = replace(
        make_topk([], tails=[]),
        counts=np.full(positions, k, np.uint16),
        ids=rng.integers(0, 300, positions * k).astype(np.uint32),
        logprobs=logprobs,
        tail_logprobs=-rng.exponential(2, positions).astype(np.float32),
        reference_logprobs=-rng.exponential(9, positions * k).astype(np.float32),
        reference_tail_logprobs=-rng.exponential(2, positions).astype(np.float32),
    )
    part = Part(
        rollout_offsets=np.array([0, 1 + positions], np.int64),
        prompt_lengths=np.array([1], np.int32),
        token_ids=rng.integers(0, 300, 1 + positions).astype(np.uint32),
        loss_mask=rng.integers(0, 2, positions).astype(np.bool_),
        sampled_logprobs=topk.tail_logprobs,
        reference_logprobs=None,
        topk=topk,
    )
    rounded = round_part(part, UNION)
    found = read(UNION, files(rounded, UNION), rounded)
    assert rounded.topk is not None and found.topk is not None and found.reference_logprobs is None
    for name in ("counts", "ids", "logprobs", "tail_logprobs", "reference_logprobs", "reference_tail_logprobs"):
        np.testing.assert_array_equal(getattr(found.topk, name), getattr(rounded.topk, name), err_msg=name)
    np.testing.assert_array_equal(found.loss_mask, part.loss_mask)


def test_a_part_without_its_topk_file_still_has_everything_else() -> None:
    found = read_part(tokens_file(PART, COMPACT), None, COMPACT, PART.counts, where="parts/00000")
    assert found.topk is None and found.sampled_logprobs.tolist() == [-0.5, 0.0]


def test_reference_logprobs_of_the_response_tokens_may_be_absent() -> None:
    part = replace(PART, reference_logprobs=None)
    assert read(COMPACT, files(part, COMPACT)).reference_logprobs is None


def test_a_part_without_any_position_comes_back() -> None:
    part = replace(
        PART,
        prompt_lengths=np.array([3, 1], np.int32),
        loss_mask=PART.loss_mask[:0],
        sampled_logprobs=PART.sampled_logprobs[:0],
        reference_logprobs=PART.sampled_logprobs[:0],
        topk=make_topk([], tails=[]),
    )
    found = read(COMPACT, files(part, COMPACT), part)
    assert found.topk is not None and (found.counts.positions, len(found.topk.ids)) == (0, 0)


def test_slices_are_views() -> None:
    second = PART.slice(1, 2)
    assert (second.rollout_offsets.tolist(), second.token_ids.tolist()) == ([0, 1], [8])
    assert second.counts.positions == 0 and second.topk is not None and len(second.topk.counts) == 0
    first = PART.slice(0, 1)
    assert first.topk is not None
    for found, whole in ((first.sampled_logprobs, PART.sampled_logprobs), (first.topk.ids, TOPK.ids)):
        assert np.shares_memory(found, whole)


# Files that do not fit


@pytest.mark.parametrize(
    ("kind", "arrays", "code", "said"),
    [
        ("tokens", {"rollout_offsets": np.array([1, 3, 4])}, "A041", "do not run from 0 to the number of tokens"),
        ("tokens", {"rollout_offsets": np.array([0, 5, 4])}, "A041", "do not run from 0 to the number of tokens"),
        ("tokens", {"rollout_offsets": np.array([0, 3, 3])}, "A041", "expected  4\n  actual    3"),
        ("tokens", {"prompt_lengths": np.array([1, 0])}, "A042", "rollout 1: the prompt does not fit"),
        ("tokens", {"prompt_lengths": np.array([4, 1])}, "A042", "rollout 0: .*\n  expected  1 to 3\n  actual    4"),
        ("tokens", {"prompt_lengths": np.array([2, 1])}, "A042", "positions are not the response tokens"),
        ("topk", {"counts": np.array([1, 1])}, "A043", "`counts` do not add up .*\n  expected  3\n  actual    2"),
        ("topk", {"counts": np.array([65_535, 4])}, "A043", "`counts` do not add up to the entries"),
        ("topk", {"ids": np.array([0, 3, 1])}, "A044", "a row is not in `id_table`\n  expected  below 3"),
        ("topk", {"ids": np.array([0, 0xFFFF_FFFF, 1])}, "A044", "a row is not in `id_table`"),
        ("topk", {"id_table": np.array([5])}, "A044", "a row is not in `id_table`\n  expected  below 2\n  actual    2"),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(kind: str, arrays: dict[str, Any], code: str, said: str) -> None:
    contents = files(PART, COMPACT)
    contents[kind] = with_arrays(contents[kind], kind, **arrays)
    with pytest.raises(ArtifactError, match=said) as caught:
        read(COMPACT, contents)
    assert caught.value.code == code


@pytest.mark.parametrize("name", ["rollouts", "tokens", "positions", "entries"])
def test_other_lengths_than_the_manifest_says_are_refused(name: str) -> None:
    counts = replace(PART.counts, **{name: getattr(PART.counts, name) + 1})
    contents = files(PART, COMPACT)
    with pytest.raises(ArtifactError, match="has another length than the manifest says") as caught:
        read_part(contents["tokens"], contents["topk"], COMPACT, counts, where="parts/00000")
    assert caught.value.code == "A040"


@pytest.mark.parametrize("encoding", [EXACT, UNION])
def test_files_of_another_encoding_are_refused(encoding: Encoding) -> None:
    with pytest.raises(ArtifactError) as caught:
        read(encoding, files(PART, COMPACT))
    assert caught.value.code == "A031"


def test_prompt_lengths_that_overflow_are_refused() -> None:
    offsets = change(PART.rollout_offsets, 1, 2**63 - 1)
    contents = files(PART, COMPACT)
    contents["tokens"] = with_arrays(contents["tokens"], "tokens", rollout_offsets=offsets)
    with pytest.raises(ArtifactError) as caught:
        read(COMPACT, contents)
    assert caught.value.code in ("A041", "A042")
