"""DistillKit's compressed distributions, in the one of its configurations that loses nothing of a float32.

Row i of a rollout is the distribution after token i. DistillKit wants one for every token but the last, with k entries:
rows of the prompt hold none, and the column `labels`, which its trainer masks rows by, is -100 there.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import yaml

from lopd_store.interop.target import (
    IGNORED,
    NOTHING,
    Target,
    fixed_k,
    fixed_rows,
    lists,
    nested,
    require_topk,
    rows_of,
)
from lopd_store.part import Part, response_mask
from lopd_store.reader import Artifact

CONFIG = "compression_config.yaml"
_BYTES = pa.list_(pa.list_(pa.uint8()))
SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.uint64())),
        ("labels", pa.list_(pa.int64())),
        ("compressed_logprobs", _BYTES),
        ("bytepacked_indices", _BYTES),
    ]
)


def target(artifact: Artifact, k: int | None) -> Target:
    """The columns, and the configuration that decodes them."""
    require_topk(artifact)
    k = fixed_k(artifact, k)
    vocab_size = artifact.manifest.inputs[0].teacher.vocab_size
    config = {
        "d": vocab_size,
        "k": k,
        "exact_k": k,
        "exact_dtype": "float32",
        "polynomial_terms": [],
        "term_dtype": "float32",
        "residual_bins": [],
        "delta_encoding": False,
        "error_diffusion": False,
        "normalize_t": False,
    }
    return Target(
        schema=SCHEMA,
        columns=partial(_columns, k, bits_of(vocab_size)),
        bytes_per_token=80 * k,
        files={CONFIG: yaml.safe_dump(config, sort_keys=False).encode()},
        settings={"k": k},
    )


def bits_of(vocab_size: int) -> int:
    """Bits of a packed id: ceil(log2(vocab_size))."""
    return (vocab_size - 1).bit_length()


def pack_ids(ids: npt.NDArray[np.uint32], bits: int) -> npt.NDArray[np.uint8]:
    """Each row's ids one after the other, most significant bit first, zeros up to a whole byte; [rows, bytes]."""
    each = np.unpackbits(ids.astype(">u4").view(np.uint8).reshape(*ids.shape, 4), axis=-1)[..., 32 - bits :]
    return np.packbits(each.reshape(len(ids), -1), axis=1)


def _columns(k: int, bits: int, part: Part) -> list[pa.Array]:
    assert part.topk is not None
    targets = np.flatnonzero(response_mask(part.rollout_offsets, part.prompt_lengths))
    rollouts = np.repeat(np.arange(len(part.prompt_lengths)), np.diff(part.position_offsets))
    offsets = part.rollout_offsets - np.arange(len(part.rollout_offsets))  # a row less than tokens
    ids, logprobs, _ = fixed_rows(part.topk, k)
    packed = np.tile(pack_ids(np.arange(k, dtype=np.uint32)[None], bits), (int(offsets[-1]), 1))
    values = np.tile(_little_endian(np.full((1, k), NOTHING, np.float32)), (int(offsets[-1]), 1))
    rows = targets - 1 - rollouts
    packed[rows], values[rows] = pack_ids(ids, bits), _little_endian(logprobs)
    labels = np.full(len(part.token_ids), IGNORED, np.int64)
    counted = targets[part.loss_mask] - 1
    labels[counted] = part.token_ids[counted]
    return [
        lists(part.token_ids.astype(np.uint64), part.rollout_offsets),
        lists(labels, part.rollout_offsets),
        nested(rows_of(values), offsets),
        nested(rows_of(packed), offsets),
    ]


def _little_endian(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    return values.astype("<f4").view(np.uint8)
