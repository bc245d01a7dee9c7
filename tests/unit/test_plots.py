"""Plots of a part: images that the stored values alone decide."""

from __future__ import annotations

import struct
from dataclasses import replace

import numpy as np
import pytest

from lopd_store.layout import ALL_PLOTS
from lopd_store.part import Part
from lopd_store.plots import LEAST_POSITIONS, draw
from lopd_store.topk import TopK

TOPK, ADVANTAGE, RESPONSES = ALL_PLOTS


def make_part(rollouts: int = 40, *, positions_each: int = 50) -> Part:
    """A part whose values have the right shapes and mean nothing."""
    generator = np.random.default_rng(0)
    positions = rollouts * positions_each
    counts = generator.integers(1, 9, positions).astype(np.uint16)
    topk = TopK(
        counts=counts,
        ids=np.zeros(int(counts.sum()), np.uint32),
        logprobs=np.full(int(counts.sum()), -3, np.float32),
        tail_logprobs=generator.uniform(-9, -1, positions).astype(np.float32),
    )
    return Part(
        rollout_offsets=np.arange(rollouts + 1) * (positions_each + 2),
        prompt_lengths=np.full(rollouts, 2, np.int32),
        token_ids=np.zeros(rollouts * (positions_each + 2), np.uint32),
        loss_mask=np.ones(positions, np.bool_),
        sampled_logprobs=-generator.exponential(1, positions).astype(np.float32),
        reference_logprobs=-generator.exponential(1, positions).astype(np.float32),
        topk=topk,
    )


def chunks(png: bytes) -> list[bytes]:
    """The types of a PNG's chunks."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    found, at = [], 8
    while at < len(png):
        (size,) = struct.unpack_from(">I", png, at)
        found.append(png[at + 4 : at + 8])
        at += size + 12
    return found


def test_every_plot_is_a_small_image_without_a_date() -> None:
    for image in draw(make_part()).values():
        assert set(chunks(image)) == {b"IHDR", b"pHYs", b"IDAT", b"IEND"}
        assert struct.unpack_from(">II", image, 16) == (480, 300) and len(image) < 50_000


def test_the_same_values_give_the_same_images_whatever_the_users_style(monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    images = draw(make_part())
    assert list(images) == list(ALL_PLOTS)
    monkeypatch.setitem(matplotlib.rcParams, "lines.linewidth", 9)
    monkeypatch.setitem(matplotlib.rcParams, "axes.facecolor", "black")
    assert draw(make_part()) == images
    assert matplotlib.rcParams["lines.linewidth"] == 9


def test_each_plot_shows_its_own_values() -> None:
    part = make_part()
    assert part.topk is not None and part.reference_logprobs is not None
    before = draw(part)
    for changed, name in (
        (replace(part, topk=replace(part.topk, tail_logprobs=part.topk.tail_logprobs - 1)), TOPK),
        (replace(part, reference_logprobs=part.reference_logprobs - 1), ADVANTAGE),
        (make_part(80, positions_each=25), RESPONSES),
    ):
        after = draw(changed)
        assert {other for other in ALL_PLOTS if after[other] != before[other]} == {name}


def test_what_a_part_lacks_is_not_plotted() -> None:
    assert list(draw(replace(make_part(), reference_logprobs=None))) == [TOPK, RESPONSES]
    assert list(draw(replace(make_part(), topk=None))) == [ADVANTAGE, RESPONSES]
    assert list(draw(replace(make_part(), loss_mask=np.zeros(2000, np.bool_)))) == [TOPK, RESPONSES]


def test_few_positions_make_no_plots() -> None:
    part = make_part(LEAST_POSITIONS // 50)
    assert len(draw(part)) == 3
    assert draw(part.slice(0, LEAST_POSITIONS // 50 - 1)) == {}


def test_what_the_models_hold_impossible_is_left_out() -> None:
    part = make_part()
    sampled = part.sampled_logprobs.copy()
    sampled[::3] = -np.inf
    assert len(draw(replace(part, sampled_logprobs=sampled, reference_logprobs=sampled))) == 3
