"""Any part comes back from its files as it was, and equal parts have equal files."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings

from lopd_store.encoding import Encoding, round_logprobs
from lopd_store.part import Part, read_part, response_mask, round_part, tokens_file, topk_file
from tests.property.distributions import parts


@settings(max_examples=40)
@given(parts())
def test_a_rounded_part_comes_back_from_its_files_bit_for_bit(some: tuple[Part, Encoding]) -> None:
    part, encoding = round_part(*some), some[1]
    read = read_part(tokens_file(part, encoding), topk_file(part, encoding), encoding, part.counts, where="00000")
    assert part.topk is not None and read.topk is not None
    for wanted, found in ((part, read), (part.topk, read.topk)):
        stored = {name: values for name, values in vars(wanted).items() if isinstance(values, np.ndarray)}
        assert {name for name, values in vars(found).items() if values is not None} >= stored.keys()
        for name, values in stored.items():
            assert (getattr(found, name).dtype, getattr(found, name).tobytes()) == (values.dtype, values.tobytes())
    assert (read.reference_logprobs is None) == (part.reference_logprobs is None)
    assert (read.topk.reference_logprobs is None) == (part.topk.reference_logprobs is None)


@settings(max_examples=10)
@given(parts())
def test_the_same_values_make_the_same_bytes(some: tuple[Part, Encoding]) -> None:
    part, encoding = round_part(*some), some[1]
    assert tokens_file(part, encoding) == tokens_file(part, encoding)
    assert topk_file(part, encoding) == topk_file(part, encoding)


@given(parts())
def test_rounding_a_part_touches_logprobs_alone(some: tuple[Part, Encoding]) -> None:
    part, encoding = some
    rounded = round_part(part, encoding)
    for name in ("rollout_offsets", "prompt_lengths", "token_ids", "loss_mask"):
        np.testing.assert_array_equal(getattr(rounded, name), getattr(part, name))
    wanted = round_logprobs(part.sampled_logprobs, encoding.sampled_grid)
    np.testing.assert_array_equal(rounded.sampled_logprobs, wanted)


@given(parts())
def test_positions_are_the_response_tokens_in_order(some: tuple[Part, Encoding]) -> None:
    part, _ = some
    wanted: list[int] = []
    for start, stop, prompt in zip(
        part.rollout_offsets[:-1], part.rollout_offsets[1:], part.prompt_lengths, strict=True
    ):
        wanted += part.token_ids[start + prompt : stop].tolist()
    assert part.response_ids.tolist() == wanted
    assert response_mask(part.rollout_offsets, part.prompt_lengths).sum() == part.position_offsets[-1] == len(wanted)


@given(parts())
def test_slices_of_a_part_put_together_are_the_part(some: tuple[Part, Encoding]) -> None:
    part, _ = some
    ones = [part.slice(index, index + 1) for index in range(len(part.prompt_lengths))]
    assert all(one.rollout_offsets.tolist() == [0, len(one.token_ids)] for one in ones)
    for name in ("prompt_lengths", "token_ids", "loss_mask", "sampled_logprobs"):
        pieces = [getattr(part, name)[:0], *(getattr(one, name) for one in ones)]
        np.testing.assert_array_equal(np.concatenate(pieces), getattr(part, name))
    assert part.topk is not None
    found = [one.topk.ids.tolist() for one in ones if one.topk is not None]
    assert [id for ids in found for id in ids] == part.topk.ids.tolist()
