"""Digests against known answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import xxhash

from lopd_store.digest import digest_bytes, digest_contents, digest_file, digest_json, is_digest, xxh3_file

EMPTY = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
ABC = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize(("data", "digest"), [(b"", EMPTY), (b"abc", ABC)])
def test_a_digest_is_the_sha256_of_the_bytes(data: bytes, digest: str) -> None:
    assert digest_bytes(data) == digest


def test_a_file_and_its_contents_have_the_same_digests(tmp_path: Path) -> None:
    data = bytes(range(256)) * 10_000  # more than two blocks
    (tmp_path / "file").write_bytes(data)
    assert digest_file(tmp_path / "file") == digest_contents(data)
    assert xxh3_file(tmp_path / "file") == digest_contents(data).xxh3_128 == xxhash.xxh3_128_hexdigest(data)


@pytest.mark.parametrize("read", [digest_file, xxh3_file])
def test_progress_hears_of_every_byte(tmp_path: Path, read: type) -> None:
    (tmp_path / "file").write_bytes(b"x" * 2_500_000)
    heard: list[int] = []
    read(tmp_path / "file", heard.append)
    assert sum(heard) == 2_500_000 and len(heard) == 3


def test_equal_json_values_have_one_digest() -> None:
    assert digest_json({"a": 1, "b": [2]}) == digest_json({"b": [2], "a": 1})


@pytest.mark.parametrize(
    "value",
    ["", ABC.upper(), ABC[:-1], ABC + "0", ABC.removeprefix("sha256:"), ABC + "\n", "md5:" + ABC[7:], None, 3, b"x"],
)
def test_nothing_else_is_a_digest(value: object) -> None:
    assert is_digest(ABC) and not is_digest(value)
