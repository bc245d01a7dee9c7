"""`exact_topk` against a sort of the whole row, on values that tie as bfloat16 logits do."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lopd_store.teachers.transformers import exact_topk

TIED = hnp.arrays(
    np.float32,
    st.tuples(st.integers(0, 5), st.integers(1, 40)),
    elements=st.one_of(st.integers(-3, 3).map(float), st.just(-np.inf)),
)


@given(TIED, st.data())
def test_of_equal_values_the_lowest_ids_are_kept(values: npt.NDArray[np.float32], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, values.shape[1]))
    top, ids = exact_topk(torch.from_numpy(values), k)
    for row, kept in zip(values.tolist(), ids.tolist(), strict=True):
        assert sorted(kept) == sorted(sorted(range(len(row)), key=lambda id: (-row[id], id))[:k])
    np.testing.assert_array_equal(top.numpy(), np.take_along_axis(values, ids.numpy(), axis=1))


@given(
    rows=st.integers(1, 4),
    width=st.integers(600, 3000),
    k=st.integers(1, 12),
    levels=st.sampled_from([2, 5, 40, 10_000]),
    seed=st.integers(0, 1 << 32),
)
def test_looking_at_some_blocks_of_a_large_vocabulary_finds_the_same(
    rows: int, width: int, k: int, levels: int, seed: int
) -> None:
    values = np.random.default_rng(seed).integers(0, levels, (rows, width)).astype(np.float32)
    top, ids = exact_topk(torch.from_numpy(values), k)
    wanted = np.sort(np.lexsort((np.broadcast_to(np.arange(width), values.shape), -values), axis=-1)[:, :k], axis=1)
    np.testing.assert_array_equal(np.sort(ids.numpy(), axis=1), wanted)
    np.testing.assert_array_equal(top.numpy(), np.take_along_axis(values, ids.numpy(), axis=1))
