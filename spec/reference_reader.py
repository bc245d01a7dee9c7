"""A second reader, written from artifact.md alone; it imports nothing of lopd.

    python spec/reference_reader.py ARTIFACT...

It checks digests and decodes every part with plain zarr and pyarrow, and shows how little a reader needs.
"""

import hashlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import zarr
from zarr.storage import ZipStore

warnings.filterwarnings("ignore", message="Numcodecs codecs are not in the Zarr version 3 specification")


def read(artifact: Path) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
    """Fingerprint, manifest and the rollouts of an artifact, in order."""
    data = (artifact / "manifest.json").read_bytes()
    manifest = json.loads(data)
    assert manifest["format"] == "lopd" and manifest["version"].split(".")[0] == "1"
    rollouts: list[dict[str, Any]] = []
    for number, part in enumerate(manifest["parts"]):
        for kind, file in part["files"].items():
            name = "rollouts.parquet" if kind == "rollouts" else f"{kind}.zarr.zip"
            assert file["path"] == f"parts/{number:05d}.{name}", file["path"]
            assert digest((artifact / file["path"]).read_bytes()) == file["sha256"], file["path"]
        paths = {kind: artifact / file["path"] for kind, file in part["files"].items()}
        rollouts += read_part(
            arrays(paths["tokens"]), arrays(paths["topk"]), pq.read_table(paths["rollouts"]).to_pylist()
        )
    assert len(rollouts) == manifest["counts"]["rollouts"]
    return digest(data), manifest, rollouts


def read_part(tokens: dict[str, Any], topk: dict[str, Any], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rollouts of one part: ids, flags and log-probs per position, and the entries of each position."""
    ids = topk["id_table"][topk["ids"]]  # section 5: `ids` are rows of `id_table`
    ends = np.cumsum(topk["counts"], dtype=np.int64)
    rollouts, position = [], 0
    for index, row in enumerate(rows):
        start, stop = tokens["rollout_offsets"][index : index + 2]
        middle = start + tokens["prompt_lengths"][index]
        assert (row["prompt_length"], row["response_length"]) == (middle - start, stop - middle)
        here = slice(position, position + int(stop - middle))
        entries = [slice(end - count, end) for count, end in zip(topk["counts"][here], ends[here], strict=True)]
        rollouts.append(
            {
                "prompt_ids": tokens["token_ids"][start:middle],
                "response_ids": tokens["token_ids"][middle:stop],
                **{name: tokens[name][here] for name in ("loss_mask", "sampled_logprobs")},
                "reference_logprobs": tokens["reference_logprobs"][here] if "reference_logprobs" in tokens else None,
                "topk": [(ids[entry], topk["logprobs"][entry]) for entry in entries],
                "tail_logprobs": topk["tail_logprobs"][here],
            }
        )
        position = here.stop
    return rollouts


def arrays(path: Path) -> dict[str, Any]:
    """Every array of a zip, by name."""
    with ZipStore(path, mode="r") as store:
        return {name: array[:] for name, array in zarr.open_group(store, mode="r", zarr_format=3).arrays()}


def digest(data: bytes) -> str:
    """Section 2."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


if __name__ == "__main__":
    for name in sys.argv[1:]:
        fingerprint, manifest, rollouts = read(Path(name))
        positions = sum(len(rollout["response_ids"]) for rollout in rollouts)
        print(f"{name}: {fingerprint}, {len(rollouts)} rollouts, {positions} positions")
