"""Where things are."""

from __future__ import annotations

from pathlib import Path

import pytest

from lopd_store import layout


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        (layout.ROLLOUTS, "parts/00007.rollouts.parquet"),
        (layout.TOKENS, "parts/00007.tokens.zarr.zip"),
        (layout.TOPK, "parts/00007.topk.zarr.zip"),
    ],
)
def test_the_files_of_a_part_have_their_names(kind: str, path: str) -> None:
    assert layout.part_file(7, kind) == path


def test_a_build_in_progress_lies_beside_its_output() -> None:
    assert layout.building_directory(Path("a/b.c")) == Path("a/b.c.building")


@pytest.mark.parametrize("path", [".", "/"])
def test_a_directory_without_a_name_is_no_artifact_either(path: str) -> None:
    assert str(layout.no_artifact(Path(path))).startswith(f"no artifact at `{path}`")
