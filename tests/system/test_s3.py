"""An object store: a real S3 server on loopback, and the same code as for any other URL of fsspec."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import lopd_store
from lopd_store.errors import ArtifactError, InputError
from tests.commands import run_command
from tests.s3 import make_bucket, s3_server

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a server."""
    with s3_server(tmp_path_factory.mktemp("s3")) as environment:
        yield environment


@pytest.fixture
def url(store: dict[str, str], sealed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where a copy of the artifact lies; the environment has the credentials, as for any tool of S3."""
    import s3fs

    for name, value in {**store, "XDG_CACHE_HOME": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    make_bucket("lab")
    files = s3fs.S3FileSystem()
    files.put(str(sealed), f"lab/{tmp_path.name}", recursive=True)
    return f"s3://lab/{tmp_path.name}"


def test_an_artifact_in_a_bucket_opens_verifies_and_is_pulled(sealed: Path, url: str, tmp_path: Path) -> None:
    here, there = lopd_store.open(sealed), lopd_store.open(url)
    assert there.fingerprint == here.fingerprint
    assert [part.counts for part in there.parts()] == [part.counts for part in here.parts()]
    assert run_command("lopd-store", "verify", url, "--quick").code == 0
    ran = run_command("lopd-store", "pull", url, "--only", "sampled", "--output", tmp_path / "pulled")
    assert ran.code == 0, ran.stderr
    report = lopd_store.verify(tmp_path / "pulled")
    assert report.ok and report.partial and report.fingerprint == here.fingerprint


def test_a_changed_byte_in_a_bucket_is_refused(url: str, tmp_path: Path) -> None:
    import s3fs

    path = f"{url.removeprefix('s3://')}/parts/00001.topk.zarr.zip"
    files = s3fs.S3FileSystem()
    files.pipe_file(path, files.cat_file(path)[:-1] + b"!")
    with pytest.raises(ArtifactError, match="digest differs"):
        lopd_store.open(url).part(1)
    with pytest.raises(ArtifactError, match="digest differs"):
        lopd_store.pull(url, output=tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


def test_a_bucket_that_is_not_there_or_not_ours_says_so(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    with pytest.raises(ArtifactError, match="is not an artifact"):
        lopd_store.open("s3://no-such-bucket/art")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(InputError, match="no access to"):
        lopd_store.open(url)
