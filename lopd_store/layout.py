"""Where things are in an artifact, and which paths a manifest may name.

NAME/manifest.json  build.json  README.md  plots/topk.png  parts/00000.rollouts.parquet  parts/00000.tokens.zarr.zip  …
"""

from __future__ import annotations

from pathlib import Path

from lopd_store.errors import InputError

MANIFEST = "manifest.json"
BUILD_RECORD = "build.json"
CARD = "README.md"
VIEW = "view.json"
SIGNATURES = "signatures.json"
PARTS = "parts"
PLOTS = "plots"
ALL_PLOTS = tuple(f"{PLOTS}/{name}.png" for name in ("topk", "advantage", "responses"))
BUILDING_SUFFIX = ".building"
PULLING_SUFFIX = ".pulling"

ROLLOUTS = "rollouts"
TOKENS = "tokens"
TOPK = "topk"
FILE_KINDS = (ROLLOUTS, TOKENS, TOPK)
_SUFFIXES = {ROLLOUTS: "rollouts.parquet", TOKENS: "tokens.zarr.zip", TOPK: "topk.zarr.zip"}

MAX_PARTS = 100_000
MAX_FILE_BYTES = (1 << 32) - 1  # of one file of a part: as much as a zip without extensions can hold


def part_name(part: int) -> str:
    """What the files of a part have in common, `parts/00003`."""
    return f"{PARTS}/{part:05d}"


def part_file(part: int, kind: str) -> str:
    """The relative path of one file of a part, `parts/00003.topk.zarr.zip`."""
    return f"{part_name(part)}.{_SUFFIXES[kind]}"


def documents(directory: Path) -> list[str]:
    """The files beside manifest and parts that are there: the build record, the card with its plots, signatures."""
    plots = () if (directory / PLOTS).is_symlink() else ALL_PLOTS
    names = (BUILD_RECORD, CARD, *plots, SIGNATURES)
    return [name for name in names if (directory / name).is_file() and not (directory / name).is_symlink()]


def no_artifact(path: Path) -> InputError:
    """The error for a path without a manifest: nothing is there, or a build that is not finished."""
    building = path if path.name.endswith(BUILDING_SUFFIX) else building_directory(path)
    if building.is_dir():
        return InputError(
            f"`{path}` is still being built",
            expected=f"a sealed artifact, with `{MANIFEST}`",
            actual=f"`{building}`",
            hint="run the same `lopd-store build` again: it goes on where it stopped",
        )
    return InputError(f"no artifact at `{path}`", expected=f"a directory with `{MANIFEST}`")


def building_directory(output: Path) -> Path:
    """Where the build in progress of `output` lives until it is sealed."""
    return output.parent / f"{output.name}{BUILDING_SUFFIX}"  # `.` and `/` have no name
