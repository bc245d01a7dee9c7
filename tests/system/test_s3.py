"""An object store: a real S3 server on loopback, and the same code as for any other URL of fsspec."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import lopd_store
from lopd_store.errors import ArtifactError, InputError
from tests.commands import run_command

pytestmark = pytest.mark.system
KEY, SECRET = "the-key", "the-secret-of-the-store"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of SeaweedFS."""
    home = tmp_path_factory.mktemp("s3")
    config = home / "s3.json"
    rights = ["Admin", "Read", "Write", "List"]
    identity = {"name": "lab", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": rights}
    config.write_text(json.dumps({"identities": [identity]}))
    ports = free_ports(7)
    names = ("-s3.port", "-master.port", "-volume.port", "-filer.port")
    flags = [f"{name}={port}" for name, port in zip(names, ports, strict=False)]
    grpc = ("-s3.port.grpc", "-master.port.grpc", "-filer.port.grpc")
    flags += [f"{name}={port}" for name, port in zip(grpc, ports[4:], strict=True)]
    program = Path(sys.executable).with_name("weed")
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                *(str(program), "server", f"-dir={home}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3"),
                *(f"-s3.config={config}", "-volume.max=10", "-master.volumeSizeLimitMB=64"),
                *("-s3.port.iceberg=0", "-s3.port.lance=0", *flags),
            ],
            stdout=log,
            stderr=log,
        )
    try:
        endpoint = f"http://127.0.0.1:{ports[0]}"
        wait_for(ports[0], process)
        yield endpoint
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def url(store: str, sealed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where a copy of the artifact lies; the environment has the credentials, as for any tool of S3."""
    import s3fs

    for name, value in {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": store,
        "AWS_DEFAULT_REGION": "us-east-1",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    files = s3fs.S3FileSystem()
    deadline = time.monotonic() + 60
    while not files.exists("lab"):
        with contextlib.suppress(OSError):  # it listens before it can
            files.mkdir("lab")
        assert time.monotonic() < deadline
        time.sleep(0.2)
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


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below those that the kernel gives away."""
    found: list[int] = []
    for port in range(20_000 + os.getpid() % 5_000, 32_000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                found.append(port)
        if len(found) == count:
            return found
    raise AssertionError


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while True:
        with socket.socket() as probe:
            if not probe.connect_ex(("127.0.0.1", port)):
                return
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
