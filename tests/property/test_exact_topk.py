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
