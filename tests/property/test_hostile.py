"""Hostile bytes: no change goes unseen, and whatever a stranger seals, a finding is the worst that comes of it."""

from __future__ import annotations

import copy
import json
import resource
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lopd_store
from lopd_store import layout, strictjson
from lopd_store.container import Group, pack, stored_members
from lopd_store.digest import digest_bytes, digest_contents
from lopd_store.errors import LopdError
from lopd_store.manifest import parse, sealed
from lopd_store.part import tokens_arrays, topk_arrays

VALID = Path(__file__).parents[2] / "spec" / "vectors" / "valid"
ALLOWED_BYTES = 4 << 30  # of address space, beyond what the process has: far below what a hostile size asks for
Files = dict[str, bytes]

# Slow is wrong here: no change of a few kilobytes may take seconds.
hostile = settings(max_examples=50, deadline=timedelta(seconds=20))


def files_of(slug: str) -> Files:
    """A valid vector in memory."""
    root = VALID / slug
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


TINY = files_of("one_rollout")
BASES = st.sampled_from(
    [
        files_of(slug)
        for slug in ("adaptive_k", "exact", "fixed_k", "teacher_and_reference", "empty_response", "annotated")
    ]
)


@contextmanager
def on_disk(files: Files) -> Iterator[Path]:
    """A directory that holds these files."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / layout.PARTS).mkdir()
        for name, data in files.items():
            (Path(directory) / name).write_bytes(data)
        yield Path(directory)


@pytest.fixture(autouse=True, scope="module")
def bounded_memory() -> Iterator[None]:
    """Who asks for much more memory than there are bytes to read gets none."""
    statm = Path("/proc/self/statm")
    if not statm.exists():  # another system than Linux
        yield
        return
    pages = int(statm.read_text(encoding="ascii").split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ALLOWED_BYTES, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


# Every change of a byte, and every cut


PARTS = sorted(name for name in TINY if name.startswith(layout.PARTS))
LONGEST = max(len(TINY[name]) for name in PARTS)


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :]


def found_in(files: Files, directory: Path, *, quick: bool) -> set[str]:
    """The files in which something is found once these are written."""
    for name, data in files.items():
        (directory / name).write_bytes(data)
    return {found.where for found in lopd_store.verify(directory, quick=quick, threads=1).findings}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A small artifact to break."""
    return Path(shutil.copytree(VALID / "one_rollout", tmp_path / "artifact"))


# One byte in each file at a time; quick looks find the same by other means, so that every third byte will do.
@pytest.mark.parametrize(("quick", "step"), [(False, 1), (True, 3)])
def test_every_changed_byte_of_a_part_is_found(tiny: Path, quick: bool, step: int) -> None:
    for at in range(0, LONGEST, step):
        broken = {name: flipped(TINY[name], at % len(TINY[name])) for name in PARTS}
        assert found_in(broken, tiny, quick=quick) == set(PARTS), f"byte {at}"


def test_every_cut_of_a_part_is_found(tiny: Path) -> None:
    for length in range(LONGEST):
        broken = {name: TINY[name][: length % len(TINY[name])] for name in PARTS}
        assert found_in(broken, tiny, quick=length % 2 == 0) == set(PARTS), f"{length} bytes"


def test_every_changed_byte_and_every_cut_of_a_manifest_is_found(tiny: Path) -> None:
    data = TINY[layout.MANIFEST]
    for at in range(len(data)):
        for broken in (flipped(data, at), data[:at]):
            assert found_in({layout.MANIFEST: broken}, tiny, quick=at % 2 == 0) == {layout.MANIFEST}, f"byte {at}"


def test_every_changed_byte_and_every_cut_of_a_view_is_found(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(VALID / "sampled_only_view", tmp_path / "view"))
    data = (directory / layout.VIEW).read_bytes()
    for at in range(len(data)):
        for broken in (flipped(data, at), data[:at]):
            found = found_in({layout.VIEW: broken}, directory, quick=at % 2 == 0)
            # White space is free: it is the only thing about a view that no digest and no rule covers.
            assert found == {layout.VIEW} or json.loads(broken) == json.loads(data), f"byte {at}"


# Whatever a stranger seals: digests and seal are honest, the bytes below them are not


def survives(files: Files) -> None:
    """Verifying gives a report that can be said, and reading gives a part or an error of ours."""
    with on_disk(files) as directory:
        report = lopd_store.verify(directory, threads=1)
        json.dumps(report.to_json(), ensure_ascii=False).encode()
        lopd_store.verify(directory, quick=True, threads=1)
        try:
            artifact = lopd_store.open(directory)
            for number in artifact.view.parts:
                artifact.part(number)
            for index in range(min(len(artifact), 3)):
                artifact.rollout(index)
        except LopdError as error:
            assert not report.ok and str(error)


def resealed(files: Files, **contents: bytes) -> Files:
    """With other files of part 0, by their kinds, about which the manifest tells the truth."""
    manifest = json.loads(files[layout.MANIFEST])
    changed = dict(files)
    for kind, data in contents.items():
        changed[layout.part_file(0, kind)] = data
        manifest["parts"][0]["files"][kind] |= vars(digest_contents(data))
    return changed | {layout.MANIFEST: sealed(manifest)}


def zipped(members: dict[str, bytes]) -> bytes:
    sink = BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        for name, data in sorted(members.items()):
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data)
    return sink.getvalue()


@st.composite
def damaged(draw: st.DrawFn, data: bytes, start: int = 0) -> bytes:
    """These bytes with a few changed, cut out, put in, or copied from elsewhere, none before `start`."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(min(start, len(changed)), len(changed)))
        width = draw(st.sampled_from([1, 1, 1, 2, 4, 8]))
        match draw(st.sampled_from(["flip", "set", "insert", "delete", "copy", "cut"])):
            case "flip" if at < len(changed):
                changed[at] ^= 1 << draw(st.integers(0, 7))
            case "set":
                changed[at : at + width] = draw(st.sampled_from([b"\0", b"\xff", b"\x7f", b"\x80", b"\1"])) * width
            case "insert":
                changed[at:at] = draw(st.binary(min_size=width, max_size=width))
            case "delete":
                del changed[at : at + width]
            case "copy":
                other = draw(st.integers(0, len(changed)))
                changed[at : at + width] = changed[other : other + width]
            case "cut":
                del changed[at:]
    return bytes(changed)


ODD: st.SearchStrategy[Any] = st.sampled_from(
    [
        *(None, True, False, 0, 1, -1, 3.0, 0.5, 1e308, 5e-324, 1 << 31, (1 << 53) - 1, 1 << 63, 10**19),
        *("", "a", "\0", "NaN", "../x", "x" * 300, "\u2028", [], {}, [[]], [0], {"": 0}),
    ]
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every value inside of this one."""
    for step in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, step)
        yield from places(value[step], (*path, step))


@st.composite
def edited(draw: st.DrawFn, document: Any) -> Any:
    """A JSON value with a few values inside replaced, removed, moved by one, repeated, or put in."""
    value = json.loads(json.dumps(document))
    for _ in range(draw(st.integers(1, 3))):
        paths = list(places(value))
        if not paths:
            break
        *steps, last = draw(st.sampled_from(paths))
        at = value
        for step in steps:
            at = at[step]
        match draw(st.sampled_from(["replace", "replace", "remove", "number", "add"])):
            case "replace":
                at[last] = copy.deepcopy(draw(ODD))
            case "remove":
                del at[last]
            case "number" if type(at[last]) in (int, float):
                at[last] = draw(st.sampled_from([at[last] + 1, at[last] - 1, -at[last], float(at[last]), 2 * at[last]]))
            case "add" if isinstance(at, list):
                at.append(copy.deepcopy(draw(ODD)))
            case "add" if isinstance(at, dict):
                at[draw(st.sampled_from(["more", "", "path", "__class__"]))] = copy.deepcopy(draw(ODD))
    return value


ZIPS = st.sampled_from([layout.TOKENS, layout.TOPK])


def members_of(files: Files, kind: str) -> dict[str, bytes]:
    data = memoryview(files[layout.part_file(0, kind)])
    return {name: bytes(member) for name, member in stored_members(data, kind).items()}


@hostile
@given(BASES, ZIPS, st.data())
def test_hostile_chunks(files: Files, kind: str, data: st.DataObject) -> None:
    members = members_of(files, kind)
    name = data.draw(st.sampled_from([name for name in members if "/c/" in name]))
    # Most of what is interesting lies behind the first bytes, which only say what is expected.
    start = 0 if members[name].startswith(b"\x28\xb5") else data.draw(st.sampled_from([0, 13, 13, 13]))
    members[name] = data.draw(damaged(members[name], start))
    survives(resealed(files, **{kind: zipped(members)}))


@hostile
@given(BASES, ZIPS, st.data())
def test_hostile_metadata_of_zarr(files: Files, kind: str, data: st.DataObject) -> None:
    members = members_of(files, kind)
    name = data.draw(st.sampled_from([name for name in members if name.endswith("zarr.json")]))
    members[name] = json.dumps(data.draw(edited(json.loads(members[name])))).encode()
    survives(resealed(files, **{kind: zipped(members)}))


@hostile
@given(BASES, ZIPS, st.data())
def test_hostile_zips(files: Files, kind: str, data: st.DataObject) -> None:
    survives(resealed(files, **{kind: data.draw(damaged(files[layout.part_file(0, kind)]))}))


@hostile
@given(BASES, st.booleans(), st.data())
def test_hostile_tables(files: Files, in_the_footer: bool, data: st.DataObject) -> None:
    table = files[layout.part_file(0, layout.ROLLOUTS)]
    length = int.from_bytes(table[-8:-4], "little") if in_the_footer else 0
    footer = data.draw(damaged(table[-8 - length : -8])) if in_the_footer else b""
    changed = table[: -8 - length] + footer + len(footer).to_bytes(4, "little") + table[-4:]
    survives(resealed(files, rollouts=changed if in_the_footer else data.draw(damaged(table))))


@hostile
@given(BASES, st.data())
def test_hostile_manifests(files: Files, data: st.DataObject) -> None:
    document = data.draw(edited(json.loads(files[layout.MANIFEST])))
    survives(files | {layout.MANIFEST: sealed(document)})


@hostile
@given(BASES, st.data())
def test_hostile_text_of_a_manifest(files: Files, data: st.DataObject) -> None:
    survives(files | {layout.MANIFEST: data.draw(damaged(files[layout.MANIFEST]))})


@hostile
@given(st.booleans(), st.data())
def test_hostile_views(as_text: bool, data: st.DataObject) -> None:
    files = files_of("sampled_only_view")
    view = files[layout.VIEW]
    changed = data.draw(damaged(view)) if as_text else strictjson.pretty(data.draw(edited(json.loads(view))))
    survives(files | {layout.VIEW: changed})


@hostile
@given(BASES, ZIPS, st.data())
def test_hostile_values(files: Files, kind: str, data: st.DataObject) -> None:
    encoding = parse(files[layout.MANIFEST]).encoding
    specs = tokens_arrays(encoding) if kind == layout.TOKENS else topk_arrays(encoding)
    group = Group(files[layout.part_file(0, kind)], specs, where=kind)
    arrays = {name: group.read(name) for name in group.lengths}
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(arrays)))
        arrays[name] = data.draw(_OTHER[arrays[name].dtype.kind])(arrays[name].copy(), data.draw(st.integers(0, 30)))
    survives(resealed(files, **{kind: pack(arrays, specs)}))


Change = Callable[[np.ndarray[Any, Any], int], np.ndarray[Any, Any]]


def _put(value: Any) -> Change:
    def change(values: np.ndarray[Any, Any], at: int) -> np.ndarray[Any, Any]:
        if len(values):
            values[at % len(values)] = value(values.dtype) if callable(value) else value
        return values

    return change


def _cut(values: np.ndarray[Any, Any], at: int) -> np.ndarray[Any, Any]:
    return values[: at % (len(values) + 1)]


def _repeat(values: np.ndarray[Any, Any], at: int) -> np.ndarray[Any, Any]:
    return np.concatenate([values, values[:at]])


_LEAST, _GREATEST = (lambda dtype: np.iinfo(dtype).min), (lambda dtype: np.iinfo(dtype).max)
_INTEGERS = st.sampled_from([_cut, _repeat, *map(_put, [0, 1, 2, 40, _LEAST, _GREATEST])])
_OTHER: dict[str, st.SearchStrategy[Change]] = {
    "b": st.sampled_from([_cut, _repeat, _put(False)]),
    "i": _INTEGERS,
    "u": _INTEGERS,
    "f": st.sampled_from([_cut, _repeat, *map(_put, [0, -0.0, 1, -1e-30, -3e38, np.nan, np.inf, -np.inf])]),
}


# What a stranger's numbers ask for


@pytest.mark.parametrize("size", [1 << 31, (1 << 32) - 1, 1 << 40, (1 << 53) - 1])
def test_a_file_that_is_said_to_be_huge_takes_no_memory(size: int) -> None:
    manifest = json.loads(TINY[layout.MANIFEST])
    manifest["parts"][0]["files"]["tokens"]["size"] = size
    survives(TINY | {layout.MANIFEST: sealed(manifest)})


@pytest.mark.parametrize("length", [1 << 20, 1 << 28])
def test_arrays_that_are_said_to_be_long_take_no_memory_before_their_chunks_are_there(length: int) -> None:
    members = members_of(TINY, layout.TOKENS)
    metadata = json.loads(members["token_ids/zarr.json"])
    chunk = min(length, 1 << 18)
    metadata |= {"shape": [length], "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [chunk]}}}
    members["token_ids/zarr.json"] = strictjson.canonical(metadata)
    files = resealed(TINY, tokens=zipped(members))
    manifest = json.loads(files[layout.MANIFEST])
    for counts in (manifest["counts"], manifest["parts"][0]["counts"]):
        counts["tokens"] = length
    with on_disk(files | {layout.MANIFEST: sealed(manifest)}) as directory:
        (found,) = lopd_store.verify(directory).findings
        assert found.code == "A032"


@pytest.mark.parametrize("name", ["parts", "manifest.json", "view.json"])
def test_nothing_is_read_through_a_link(tmp_path: Path, name: str) -> None:
    shutil.copytree(VALID / "sampled_only_view", tmp_path / "artifact")
    (tmp_path / "artifact" / name).rename(tmp_path / "elsewhere")
    (tmp_path / "artifact" / name).symlink_to(tmp_path / "elsewhere")
    assert not lopd_store.verify(tmp_path / "artifact").ok
    with pytest.raises(LopdError):
        lopd_store.open(tmp_path / "artifact").part(0)


def test_a_name_that_is_no_text_can_be_said(tmp_path: Path) -> None:
    shutil.copytree(VALID / "one_rollout", tmp_path, dirs_exist_ok=True)
    (tmp_path / "parts" / b"\xff\n".decode(errors="surrogateescape")).write_bytes(b"")
    (found,) = lopd_store.verify(tmp_path).findings
    assert found.code == "A002" and found.where.encode() == b"parts/\\udcff\n"


def test_a_seal_over_another_fingerprint_of_a_view_is_found(tmp_path: Path) -> None:
    files = files_of("sampled_only_view")
    view = json.loads(files[layout.VIEW])
    assert view["fingerprint"] == digest_bytes(files[layout.MANIFEST])
    with on_disk(files | {layout.MANIFEST: TINY[layout.MANIFEST]}) as directory:
        assert [found.code for found in lopd_store.verify(directory).findings] == ["A003"]
