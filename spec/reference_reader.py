"""A second reader, written from artifact.md alone; it imports nothing of lopd.

    python spec/reference_reader.py DIR...      # artifacts, or folders of artifacts

It prints one line for each artifact or view, and ends with 1 where one does not read. It checks seal, digests and
what it relies on, and leaves the other rules to a verifier.
"""

import hashlib
import json
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from zarr.storage import ZipStore

warnings.filterwarnings("ignore", message="Numcodecs codecs are not in the Zarr version 3 specification")

UNREADABLE = (ArithmeticError, LookupError, OSError, RuntimeError, TypeError, ValueError, pa.ArrowException)
SUFFIXES = {"rollouts": "rollouts.parquet", "tokens": "tokens.zarr.zip", "topk": "topk.zarr.zip"}
PCODEC = [{"name": "numcodecs.pcodec", "configuration": {"level": 8}}]
FLAGS = [{"name": "bytes"}, {"name": "zstd", "configuration": {"level": 3, "checksum": False}}]
DTYPES = {"rollout_offsets": "int64", "prompt_lengths": "int32", "token_ids": "uint32", "loss_mask": "bool"}
DTYPES |= {"counts": "uint16", "id_table": "uint32", "ids": "uint32"}
FILLS = {"bool": False, "int32": -1, "int64": -1, "uint16": 65_535, "uint32": 0xFFFF_FFFF, "float32": "NaN"}


class Read(NamedTuple):
    """What a directory holds, decoded."""

    fingerprint: str
    manifest: dict[str, Any]
    kinds: list[str]  # of files that this copy has; all three where it is no view
    rollouts: list[dict[str, Any]]  # of the parts that it has


def read(directory: Path) -> Read:
    """The rollouts of an artifact or of a view of one, in order; raises ValueError and the like where it is none."""
    data = (directory / "manifest.json").read_bytes()
    manifest, fingerprint = loads(data), digest(data)
    require(manifest["format"] == "lopd" and manifest["version"].split(".")[0] == "1", "not of this format")
    content = {name: value for name, value in manifest.items() if name != "seal"}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    require(manifest["seal"] == digest(canonical.encode()), "changed after it was sealed")
    kinds, parts = list(SUFFIXES), [0, len(manifest["parts"])]
    if (directory / "view.json").exists():
        view = loads((directory / "view.json").read_bytes())
        require(view["format"] == "lopd-view" and view["fingerprint"] == fingerprint, "a view of something else")
        kinds, parts = view["kinds"], view["parts"]
    rollouts = []
    for number in range(*parts):
        part, files = manifest["parts"][number], {}
        for kind in kinds:
            files[kind] = directory / f"parts/{number:05d}.{SUFFIXES[kind]}"
            require(
                digest(files[kind].read_bytes()) == part["files"][kind]["sha256"], f"{files[kind].name} was damaged"
            )
        rollouts += read_part(files, part["counts"], manifest)
    return Read(fingerprint, manifest, kinds, rollouts)


def read_part(files: dict[str, Path], counts: dict[str, int], manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The rollouts of one part: ids, flags and log-probs per position, and the entries of its positions."""
    positions, grid = counts["positions"], manifest["encoding"]["grids"]["sampled_logprobs"]
    names = ["sampled_logprobs"] + ["reference_logprobs"] * manifest["reference_logprobs"]
    integers = {"rollout_offsets": counts["rollouts"] + 1, "prompt_lengths": counts["rollouts"]}
    integers |= {"token_ids": counts["tokens"], "loss_mask": positions}
    tokens = arrays(files["tokens"], integers, dict.fromkeys(names, positions), grid)
    starts, stops = tokens["rollout_offsets"][:-1], tokens["rollout_offsets"][1:]
    middles = starts + tokens["prompt_lengths"]
    ends = np.cumsum(np.concatenate([[0], stops - middles]))
    require(tokens["rollout_offsets"][0] == 0 and tokens["rollout_offsets"][-1] == counts["tokens"], "offsets")
    require(bool((starts < middles).all() and (middles <= stops).all()) and ends[-1] == positions, "prompts")
    rollouts: list[dict[str, Any]] = []
    for start, middle, stop, first, last in zip(starts, middles, stops, ends[:-1], ends[1:], strict=True):
        rollout = {"prompt_ids": tokens["token_ids"][start:middle], "response_ids": tokens["token_ids"][middle:stop]}
        rollouts.append(rollout | {name: tokens[name][first:last] for name in ["loss_mask", *names]})
    if "topk" in files:
        add_topk(rollouts, files["topk"], counts, manifest["encoding"])
    if "rollouts" in files:
        table = pq.read_table(files["rollouts"])
        text = {"prompt", "response"} if manifest["text"] else set()
        require({"prompt", "response"} & set(table.column_names) == text, "text is not as the manifest states")
        for rollout, row in zip(rollouts, table.to_pylist(), strict=True):
            lengths = (len(rollout["prompt_ids"]), len(rollout["response_ids"]))
            require((row["prompt_length"], row["response_length"]) == lengths, "the table does not fit the tokens")
            rollout["row"] = row
    return rollouts


def add_topk(rollouts: list[dict[str, Any]], path: Path, counts: dict[str, int], encoding: dict[str, Any]) -> None:
    """Give every rollout the entries of its positions, with ids instead of rows of the table."""
    positions, entries = counts["positions"], counts["entries"]
    logprobs = {"logprobs": entries, "tail_logprobs": positions}
    if encoding["selection"]["rule"] == "teacher+reference":
        logprobs |= {"reference_logprobs": entries, "reference_tail_logprobs": positions}
    integers = {"counts": positions, "id_table": None, "ids": entries}
    topk = arrays(path, integers, logprobs, encoding["grids"]["topk_logprobs"])
    table = np.concatenate([np.zeros(1, np.uint32), topk["id_table"]])
    ends = np.concatenate([[0], np.cumsum(topk["counts"], dtype=np.int64)])
    require(ends[-1] == entries, "`counts` do not add up")
    first = 0
    for rollout in rollouts:
        last = first + len(rollout["response_ids"])
        some, k = slice(ends[first], ends[last]), topk["counts"][first:last]
        rows = topk["ids"][some]
        rollout["topk"] = {"counts": k, "ids": np.where(rows == 0, np.repeat(rollout["response_ids"], k), table[rows])}
        rollout["topk"] |= {name: topk[name][slice(first, last) if "tail" in name else some] for name in logprobs}
        first = last


def decode(stored: Any, grid: Any) -> Any:
    """Log-probs of codes; without a grid they are stored as they are."""
    if grid is None:
        require(bool((stored <= 0).all()), "a log-prob is above 0, or no number")
        return stored
    starts, steps = np.array(grid).T
    bases = np.concatenate([[0], np.cumsum(np.diff(starts) / steps[:-1])])
    values = -np.max(starts + (stored[:, None] - bases) * steps, axis=1, initial=0)
    values[stored == 65_534] = -np.inf
    require(65_535 not in stored, "a fill value among the log-probs")
    return values.astype(np.float32)


def arrays(path: Path, integers: dict[str, Any], logprobs: dict[str, int], grid: Any) -> dict[str, Any]:
    """The arrays of a container, of these lengths; compared with what they may be before Zarr opens them."""
    with zipfile.ZipFile(path) as archive:
        members = set(archive.namelist())
        found = {name: loads(archive.read(name)) for name in members if name.endswith("zarr.json")}
    wanted: dict[str, Any] = {"zarr.json": {"zarr_format": 3, "node_type": "group", "attributes": {}}}
    chunks = set()
    for name, declared in {**integers, **logprobs}.items():
        dtype = DTYPES.get(name) or ("uint16" if grid else "float32")
        length = found[f"{name}/zarr.json"]["shape"][0] if declared is None else declared
        size = -(-length // max(1, -(-length // 2**18))) or 1
        wanted[f"{name}/zarr.json"] = {
            **{"zarr_format": 3, "node_type": "array", "shape": [length], "data_type": dtype},
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [size]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            **{"fill_value": FILLS[dtype], "codecs": FLAGS if dtype == "bool" else PCODEC},
            **{"attributes": {}, "storage_transformers": []},
        }
        chunks |= {f"{name}/c/{number}" for number in range(-(-length // size))}
    require(found == wanted, f"{path.name} has other arrays than the format says")
    require(members == chunks | wanted.keys(), f"{path.name} lacks a chunk, or has more")
    with ZipStore(path, mode="r") as store:
        values = {name: array[:] for name, array in zarr.open_group(store, mode="r", zarr_format=3).arrays()}
    return values | {name: decode(values[name], grid) for name in logprobs}


def loads(data: bytes) -> Any:
    """JSON without names that stand twice, NaN or infinity."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        require(len(dict(pairs)) == len(pairs), "a name stands twice in an object")
        return dict(pairs)

    return json.loads(data.decode(), object_pairs_hook=unique, parse_constant=lambda name: require(False, name))


def digest(data: bytes) -> str:
    """`sha256:` and 64 digits."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def require(claim: bool, what: str) -> None:
    """Refuse what does not hold."""
    if not claim:
        raise ValueError(what)


def main(names: list[str]) -> int:
    """One line for each artifact below the names; how many do not read."""
    failed = 0
    for name in names:
        for directory in sorted({path.parent for path in Path(name).rglob("manifest.json")}) or [Path(name)]:
            try:
                found = read(directory)
                positions = sum(len(rollout["response_ids"]) for rollout in found.rollouts)
                what = f"{len(found.rollouts)} rollouts, {positions} positions ({', '.join(found.kinds)})"
                print(f"{directory}: {found.fingerprint}, {what}")
            except (*UNREADABLE, zipfile.BadZipFile) as error:
                print(f"{directory}: does not read: {error!r}")
                failed += 1
    return failed


if __name__ == "__main__":
    sys.exit(1 if main(sys.argv[1:]) else 0)
