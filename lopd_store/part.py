"""One part as files: two Zarr stores in stored zips, and a Parquet table for people.

Bytes depend on the values alone: members in sorted order, no compression by the zip, fixed time stamps, every
codec and fill value spelled out. Reading checks names, codecs and declared sizes before Zarr opens anything.
"""

from __future__ import annotations

import io
import math
import warnings
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from zarr.buffer import cpu
from zarr.codecs import BytesCodec, ZstdCodec
from zarr.codecs.numcodecs import PCodec
from zarr.storage import MemoryStore

from lopd_store import strictjson
from lopd_store.encoding import Encoding, ids_to_ranks, ranks_to_ids, round_to_grid, round_topk
from lopd_store.errors import ArtifactError
from lopd_store.topk import TopK

# Zarr says at every open that PCodec is not in its specification; spec/artifact.md names it, so nobody is surprised.
warnings.filterwarnings("ignore", message="Numcodecs codecs are not in the Zarr version 3 specification")

CHUNK = 1 << 20  # values; the last chunk of an array may hold fewer
MAX_VALUES = 1 << 32  # in one array; declared sizes are checked against it before anything is allocated
MAX_ZIP_MEMBERS = 65_535
IMPOSSIBLE_ID = 0xFFFF_FFFF
_PCODEC_LEVEL = 8
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)

GROUP_METADATA = {"zarr_format": 3, "node_type": "group", "attributes": {}}
# name -> (dtype, fill value); but for flags, a fill value is never a legal value, so a lost chunk is always seen.
TOKENS_ARRAYS: dict[str, tuple[str, Any]] = {
    "rollout_offsets": ("int64", -1),
    "prompt_lengths": ("int32", -1),
    "token_ids": ("uint32", IMPOSSIBLE_ID),
    "loss_mask": ("bool", False),
    "sampled_logprobs": ("float32", "NaN"),
    "reference_logprobs": ("float32", "NaN"),
}
TOPK_ARRAYS: dict[str, tuple[str, Any]] = {
    "counts": ("uint16", 65_535),
    "id_table": ("uint32", IMPOSSIBLE_ID),
    "ids": ("uint32", IMPOSSIBLE_ID),
    "logprobs": ("float32", "NaN"),
    "tail_logprobs": ("float32", "NaN"),
}
OPTIONAL_ARRAYS = frozenset({"reference_logprobs"})


@dataclass(frozen=True, kw_only=True)
class Part:
    """A run of whole rollouts as flat arrays; the decoded form that training reads.

    Rollout i owns tokens [rollout_offsets[i], rollout_offsets[i + 1]), of which the first prompt_lengths[i] are its
    prompt; its positions are the other ones, in order. `topk` is None in a copy without top-k files.
    """

    rollout_offsets: npt.NDArray[np.int64]  # [rollouts + 1], into token_ids
    prompt_lengths: npt.NDArray[np.int32]  # [rollouts]
    token_ids: npt.NDArray[np.uint32]  # [tokens]
    loss_mask: npt.NDArray[np.bool_]  # [positions]
    sampled_logprobs: npt.NDArray[np.float32]  # [positions]
    reference_logprobs: npt.NDArray[np.float32] | None  # [positions]
    topk: TopK | None

    @cached_property
    def position_offsets(self) -> npt.NDArray[np.int64]:
        """Where each rollout's positions begin; [rollouts + 1]."""
        offsets = np.zeros(len(self.rollout_offsets), np.int64)
        np.cumsum(np.diff(self.rollout_offsets) - self.prompt_lengths, out=offsets[1:])
        return offsets

    @property
    def response_ids(self) -> npt.NDArray[np.uint32]:
        """The token at each position; [positions]."""
        return self.token_ids[response_mask(self.rollout_offsets, self.prompt_lengths)]


def response_mask(
    rollout_offsets: npt.NDArray[np.int64], prompt_lengths: npt.NDArray[np.int32]
) -> npt.NDArray[np.bool_]:
    """Which tokens are response tokens, that is, positions; [tokens]."""
    lengths = np.diff(rollout_offsets)
    within = np.arange(rollout_offsets[-1]) - np.repeat(rollout_offsets[:-1], lengths)
    mask: npt.NDArray[np.bool_] = within >= np.repeat(prompt_lengths, lengths)
    return mask


def round_part(part: Part, encoding: Encoding) -> Part:
    """The part as it will be stored: log-probs on the encoding's grids."""
    reference = part.reference_logprobs
    return Part(
        rollout_offsets=part.rollout_offsets,
        prompt_lengths=part.prompt_lengths,
        token_ids=part.token_ids,
        loss_mask=part.loss_mask,
        sampled_logprobs=round_to_grid(part.sampled_logprobs, encoding.sampled_step),
        reference_logprobs=None if reference is None else round_to_grid(reference, encoding.sampled_step),
        topk=None if part.topk is None else round_topk(part.topk, encoding.topk_step),
    )


def tokens_file(part: Part) -> bytes:
    """The bytes of NNNNN.tokens.zarr.zip."""
    arrays: dict[str, npt.NDArray[Any]] = {
        "rollout_offsets": part.rollout_offsets,
        "prompt_lengths": part.prompt_lengths,
        "token_ids": part.token_ids,
        "loss_mask": part.loss_mask,
        "sampled_logprobs": part.sampled_logprobs,
    }
    if part.reference_logprobs is not None:
        arrays["reference_logprobs"] = part.reference_logprobs
    return _write(arrays, TOKENS_ARRAYS)


def topk_file(topk: TopK) -> bytes:
    """The bytes of NNNNN.topk.zarr.zip."""
    table, ranks = ids_to_ranks(topk.ids)
    arrays: dict[str, npt.NDArray[Any]] = {
        "counts": topk.counts,
        "id_table": table,
        "ids": ranks,
        "logprobs": topk.logprobs,
        "tail_logprobs": topk.tail_logprobs,
    }
    return _write(arrays, TOPK_ARRAYS)


def rollouts_file(columns: dict[str, Any]) -> bytes:
    """The bytes of NNNNN.rollouts.parquet; one row per rollout, for people and viewers."""
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, compression="zstd", row_group_size=1024)
    return sink.getvalue()


def read_part(tokens: Path, topk: Path | None) -> Part:
    """Decode a part from its files; raises ArtifactError where they are not what the format allows."""
    arrays = read_arrays(tokens, TOKENS_ARRAYS)
    decoded = None
    if topk is not None:
        entries = read_arrays(topk, TOPK_ARRAYS)
        decoded = TopK(
            counts=entries["counts"],
            ids=ranks_to_ids(entries["id_table"], entries["ids"]),
            logprobs=entries["logprobs"],
            tail_logprobs=entries["tail_logprobs"],
        )
    return Part(
        rollout_offsets=arrays["rollout_offsets"],
        prompt_lengths=arrays["prompt_lengths"],
        token_ids=arrays["token_ids"],
        loss_mask=arrays["loss_mask"],
        sampled_logprobs=arrays["sampled_logprobs"],
        reference_logprobs=arrays.get("reference_logprobs"),
        topk=decoded,
    )


def read_arrays(path: Path, expected: dict[str, tuple[str, Any]]) -> dict[str, npt.NDArray[Any]]:
    """All arrays of one zip by name, exactly those that the format lists."""
    members = _read_members(path)
    names = _check_members(path.name, members, expected)
    store = MemoryStore({name: cpu.Buffer.from_bytes(data) for name, data in members.items()})
    try:
        group = zarr.open_group(store, mode="r", zarr_format=3, use_consolidated=False)
        return {name: np.asarray(group[name][:]) for name in names}  # type: ignore[index]
    except Exception as error:  # what a codec says of bytes that it did not write could be anything
        raise ArtifactError(f"`{path.name}` does not decode: {type(error).__name__}: {error}") from error


def _read_members(path: Path) -> dict[str, bytes]:
    """The members of a stored zip by name; only I/O errors are not an ArtifactError."""
    data = io.BytesIO(path.read_bytes())
    try:
        with zipfile.ZipFile(data) as archive:
            infos = archive.infolist()
            names = {info.filename for info in infos}
            if len(infos) > MAX_ZIP_MEMBERS or len(infos) != len(names):
                raise ArtifactError(f"`{path.name}` has too many members, or one of them twice")
            if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
                raise ArtifactError(f"`{path.name}` has compressed members", expected="stored members only")
            return {name: archive.read(name) for name in names}
    except (zipfile.BadZipFile, EOFError, ValueError, RuntimeError) as error:  # RuntimeError: encrypted, or unknown
        raise ArtifactError(f"`{path.name}` is not a whole zip: {error}") from error


def _check_members(file: str, members: dict[str, bytes], expected: dict[str, tuple[str, Any]]) -> set[str]:
    """The names of the arrays, after checking every member's name and every zarr.json against the format."""
    metadata = {
        name: strictjson.loads(data, where=f"{file}: {name}", max_bytes=1 << 16)
        for name, data in members.items()
        if name.endswith("zarr.json")
    }
    if metadata.get("zarr.json") != GROUP_METADATA:
        raise ArtifactError(f"`{file}`: `zarr.json` is not what the format says", expected=GROUP_METADATA)
    arrays = {name.removesuffix("/zarr.json") for name in metadata} - {"zarr.json"}
    if set(expected) - OPTIONAL_ARRAYS - arrays or arrays - set(expected):
        raise ArtifactError(
            f"`{file}` has other arrays than the format",
            expected=", ".join(expected),
            actual=", ".join(sorted(arrays)),
        )
    wanted = set(metadata)
    for name in arrays:
        length = _check_array(file, name, metadata[f"{name}/zarr.json"], *expected[name])
        wanted.update(f"{name}/c/{chunk}" for chunk in range(math.ceil(length / CHUNK)))
    if unlike := wanted ^ set(members):
        raise ArtifactError(f"`{file}` lacks a chunk or has a member too many", actual=f"`{min(unlike)}`")
    return arrays


def _check_array(file: str, name: str, metadata: Any, dtype: str, fill: Any) -> int:
    """The declared length, where the metadata is to the letter what this format writes for that length."""
    shape = metadata.get("shape") if isinstance(metadata, dict) else None
    length = shape[0] if isinstance(shape, list) and len(shape) == 1 else None
    if type(length) is not int or not 0 <= length <= MAX_VALUES:
        raise ArtifactError(f"`{file}`: the shape of `{name}` is not allowed", actual=repr(shape)[:100])
    wanted = array_metadata(length, dtype, fill)
    if metadata != wanted:
        member = next(member for member in {*wanted, *metadata} if metadata.get(member) != wanted.get(member))
        raise ArtifactError(
            f"`{file}`: `{member}` of the array `{name}` is not what the format says",
            expected=wanted.get(member),
            actual=repr(metadata.get(member))[:200],
        )
    return length


def array_metadata(length: int, dtype: str, fill: Any) -> dict[str, Any]:
    """The zarr.json of one array; it spells out everything that Zarr would otherwise choose by default."""
    pcodec = {"name": "numcodecs.pcodec", "configuration": {"level": _PCODEC_LEVEL}}
    zstd = {"name": "zstd", "configuration": {"level": 3, "checksum": False}}
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [length],
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [min(CHUNK, max(length, 1))]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": fill,
        "codecs": [{"name": "bytes"}, zstd] if dtype == "bool" else [pcodec],
        "attributes": {},
        "storage_transformers": [],
    }


def _write(arrays: dict[str, npt.NDArray[Any]], expected: dict[str, tuple[str, Any]]) -> bytes:
    """A Zarr v3 group in a zip with stored members; the bytes are a function of the values."""
    stored: dict[str, Any] = {}
    group = zarr.create_group(MemoryStore(stored), zarr_format=3)
    members = {"zarr.json": strictjson.canonical(GROUP_METADATA)}
    for name, values in arrays.items():
        dtype, fill = expected[name]
        metadata = array_metadata(len(values), dtype, fill)
        array = group.create_array(
            name,
            shape=values.shape,
            chunks=tuple(metadata["chunk_grid"]["configuration"]["chunk_shape"]),
            dtype=dtype,
            serializer=BytesCodec(endian=None) if dtype == "bool" else PCodec(level=_PCODEC_LEVEL),
            compressors=[ZstdCodec(level=3, checksum=False)] if dtype == "bool" else None,
            filters=None,
            fill_value=float("nan") if fill == "NaN" else fill,
            config={"write_empty_chunks": True},
        )
        array[:] = values
        members[f"{name}/zarr.json"] = strictjson.canonical(metadata)
    members |= {key: value.to_bytes() for key, value in stored.items() if not key.endswith("zarr.json")}
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(members):
            archive.writestr(zipfile.ZipInfo(name, _ZIP_TIME), members[name])
    return sink.getvalue()
