"""Keep some vectors as artifacts of a version that is about to be released.

    python -m tests.compat.freeze 1.0

What was kept is never written again; only a version that was not released yet may be removed and made anew.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import lopd_store
from tests.compat.test_released_versions import HERE, decoded

VECTORS = HERE.parents[1] / "spec" / "vectors" / "valid"
KEPT = [
    *("adaptive_k", "exact", "teacher_and_reference", "several_parts", "sampled_only_view", "redacted"),
    *("vocabulary_above_131072", "empty_response", "ties", "consistent_sft", "several_domains"),
]


def main(version: str) -> None:
    """Copy the vectors and write down what they decode to today."""
    directory = HERE / version
    directory.mkdir()
    expected = {}
    for name in KEPT:
        copy = Path(shutil.copytree(VECTORS / name, directory / name))
        artifact = lopd_store.open(copy)
        expected[name] = {"fingerprint": artifact.fingerprint, "arrays": decoded(artifact)}
    (directory / "expected.json").write_text(json.dumps(expected, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
