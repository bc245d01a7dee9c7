"""The quick look never clears a position that the rules report."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import lopd_store
from lopd_store import checks, layout
from lopd_store.container import Arrays, Group
from lopd_store.part import tokens_arrays, topk_arrays
from lopd_store.screen import Screen

VECTORS = Path(__file__).parents[2] / "spec" / "vectors" / "valid"
NAMES = ["adaptive_k", "fixed_k", "ties", "k_min_above_one", "response_tokens_outside_the_entries", "certain_token"]


def stored(name: str) -> tuple[lopd_store.Artifact, Arrays, Arrays]:
    """An artifact, and its first part's arrays as they are stored."""
    artifact = lopd_store.open(VECTORS / name)
    encoding = artifact.manifest.encoding
    groups = [
        Group((artifact.path / layout.part_file(0, kind)).read_bytes(), specs(encoding), where=kind)
        for kind, specs in ((layout.TOKENS, tokens_arrays), (layout.TOPK, topk_arrays))
    ]
    tokens, topk = ({name: group.read(name).copy() for name in group.lengths} for group in groups)
    return artifact, tokens, topk


def findings(artifact: lopd_store.Artifact, tokens: Arrays, topk: Arrays) -> list[checks.Finding]:
    manifest = artifact.manifest
    with np.errstate(all="ignore"):
        return list(
            checks.check_topk(
                tokens, topk, manifest.parts[0].counts, manifest.encoding, manifest.inputs.teacher.vocab_size, "topk"
            )
        )


@given(st.sampled_from(NAMES), st.data())
def test_with_and_without_the_quick_look_the_findings_are_the_same(name: str, data: st.DataObject) -> None:
    artifact, tokens, topk = stored(name)
    places = {"ids": topk["ids"], "logprobs": topk["logprobs"], "tail_logprobs": topk["tail_logprobs"]}
    places |= {"sampled_logprobs": tokens["sampled_logprobs"], "id_table": topk["id_table"]}
    for _ in range(data.draw(st.integers(0, 4))):
        values = places[data.draw(st.sampled_from([key for key, array in places.items() if len(array)]))]
        at = data.draw(st.integers(0, len(values) - 1))
        near = int(values[at]) + data.draw(st.integers(-3, 3))
        anything = data.draw(st.sampled_from([near, int(values[data.draw(st.integers(0, len(values) - 1))])]))
        values[at] = min(max(anything, 0), 65_534)
    quick = findings(artifact, tokens, topk)
    with mock.patch.object(Screen, "knows", return_value=False):
        assert findings(artifact, tokens, topk) == quick


def test_honest_positions_are_cleared() -> None:
    artifact, tokens, topk = stored("adaptive_k")
    assert Screen.knows(topk["id_table"], topk["logprobs"], artifact.manifest.encoding)
    with mock.patch.object(checks, "_rules", side_effect=AssertionError("a position was in doubt")):
        assert findings(artifact, tokens, topk) == []
