"""The benchmarks run; what they measure is in benchmarks/RESULTS.md."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_the_benchmark_of_the_format_fills_its_tables(tmp_path: Path) -> None:
    results = tmp_path / "RESULTS.md"
    command = [sys.executable, str(BENCHMARKS / "format.py"), "--small", "--results", str(results)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    for measured in ("size, sampled only", "KL of the rounding", "decode, ", "encode, ", "full pass beside", "verify"):
        assert measured in ran.stdout
    assert not results.exists()  # made-up data is no result


@pytest.mark.system
@pytest.mark.parametrize(
    ("program", "measured"),
    [
        (
            "train.py",
            ("step of opd, sampled", "peak memory of opd, reverse_kl", "a bare loop", "chunked head", "outside"),
        ),
        ("live_opd.py", ("at the start", "offline", "live", "reverse KL")),
    ],
)
def test_the_benchmarks_of_training_fill_their_tables(program: str, measured: tuple[str, ...], tmp_path: Path) -> None:
    results = tmp_path / "RESULTS.md"
    command = [sys.executable, str(BENCHMARKS / program), "--small", "--results", str(results)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert ran.returncode == 0, ran.stderr
    assert all(name in ran.stdout for name in measured)
    assert not results.exists()


def test_the_benchmark_of_the_identity_fills_its_table(tmp_path: Path) -> None:
    results = tmp_path / "RESULTS.md"
    command = [sys.executable, str(BENCHMARKS / "identity.py"), "--small", "--results", str(results)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    for measured in ("digest, BF16, 1 core", "digest beside bare sha256, F32", "the second time"):
        assert measured in ran.stdout
    assert not results.exists()


@pytest.mark.system
def test_the_benchmark_of_the_hub_fills_its_table(tmp_path: Path) -> None:
    results = tmp_path / "RESULTS.md"
    command = [sys.executable, str(BENCHMARKS / "hub.py"), "--small", "--results", str(results)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    for measured in (
        "push at 1 Gbit/s beside the bare client",
        "push of what was not verified, at best",
        "pull beside the bare client",
        "requests of a push",
        "bytes to inspect",
    ):
        assert measured in ran.stdout
    assert not results.exists()


@pytest.mark.system
def test_the_benchmark_of_the_build_fills_its_table(tmp_path: Path) -> None:
    results = tmp_path / "RESULTS.md"
    command = [sys.executable, str(BENCHMARKS / "build.py"), "--small", "--results", str(results)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert ran.returncode == 0, ran.stderr
    for measured in ("bare forward pass", "after the teacher", "peak memory, engine", "scores of", "two workers"):
        assert measured in ran.stdout
    assert not results.exists()


@pytest.mark.system
@pytest.mark.skipif("PEER_PYTHON" not in os.environ, reason="PEER_PYTHON and DISTILLKIT name no peer")
def test_the_benchmark_of_the_peers_fills_its_tables(tmp_path: Path) -> None:
    results = tmp_path / "RESULTS.md"
    peer = ["--distillkit", os.environ["DISTILLKIT"], "--python", os.environ["PEER_PYTHON"]]
    command = [sys.executable, str(BENCHMARKS / "peers.py"), *peer, "--small", "--results", str(results)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert ran.returncode == 0, ran.stderr
    for measured in ("tokens/s beside DistillKit", "peak memory beside", "first loss, nat"):
        assert measured in ran.stdout
    assert not results.exists()
