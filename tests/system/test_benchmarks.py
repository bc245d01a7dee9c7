"""The benchmarks run; what they measure is in benchmarks/RESULTS.md."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_the_benchmark_of_the_format_fills_its_tables(tmp_path: Path) -> None:
    results = tmp_path / "RESULTS.md"
    command = [sys.executable, str(BENCHMARKS / "format.py"), "--small", "--results", str(results)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    for measured in ("size, sampled only", "KL of the rounding", "decode, ", "encode, ", "full pass beside", "verify"):
        assert measured in ran.stdout
    assert not results.exists()  # made-up data is no result
