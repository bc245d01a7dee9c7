"""Opening artifacts, and what is in the way of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import lopd_store
from lopd_store import layout
from lopd_store.errors import ArtifactError, InputError
from tests.unit.conftest import LENGTHS


def test_every_rollout_is_found_in_any_order(sealed: Path) -> None:
    artifact = lopd_store.open(sealed)
    for index in (5, 0, 3, 2, 4, 1, 0):
        found = artifact.rollout(index)
        assert (len(found.prompt_ids), len(found.response_ids)) == LENGTHS[index]
        assert found.topk is not None and len(found.topk.counts) == LENGTHS[index][1]


def test_the_rows_of_a_rollout_are_those_of_its_part(sealed: Path) -> None:
    artifact = lopd_store.open(sealed)
    whole = np.concatenate([part.sampled_logprobs for part in artifact.parts()])
    pieces = np.concatenate([artifact.rollout(index).sampled_logprobs for index in range(len(artifact))])
    np.testing.assert_array_equal(pieces, whole)


@pytest.mark.parametrize("index", [-1, 6])
def test_a_rollout_that_is_not_there_is_refused_with_the_range(sealed: Path, index: int) -> None:
    with pytest.raises(InputError, match=f"there is no rollout {index}\n  expected  0 to 5"):
        lopd_store.open(sealed).rollout(index)


def test_parts_may_be_left_halfway(sealed: Path) -> None:
    parts = lopd_store.open(sealed).parts()
    assert len(next(parts).prompt_lengths) == 2
    parts.close()  # type: ignore[attr-defined]


def test_an_artifact_without_topk_files_still_has_its_sampled_logprobs(artifact: Path) -> None:
    (artifact / layout.part_file(0, layout.TOPK)).unlink()
    found = lopd_store.open(artifact).rollout(0)
    assert found.topk is None and len(found.sampled_logprobs) == 9


def test_a_missing_part_says_how_to_check_the_artifact(artifact: Path) -> None:
    (artifact / layout.part_file(1, layout.TOKENS)).unlink()
    with pytest.raises(ArtifactError, match=r"00001\.tokens\.zarr\.zip` is missing\n\nhint: lopd-store verify"):
        lopd_store.open(artifact).part(1)


def test_a_build_in_progress_is_no_artifact(artifact: Path) -> None:
    building = artifact.rename(layout.building_directory(artifact))
    (building / layout.MANIFEST).unlink()
    for path in (artifact, building):
        with pytest.raises(InputError, match=r"is still being built(?s:.)*hint: run the same `lopd-store build` again"):
            lopd_store.open(path)


@pytest.mark.parametrize("name", ["", "nowhere"])
def test_where_there_is_no_artifact_there_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"no artifact at `.*`\n  expected  a directory with `manifest\.json`"):
        lopd_store.open(tmp_path / name)


def test_a_damaged_manifest_is_refused_with_its_path(artifact: Path) -> None:
    (artifact / layout.MANIFEST).write_bytes(b"{")
    with pytest.raises(ArtifactError, match=rf"`{artifact}/manifest\.json` is not valid JSON"):
        lopd_store.open(artifact)


def test_an_attribute_that_is_not_there_is_said_so() -> None:
    with pytest.raises(AttributeError, match="module `lopd_store` has no attribute `nothing`"):
        lopd_store.nothing  # noqa: B018
