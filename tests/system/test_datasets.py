"""The data sets of Hugging Face, over artifacts here and on the Hub."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import lopd_store
from lopd_store.errors import ArtifactError
from tests.artifacts import read_first_part, replace_part
from tests.hub.server import HubServer

pytestmark = pytest.mark.system


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache of its own, and no bars."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def test_every_rollout_is_a_row_with_ragged_columns(sealed: Path) -> None:
    artifact = lopd_store.open(sealed)
    rows = list(lopd_store.to_dataset(artifact))
    assert len(rows) == len(artifact)
    for number, row in enumerate(rows):
        rollout = artifact.rollout(number)
        np.testing.assert_array_equal(row["prompt_ids"], rollout.prompt_ids)
        np.testing.assert_array_equal(row["response_ids"], rollout.response_ids)
        np.testing.assert_array_equal(row["sampled_logprobs"], rollout.sampled_logprobs)
        assert rollout.topk is not None
        assert [len(ids) for ids in row["topk_ids"]] == rollout.topk.counts.tolist()
        np.testing.assert_array_equal(np.concatenate([[], *row["topk_ids"]]), rollout.topk.ids)
        np.testing.assert_array_equal(np.float32(np.concatenate([[], *row["topk_logprobs"]])), rollout.topk.logprobs)
        np.testing.assert_array_equal(row["tail_logprobs"], rollout.topk.tail_logprobs)


def test_entries_of_a_batch_are_counted_in_64_bits(sealed: Path) -> None:
    batch = next(iter(lopd_store.to_dataset(sealed).with_format("arrow").iter(batch_size=4)))
    for name, kind in (("topk_ids", pa.uint32()), ("topk_logprobs", pa.float32())):
        assert batch.schema.field(name).type.value_type == pa.large_list(kind)


def test_a_copy_without_top_k_has_no_columns_for_it(sealed: Path, tmp_path: Path) -> None:
    copy = lopd_store.subset(sealed, output=tmp_path / "copy", only="sampled", parts=range(1, 3))
    rows = lopd_store.to_dataset(copy.path)
    assert "topk_ids" not in (rows.features or {})
    assert len(list(rows)) == len(copy.rollouts)


def test_values_that_break_a_rule_are_refused(artifact: Path) -> None:
    replace_part(artifact, sampled_logprobs=read_first_part(artifact).sampled_logprobs - 1)  # honest digests
    with pytest.raises(ArtifactError, match="sampled log-prob and the entry"):
        next(iter(lopd_store.to_dataset(artifact)))


def test_rows_are_of_the_artifact_that_was_opened_though_its_branch_has_moved(
    hub: HubServer, sealed: Path, unknown: Path
) -> None:
    lopd_store.push(sealed, "acme/art")
    opened = lopd_store.open("hf://acme/art")
    lopd_store.push(unknown, "acme/art")
    with pytest.raises(ArtifactError, match="`hf://acme/art` holds another artifact"):
        next(iter(lopd_store.to_dataset(opened)))


def test_workers_of_torch_share_the_parts(sealed: Path) -> None:
    from torch.utils.data import DataLoader

    rows = lopd_store.to_dataset(sealed)
    assert rows.num_shards == len(lopd_store.open(sealed).manifest.parts)
    loader = DataLoader(rows, batch_size=None, num_workers=2)
    lengths = sorted(len(row["response_ids"]) for row in loader)
    assert lengths == sorted(len(row["response_ids"]) for row in rows)


def test_the_rollouts_table_loads_from_a_directory_and_from_the_hub(
    hub: HubServer, hub_env: dict[str, str], sealed: Path, tmp_path: Path
) -> None:
    lopd_store.push(sealed, "acme/art")
    lopd_store.pull("acme/art", output=tmp_path / "pulled")
    program = (
        "import datasets, json, sys\n"
        "rows = [datasets.load_dataset(place, split='train') for place in sys.argv[1:]]\n"
        "print(json.dumps([[len(found), found.column_names, found[0]['response']] for found in rows]))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, "acme/art", str(tmp_path / "pulled")],
        env=hub_env | {"HF_DATASETS_CACHE": str(tmp_path / "datasets")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    there, here = json.loads(ran.stdout.splitlines()[-1])
    assert there == here and there[0] == len(lopd_store.open(sealed)) and {"prompt", "response"} <= set(there[1])
