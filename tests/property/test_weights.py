"""The digests of weights: how they are saved changes nothing, what they are changes everything."""

from __future__ import annotations

import json
import math
import random
import struct
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lopd_store.weights import WeightsDigests, round_to_bfloat16, tensor_digests, weights_digests

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8, "U8": 1}


@dataclass(frozen=True)
class Tensor:
    """A tensor as safetensors stores it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


Weights = dict[str, Tensor]


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(sorted(ITEM_BYTES)))
    shape = tuple(draw(st.lists(st.integers(1, 4), max_size=3)))
    size = math.prod(shape) * ITEM_BYTES[dtype]
    return Tensor(dtype, shape, draw(st.binary(min_size=size, max_size=size)))


weights = st.dictionaries(st.text("abc.", min_size=1, max_size=6), tensors(), min_size=1, max_size=6)
seeds = st.integers(0, 2**32)


def save(path: Path, part: Weights, metadata: dict[str, str]) -> None:
    """A safetensors file of these tensors, in this order."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    start = 0
    for name, tensor in part.items():
        stop = start + len(tensor.data)
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, stop]}
        start = stop
    head = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + b"".join(tensor.data for tensor in part.values()))


def digests(model: Weights, seed: int | None = None) -> WeightsDigests:
    """The digests of weights saved in one file, or as `seed` has it: names, number and order of files and tensors."""
    source = random.Random(seed)
    names = list(model)
    if seed is not None:
        source.shuffle(names)
    files: dict[str, Weights] = {}
    for name in names:
        files.setdefault(f"{source.randrange(4) if seed is not None else 0:05d}", {})[name] = model[name]
    with tempfile.TemporaryDirectory() as directory:
        paths = [Path(directory) / f"{seed}-{stem}.safetensors" for stem in files]
        for path, part in zip(paths, files.values(), strict=True):
            save(path, part, {"format": "pt"} if source.random() < 0.5 else {})
        return weights_digests(tensor_digests(paths, cache=False))


@given(weights, seeds)
def test_other_shards_orders_and_file_names_keep_both_digests(model: Weights, seed: int) -> None:
    assert digests(model, seed) == digests(model)


@given(weights, seeds)
def test_any_changed_bit_changes_the_weights(model: Weights, seed: int) -> None:
    source = random.Random(seed)
    name = source.choice(list(model))
    data = bytearray(model[name].data)
    data[source.randrange(len(data))] ^= 1 << source.randrange(8)
    changed = model | {name: replace(model[name], data=bytes(data))}
    assert digests(changed, seed).weights != digests(model).weights


@given(weights, seeds)
def test_another_name_or_shape_or_one_tensor_less_changes_both(model: Weights, seed: int) -> None:
    before, name = digests(model), random.Random(seed).choice(list(model))
    rest = {other: tensor for other, tensor in model.items() if other != name}
    shape = (1, *model[name].shape)
    for changed in (rest | {name + "x": model[name]}, rest | {name: replace(model[name], shape=shape)}, rest):
        if changed:
            after = digests(changed)
            assert after.weights != before.weights and after.rounded != before.rounded


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=30), seeds)
def test_a_bfloat16_copy_is_told_apart_and_recognised(values: list[float], seed: int) -> None:
    exact = np.array(values, "<f4")
    model = {"a": Tensor("F32", (len(values),), exact.tobytes())}
    copy = {"a": Tensor("BF16", (len(values),), round_to_bfloat16(exact).tobytes())}
    one, other = digests(model, seed), digests(copy)
    assert one.weights != other.weights and one.rounded == other.rounded
