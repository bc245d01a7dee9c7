"""Which paths a manifest may name."""

from __future__ import annotations

from pathlib import Path

import pytest

from lopd_store import layout


@pytest.mark.parametrize("kind", layout.FILE_KINDS)
@pytest.mark.parametrize("part", [0, 7, layout.MAX_PARTS - 1])
def test_the_files_of_every_part_are_part_files(part: int, kind: str) -> None:
    assert layout.is_part_file(layout.part_file(part, kind))


@pytest.mark.parametrize(
    "path",
    [
        *("../parts/00000.topk.zarr.zip", "/parts/00000.topk.zarr.zip", "parts/../00000.topk.zarr.zip"),
        *("parts/0.topk.zarr.zip", "parts/00000.topk.zarr.zip/", "parts/00000.topk.zarr.zip\n", "parts\\00000.topk"),
        *(
            "parts/000000.topk.zarr.zip",
            "parts/00000.other.zip",
            "manifest.json",
            "",
            "parts/\u0660\u0660\u0660\u0660\u0660.topk.zarr.zip",
        ),
    ],
)
def test_no_other_path_is_a_part_file(path: str) -> None:
    assert not layout.is_part_file(path)


def test_a_build_in_progress_lies_beside_its_output() -> None:
    assert layout.building_directory(Path("a/b.c")) == Path("a/b.c.building")
