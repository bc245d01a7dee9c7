"""Artifacts made in an S3 bucket of a real server: killed midway, gone on with elsewhere, sealed once."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lopd_store
from lopd_store import layout
from lopd_store.remote import Remote
from tests.artifacts import random_pairs, save_rollouts
from tests.commands import command_line, run_process
from tests.s3 import make_bucket, s3_server

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a server."""
    with s3_server(tmp_path_factory.mktemp("s3")) as environment:
        yield environment


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
def s3_env(store: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of this process and of those that it starts, with an empty bucket `lopd`."""
    for name, value in store.items():
        monkeypatch.setenv(name, value)
    make_bucket("lopd")
    return {**os.environ}


@pytest.fixture
def bucket(s3_env: dict[str, str]) -> Any:
    """The server's files, as this process sees them."""
    import s3fs

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


def test_a_store_where_nobody_listens_is_unavailable(
    inputs: dict[str, Any], store: dict[str, str], tmp_path: Path
) -> None:
    env = {**os.environ, **store, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    ran = run_process("lopd-store", *build(inputs, "s3://lopd/nowhere"), env=env, cwd=tmp_path)
    assert ran.code == 3, ran.stderr
    assert ran.stderr.startswith("error: `s3://lopd/nowhere` did not answer as it should\n")
    assert "hint: " in ran.stderr and "Traceback" not in ran.stderr
