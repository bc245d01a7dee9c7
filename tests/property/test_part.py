"""Any part comes back from its files as it was, and equal parts have equal files."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings

from lopd_store.part import Part, read_part, response_mask, tokens_file, topk_file
from tests.property.distributions import parts


@settings(max_examples=25)
@given(parts())
def test_a_part_comes_back_from_its_files_bit_for_bit(part: Part) -> None:
    assert part.topk is not None
    with tempfile.TemporaryDirectory() as directory:
        tokens, topk = Path(directory, "tokens.zarr.zip"), Path(directory, "topk.zarr.zip")
        tokens.write_bytes(tokens_file(part))
        topk.write_bytes(topk_file(part.topk))
        read = read_part(tokens, topk)
    assert read.topk is not None
    for name in ("rollout_offsets", "prompt_lengths", "token_ids", "loss_mask", "sampled_logprobs"):
        assert_same_bits(getattr(read, name), getattr(part, name))
    for name in ("counts", "ids", "logprobs", "tail_logprobs"):
        assert_same_bits(getattr(read.topk, name), getattr(part.topk, name))
    assert (read.reference_logprobs is None) == (part.reference_logprobs is None)
    if part.reference_logprobs is not None and read.reference_logprobs is not None:
        assert_same_bits(read.reference_logprobs, part.reference_logprobs)


def assert_same_bits(found: np.ndarray, wanted: np.ndarray) -> None:
    assert found.dtype == wanted.dtype
    assert found.tobytes() == wanted.tobytes()


@settings(max_examples=10)
@given(parts())
def test_the_same_values_make_the_same_bytes(part: Part) -> None:
    assert part.topk is not None
    assert tokens_file(part) == tokens_file(part)
    assert topk_file(part.topk) == topk_file(part.topk)


@given(parts())
def test_positions_are_the_response_tokens_in_order(part: Part) -> None:
    wanted: list[int] = []
    for start, stop, prompt in zip(
        part.rollout_offsets[:-1], part.rollout_offsets[1:], part.prompt_lengths, strict=True
    ):
        wanted += part.token_ids[start + prompt : stop].tolist()
    assert part.response_ids.tolist() == wanted
    assert response_mask(part.rollout_offsets, part.prompt_lengths).sum() == part.position_offsets[-1] == len(wanted)
