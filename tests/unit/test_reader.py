"""Opening artifacts, and what is in the way of it."""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import lopd_store
from lopd_store import layout
from lopd_store.errors import ArtifactError, InputError
from lopd_store.part import Part
from lopd_store.subset import write_view
from tests.artifacts import read_first_part, replace_arrays, replace_part
from tests.unit.conftest import LENGTHS


def test_every_rollout_is_found_in_any_order(sealed: Path) -> None:
    artifact = lopd_store.open(sealed)
    for index in (5, 0, 3, 2, 4, 1, 0):
        found = artifact.rollout(index)
        assert (len(found.prompt_ids), len(found.response_ids)) == LENGTHS[index]
        assert found.topk is not None and len(found.topk.counts) == LENGTHS[index][1]


def test_the_rows_of_a_rollout_are_those_of_its_part(sealed: Path) -> None:
    artifact = lopd_store.open(sealed)
    whole = np.concatenate([part.sampled_logprobs for part in artifact.parts()])
    pieces = np.concatenate([artifact.rollout(index).sampled_logprobs for index in range(len(artifact))])
    np.testing.assert_array_equal(pieces, whole)


@pytest.mark.parametrize("index", [-1, 6])
def test_a_rollout_that_is_not_there_is_refused_with_the_range(sealed: Path, index: int) -> None:
    with pytest.raises(InputError, match=f"there is no rollout {index}\n  expected  0 to 5"):
        lopd_store.open(sealed).rollout(index)


def test_parts_may_be_left_halfway(sealed: Path) -> None:
    parts = lopd_store.open(sealed).parts()
    assert len(next(parts).prompt_lengths) == 2
    parts.close()  # type: ignore[attr-defined]


def test_a_copy_without_topk_files_still_has_its_sampled_logprobs(sealed: Path, tmp_path: Path) -> None:
    found = lopd_store.subset(sealed, output=tmp_path / "sampled", only="sampled").rollout(0)
    assert found.topk is None and len(found.sampled_logprobs) == 9


def test_rollouts_of_one_part_decode_it_once(sealed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact, decoded = lopd_store.open(sealed), list[int]()
    part = artifact.part

    def count(number: int) -> Part:
        decoded.append(number)
        return part(number)

    monkeypatch.setattr(artifact, "part", count)
    for index in (0, 1, 0, 2, 4, 3, 5):
        artifact.rollout(index)
    assert decoded == [0, 1, 2, 3]


# Parts


@pytest.mark.parametrize("ahead", [0, 1, 2, 9])
def test_parts_come_in_order_however_many_are_decoded_ahead(sealed: Path, ahead: int) -> None:
    artifact = lopd_store.open(sealed)
    found = [part.token_ids.tolist() for part in artifact.parts(ahead=ahead)]
    assert found == [artifact.part(number).token_ids.tolist() for number in range(4)]


def test_the_next_part_is_decoded_while_this_one_is_used(sealed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact, decoded = lopd_store.open(sealed), {number: threading.Event() for number in range(4)}
    part = artifact.part

    def announce(number: int, **options: bool) -> Part:
        assert threading.current_thread() is not threading.main_thread()
        found = part(number, **options)
        decoded[number].set()
        return found

    monkeypatch.setattr(artifact, "part", announce)
    parts = artifact.parts()
    next(parts)
    assert decoded[1].wait(timeout=60) and not decoded[3].is_set()
    assert len(list(parts)) == 3


def test_an_error_in_the_background_comes_where_its_part_would_have(artifact: Path) -> None:
    (artifact / layout.part_file(2, layout.TOPK)).unlink()
    parts = lopd_store.open(artifact).parts()
    assert len(next(parts).prompt_lengths) == 2 and len(next(parts).prompt_lengths) == 1
    with pytest.raises(ArtifactError, match=r"00002\.topk\.zarr\.zip` is missing"):
        next(parts)


# Batches


@pytest.mark.parametrize("positions", [1, 9, 10, 14, 20, 1000])
def test_a_batch_is_whole_rollouts_of_at_most_so_many_positions(sealed: Path, positions: int) -> None:
    batches = list(lopd_store.open(sealed).batches(positions))
    lengths = [
        (prompt, tokens - prompt)
        for batch in batches
        for prompt, tokens in zip(batch.prompt_lengths.tolist(), np.diff(batch.rollout_offsets).tolist(), strict=True)
    ]
    assert lengths == LENGTHS
    assert all(batch.counts.positions <= positions or len(batch.prompt_lengths) == 1 for batch in batches)
    assert all(int(batch.rollout_offsets[0]) == 0 for batch in batches)


def test_a_batch_takes_as_many_rollouts_of_its_part_as_fit(sealed: Path) -> None:
    def sizes(positions: int) -> list[int]:
        return [len(batch.prompt_lengths) for batch in lopd_store.open(sealed).batches(positions)]

    assert sizes(1000) == [2, 1, 2, 1]  # the parts
    assert sizes(10) == [2, 1, 1, 1, 1]  # 9 + 1 positions, 20, 0, 14, 6
    assert sizes(9) == [1, 1, 1, 1, 1, 1]


def test_the_rows_of_the_batches_are_those_of_the_parts(sealed: Path) -> None:
    artifact = lopd_store.open(sealed)
    for name in ("token_ids", "loss_mask", "sampled_logprobs", "reference_logprobs"):
        whole = np.concatenate([getattr(part, name) for part in artifact.parts()])
        np.testing.assert_array_equal(np.concatenate([getattr(batch, name) for batch in artifact.batches(7)]), whole)
    entries = [part.topk.ids for part in artifact.parts() if part.topk is not None]
    found = [batch.topk.ids for batch in artifact.batches(7) if batch.topk is not None]
    np.testing.assert_array_equal(np.concatenate(found), np.concatenate(entries))


def test_the_entries_of_a_batch_lie_where_its_own_offsets_say(sealed: Path) -> None:
    artifact = lopd_store.open(sealed)
    second = list(artifact.batches(9))[1]
    assert second.topk is not None and second.topk.offsets[0] == 0
    stored = artifact.rollout(1).topk
    assert stored is not None
    np.testing.assert_array_equal(second.topk.logprobs[: second.topk.offsets[1]], stored.logprobs)


def test_batches_are_views_and_so_are_their_tensors(sealed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = lopd_store.open(sealed)
    part = artifact.part(0)
    monkeypatch.setattr(artifact, "parts", lambda **_: iter([part]))
    for batch in artifact.batches(9):
        assert part.topk is not None and batch.topk is not None
        for name in ("token_ids", "loss_mask", "sampled_logprobs", "reference_logprobs"):
            assert np.shares_memory(getattr(batch, name), getattr(part, name)), name
        for name in ("counts", "ids", "logprobs", "tail_logprobs"):
            assert np.shares_memory(getattr(batch.topk, name), getattr(part.topk, name)), name
        tensor = torch.from_numpy(batch.sampled_logprobs)
        assert tensor.data_ptr() == batch.sampled_logprobs.__array_interface__["data"][0]
        before = float(tensor[0])
        tensor[0] = -99
        assert batch.sampled_logprobs[0] == -99
        tensor[0] = before


# What is in the way


@pytest.mark.parametrize("kind", [layout.TOKENS, layout.TOPK])
def test_a_damaged_byte_is_noticed_when_its_part_is_read(artifact: Path, kind: str) -> None:
    path = artifact / layout.part_file(1, kind)
    data = path.read_bytes()
    for at in np.random.default_rng(0).integers(0, len(data), 20).tolist():
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        opened = lopd_store.open(artifact)
        with pytest.raises(ArtifactError, match=rf"00001\.{kind}\.zarr\.zip` was damaged\n\nhint: lopd-store verify"):
            opened.part(1)
        opened.part(0)


@pytest.mark.parametrize("size", [-1, 1])
def test_a_file_of_another_size_is_noticed_when_its_part_is_read(artifact: Path, size: int) -> None:
    path = artifact / layout.part_file(1, layout.TOKENS)
    data = path.read_bytes()
    path.write_bytes(data[:-1] if size < 0 else data + b"x")
    with pytest.raises(ArtifactError, match="was damaged"):
        lopd_store.open(artifact).part(1)


def test_values_that_break_a_rule_are_noticed_by_whoever_asks_for_it(artifact: Path) -> None:
    part = read_first_part(artifact)
    replace_part(artifact, sampled_logprobs=part.sampled_logprobs - 1)
    opened = lopd_store.open(artifact)
    (found,) = lopd_store.verify(artifact).findings
    with pytest.raises(ArtifactError) as refused:
        opened.part(0, check=True)
    assert (refused.value.code, refused.value.message) == (found.code, found.to_error().message)
    assert refused.value.hint == f"this is what `{artifact}` holds: ask whoever made it"
    assert opened.part(1, check=True).topk is not None
    assert len(opened.part(0).sampled_logprobs) == len(part.sampled_logprobs)
    for read in (opened.parts, partial(opened.batches, 5)):
        assert next(read()).topk is not None
        with pytest.raises(ArtifactError, match="sampled log-prob and the entry"):
            next(read(check=True))


def test_a_copy_without_topk_has_its_values_checked_too(artifact: Path, tmp_path: Path) -> None:
    replace_arrays(artifact, layout.TOKENS, prompt_lengths=np.zeros(2, np.int32))
    (artifact / layout.part_file(0, layout.TOPK)).unlink()
    opened = lopd_store.open(artifact)
    view = replace(opened.view, kinds=(layout.TOKENS,))
    write_view(artifact, view, opened.fingerprint)
    with pytest.raises(ArtifactError, match="the prompt does not fit"):
        lopd_store.open(artifact).part(0, check=True)


def test_a_link_is_not_followed(artifact: Path, tmp_path: Path) -> None:
    path = artifact / layout.part_file(1, layout.TOKENS)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="is missing or not a plain file"):
        lopd_store.open(artifact).part(1)


def test_a_missing_part_says_how_to_check_the_artifact(artifact: Path) -> None:
    (artifact / layout.part_file(1, layout.TOKENS)).unlink()
    with pytest.raises(
        ArtifactError, match=r"00001\.tokens\.zarr\.zip` is missing or not a plain file\n\nhint: lopd-store"
    ):
        lopd_store.open(artifact).part(1)


def test_a_build_in_progress_is_no_artifact(artifact: Path) -> None:
    building = artifact.rename(layout.building_directory(artifact))
    (building / layout.MANIFEST).unlink()
    for path in (artifact, building):
        with pytest.raises(InputError, match=r"is still being built(?s:.)*hint: run the same `lopd-store build` again"):
            lopd_store.open(path)


@pytest.mark.parametrize("name", ["", "nowhere"])
def test_where_there_is_no_artifact_there_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"no artifact at `.*`\n  expected  a directory with `manifest\.json`"):
        lopd_store.open(tmp_path / name)


def test_a_damaged_manifest_is_refused_with_its_path(artifact: Path) -> None:
    (artifact / layout.MANIFEST).write_bytes(b"{")
    with pytest.raises(ArtifactError, match=rf"`{artifact}/manifest\.json` is not valid JSON"):
        lopd_store.open(artifact)


def test_an_attribute_that_is_not_there_is_said_so() -> None:
    with pytest.raises(AttributeError, match="module `lopd_store` has no attribute `nothing`"):
        lopd_store.nothing  # noqa: B018
