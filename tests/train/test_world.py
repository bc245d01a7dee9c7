from __future__ import annotations

import pytest

from lopd_store.errors import InputError
from lopd_train.batches import micro_batches
from lopd_train.world import ALONE, World, from_environment, joined, own_device
from tests.train.records import record


def test_a_process_alone_does_nothing_with_the_others() -> None:
    assert ALONE.is_first
    assert ALONE.gather({"loss": 2.5}) == [{"loss": 2.5}]


def test_what_torchrun_says_is_which_process_this_is_and_which_gpu_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_device("cuda") == "cuda"
    for name, value in {"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16"}.items():
        monkeypatch.setenv(name, value)
    assert from_environment() == World(rank=9, size=16)
    assert [own_device(device) for device in ("cuda", "cuda:0", "cpu")] == ["cuda:1", "cuda:0", "cpu"]


def test_a_gpu_that_is_not_there_is_refused_before_the_processes_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "99", "LOCAL_RANK": "99", "WORLD_SIZE": "100"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="the device `cuda:99` cannot be used"), joined("cuda"):
        pass


@pytest.mark.parametrize("share", [1, 2, 3, 8])
def test_micro_batches_can_be_dealt_out_evenly(share: int) -> None:
    records = [record([1], [2] * (5 + row % 7), row=row) for row in range(24)]
    cut = micro_batches(records, max_tokens=50, share=share)
    assert len(cut) % share == 0
    assert sorted(item.row for some in cut for item in some) == list(range(24))
    assert len(micro_batches(records[:2], max_tokens=50, share=8)) == 2  # one for each, and no more
