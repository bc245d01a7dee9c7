"""A combination reads as its artifacts read one after the other."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import lopd_store
from lopd_store.part import Part
from lopd_store.topk import TopK
from tests.conformance.text import SPEC

ALIKE = (
    *("adaptive_k", "annotated", "certain_token", "consistent_sft", "empty_response", "impossible_token"),
    *("inconsistent_sft", "long_prompt", "loss_mask_with_zeros", "no_positions_at_all", "one_rollout", "several_parts"),
    *("ties", "unicode_text", "unknown_sft"),
)
NAMES = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,63}", fullmatch=True)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(NAMES, st.sampled_from(ALIKE)), min_size=2, max_size=4, unique_by=lambda one: one[0]))
def test_it_reads_as_they_read_one_after_the_other(chosen: list[tuple[str, str]]) -> None:
    named = [(domain, SPEC / "vectors" / "valid" / slug) for domain, slug in chosen]
    with TemporaryDirectory() as directory:
        made = lopd_store.combine(*named, output=Path(directory) / "all")
        sources = [lopd_store.open(path) for _, path in named]
        assert [one.domain for one in made.manifest.inputs] == [domain for domain, _ in named]
        assert len(made) == sum(map(len, sources))
        for ours, theirs in zip(made.parts(), (part for one in sources for part in one.parts()), strict=True):
            assert_equal(ours, theirs)
        starts = np.cumsum([0, *map(len, sources)]).tolist()
        for index, source in enumerate(sources):
            rows = made.rollouts_of(index)
            assert rows == range(starts[index], starts[index + 1])
            for row in rows:
                same = made.rollout(row).response_ids, source.rollout(row - rows.start).response_ids
                np.testing.assert_array_equal(*same)


def assert_equal(ours: Part, theirs: Part) -> None:
    assert ours.topk is not None and theirs.topk is not None
    for kind, pair in ((Part, (ours, theirs)), (TopK, (ours.topk, theirs.topk))):
        for field in fields(kind):
            values = [getattr(one, field.name) for one in pair]
            if isinstance(values[0], np.ndarray):
                np.testing.assert_array_equal(*values)
