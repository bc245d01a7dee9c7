"""Any JSON value survives its two byte forms, and no bytes at all are worse than an ArtifactError."""

from __future__ import annotations

import contextlib
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from lopd_store.errors import ArtifactError
from lopd_store.strictjson import canonical, loads, pretty

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 60), 1 << 60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)


@given(VALUES)
def test_a_value_comes_back_from_its_canonical_form(value: Any) -> None:
    assert loads(canonical(value), where="x") == value


@given(VALUES)
def test_a_value_comes_back_from_its_pretty_form(value: Any) -> None:
    assert loads(pretty(value), where="x") == value


@given(st.dictionaries(TEXT, st.integers(0, 9), max_size=8))
def test_the_order_of_names_changes_no_byte(value: dict[str, int]) -> None:
    backwards = dict(reversed(list(value.items())))
    assert canonical(backwards) == canonical(value) and pretty(backwards) == pretty(value)


@given(st.binary(max_size=40) | st.text('[]{}",:\\u0d8fnat\n -.e1', max_size=40).map(str.encode))
def test_bytes_are_read_or_refused_and_what_is_read_can_be_written(data: bytes) -> None:
    with contextlib.suppress(ArtifactError):
        canonical(loads(data, where="x"))
