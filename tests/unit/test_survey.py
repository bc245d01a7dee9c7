"""Rollouts that cannot be scored: found before scoring, named by their row, and left out where that is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

import lopd_store
from lopd_store import layout, survey
from lopd_store.building import SKIPPED
from lopd_store.errors import DataError
from lopd_store.rollouts import ROWS_PER_GROUP, RolloutsFile
from lopd_store.survey import Limits, check_rollout
from tests.tiny import save_tiny_model, tiny_tokenizer

LIMITS = Limits(vocab_size=300, context_length=20, positions=12)
GOOD: dict[str, Any] = {"prompt_ids": [1, 2], "response_ids": [3], "loss_mask": [True], "logprobs": [-0.5]}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({"prompt_ids": []}, "has no prompt"),
    "null prompt": ({"prompt_ids": None}, "`prompt_ids` are not token ids (null)"),
    "null response": ({"response_ids": None}, "`response_ids` are not token ids (null)"),
    "null id": ({"prompt_ids": [1, None]}, "`prompt_ids` are not token ids (float64)"),
    "negative": ({"prompt_ids": [-1]}, "`prompt_ids` are not token ids (from -1 to -1)"),
    "unknown id": ({"response_ids": [300]}, "has an id that the teacher's tokenizer does not know (300)"),
    "too long": ({"prompt_ids": [1] * 20}, "is longer than the teacher's context (20 prompt + 1 response tokens)"),
    "many positions": (
        {"response_ids": [1] * 13, "loss_mask": None, "logprobs": None},
        "has too many positions for this `k_max` (13)",
    ),
    "mask": ({"loss_mask": [True, True]}, "`loss_mask` does not fit the response (2 values)"),
    "null flag": ({"loss_mask": [None]}, "a flag of `loss_mask` is null"),
    "log-probs": ({"logprobs": []}, "`logprobs` does not fit the response (0 values)"),
    "above 0": ({"logprobs": [0.5]}, "a log-prob is not a number <= 0 (0.5)"),
    "no number": ({"logprobs": [float("nan")]}, "a log-prob is not a number <= 0 (nan)"),
}
SCHEMA = pa.schema(
    {
        "prompt_ids": pa.list_(pa.int64()),
        "response_ids": pa.list_(pa.int64()),
        "loss_mask": pa.list_(pa.bool_()),
        "logprobs": pa.list_(pa.float32()),
    }
)


def save(path: Path, rows: list[dict[str, Any]]) -> RolloutsFile:
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path)
    return RolloutsFile(path)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_rollout_is_named_by_its_row_or_listed(tmp_path: Path, name: str) -> None:
    changes, why = BAD[name]
    file = save(tmp_path / "r.parquet", [GOOD, GOOD, GOOD | changes, GOOD])
    with pytest.raises(DataError, match=r"(rollout|row) 2(?s:.)*--on-bad-rollout skip"):
        survey.survey(file, LIMITS)
    found = survey.survey(file, LIMITS, on_bad="skip")
    assert [(bad.row, bad.why) for bad in found.bad] == [(2, why)]
    assert found.prompt_lengths.tolist() == [2, 2, 0, 2] and found.response_lengths.tolist() == [1, 1, 0, 1]


def test_what_may_lack_is_not_bad(tmp_path: Path) -> None:
    rows = [GOOD | {"loss_mask": None, "logprobs": None}, GOOD | {"response_ids": [], "loss_mask": [], "logprobs": []}]
    found = survey.survey(save(tmp_path / "r.parquet", rows), LIMITS)
    assert not found.bad and not found.has_logprobs


def test_log_probs_that_only_a_bad_rollout_lacks_are_there(tmp_path: Path) -> None:
    rows = [GOOD, GOOD | {"prompt_ids": [], "logprobs": None}]
    assert survey.survey(save(tmp_path / "r.parquet", rows), LIMITS, on_bad="skip").has_logprobs


def test_the_screen_finds_every_row_that_the_check_of_one_row_refuses(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    changes = [{}, {}, {}, *(change for change, _ in BAD.values())]
    rows = [GOOD | changes[pick] for pick in generator.integers(0, len(changes), 2 * ROWS_PER_GROUP + 7)]
    file = save(tmp_path / "r.parquet", rows)
    found = survey.survey(file, LIMITS, on_bad="skip")
    refused = []
    for row in range(len(file)):
        try:
            (rollout,) = file.read(row, row + 1)
            check_rollout(rollout, row, LIMITS)
        except DataError:
            refused.append(row)
    assert [bad.row for bad in found.bad] == refused and 1000 < len(refused) < len(rows)


def test_a_file_of_nothing_but_bad_rollouts_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "MAX_BAD", 3)
    file = save(tmp_path / "r.parquet", [GOOD | {"prompt_ids": []}] * 4)
    with pytest.raises(
        DataError, match=r"more than 3 rollouts of (?s:.)*actual    rollout 0: has no prompt, and so on"
    ):
        survey.survey(file, LIMITS, on_bad="skip")


def test_a_long_file_is_told_of_now_and_then_and_at_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, heard = save(tmp_path / "r.parquet", [GOOD] * (3 * ROWS_PER_GROUP + 7)), list[tuple[int, int]]()
    survey.survey(file, LIMITS, on_surveyed=lambda *rows: heard.append(rows))
    assert heard == []  # it is read in a moment
    monkeypatch.setattr(survey, "TOLD_EVERY", 2 * ROWS_PER_GROUP)
    survey.survey(file, LIMITS, on_surveyed=lambda *rows: heard.append(rows))
    assert heard == [(2 * ROWS_PER_GROUP, len(file)), (len(file), len(file))]


def test_what_is_skipped_is_counted_in_the_manifest_and_listed_in_the_build_record(
    teacher_dir: Path, tmp_path: Path
) -> None:
    heard: list[str] = []
    rows = [GOOD, GOOD | {"prompt_ids": []}, GOOD, GOOD | {"response_ids": [301]}]
    rollouts = save(tmp_path / "r.parquet", rows).path
    artifact = lopd_store.build(
        teacher=teacher_dir, rollouts=rollouts, output=tmp_path / "a", on_bad_rollout="skip", on_note=heard.append
    )
    assert len(artifact) == 2 and lopd_store.verify(artifact.path).ok
    assert dict(artifact.manifest.annotations) == {SKIPPED: 2}
    assert json.loads((artifact.path / layout.BUILD_RECORD).read_text())["skipped"] == [
        {"row": 1, "why": "has no prompt"},
        {"row": 3, "why": "has an id that the teacher's tokenizer does not know (301)"},
    ]
    assert heard == [
        "skipped: rollout 1: has no prompt",
        "skipped: rollout 3: has an id that the teacher's tokenizer does not know (301)",
        "2 rollouts cannot be scored and are skipped; build.json will list them",
    ]


def test_the_good_rollouts_make_the_same_parts_as_without_the_bad_ones(teacher_dir: Path, tmp_path: Path) -> None:
    good = [GOOD | {"prompt_ids": [1, number]} for number in range(3, 9)]
    bad = GOOD | {"prompt_ids": []}
    paths = [save(tmp_path / "one.parquet", good).path, save(tmp_path / "two.parquet", [bad, *good, bad, bad]).path]
    one, two = (
        lopd_store.build(
            teacher=teacher_dir, rollouts=path, output=path.with_suffix(""), on_bad_rollout="skip", part_positions=2
        )
        for path in paths
    )
    assert len(one.manifest.parts) == 3 and one.manifest.parts == two.manifest.parts


def test_prompts_that_begin_with_two_bos_tokens_are_counted_and_said(teacher_dir: Path, tmp_path: Path) -> None:
    bos = tiny_tokenizer().bos_token_id
    assert bos is not None
    prompts = [[bos, bos, 7], [bos, 7, bos], [bos], [7, bos, bos], [], [bos, bos], [bos, bos, 300]]
    rows = [GOOD | {"prompt_ids": prompt} for prompt in prompts]
    rollouts, heard = save(tmp_path / "r.parquet", rows).path, list[str]()
    artifact = lopd_store.build(
        teacher=teacher_dir, rollouts=rollouts, output=tmp_path / "a", on_bad_rollout="skip", on_note=heard.append
    )
    assert heard[0].startswith("2 of 5 prompts begin with two BOS tokens") and "tokenised" in heard[0]
    assert artifact.rollout(0).prompt_ids.tolist() == prompts[0]  # said, and left as it is
    heard.clear()
    save(tmp_path / "r.parquet", rows[1:4])
    lopd_store.build(teacher=teacher_dir, rollouts=rollouts, output=tmp_path / "b", on_note=heard.append)
    assert heard == []


def test_nothing_that_can_be_scored_is_an_error(teacher_dir: Path, tmp_path: Path) -> None:
    rollouts = save(tmp_path / "r.parquet", [GOOD | {"prompt_ids": []}]).path
    with pytest.raises(DataError, match=r"no rollout of .* can be scored\n  actual    rollout 0: has no prompt, and"):
        lopd_store.build(teacher=teacher_dir, rollouts=rollouts, output=tmp_path / "a", on_bad_rollout="skip")


@pytest.fixture(scope="module")
def blind_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that answers no number once it has read id 299."""
    directory = save_tiny_model(tmp_path_factory.mktemp("models") / "blind", seed=5)
    model = AutoModelForCausalLM.from_pretrained(directory)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.model.embed_tokens.weight.data[299] = torch.nan
    model.save_pretrained(directory)
    return directory


def test_a_rollout_on_which_the_teacher_answers_no_number_is_named_or_skipped(blind_dir: Path, tmp_path: Path) -> None:
    rows = [GOOD, GOOD | {"prompt_ids": [299]}, GOOD, GOOD]
    rollouts, output = save(tmp_path / "r.parquet", rows).path, tmp_path / "a"
    with pytest.raises(DataError, match=r"rollout 1: the teacher gave log-probs that are not numbers(?s:.)*skip"):
        lopd_store.build(teacher=blind_dir, rollouts=rollouts, output=output, part_positions=2)
    artifact = lopd_store.build(
        teacher=blind_dir, rollouts=rollouts, output=output, part_positions=2, on_bad_rollout="skip"
    )
    assert [part.counts.rollouts for part in artifact.manifest.parts] == [1, 2]
    assert dict(artifact.manifest.annotations) == {SKIPPED: 1} and lopd_store.verify(artifact.path).ok
    record = json.loads((output / layout.BUILD_RECORD).read_text())
    assert record["skipped"] == [{"row": 1, "why": "the teacher gave log-probs that are not numbers"}]


def test_a_part_of_which_nothing_is_left_is_an_error(blind_dir: Path, tmp_path: Path) -> None:
    rollouts = save(tmp_path / "r.parquet", [GOOD | {"prompt_ids": [299]}]).path
    with pytest.raises(DataError, match=r"nothing is left of part 0\n  actual    rollout 0: the teacher gave"):
        lopd_store.build(teacher=blind_dir, rollouts=rollouts, output=tmp_path / "a", on_bad_rollout="skip")


def test_ten_thousand_rows_of_one_row_group_are_read_a_thousand_at_a_time(tmp_path: Path) -> None:
    file = save(tmp_path / "r.parquet", [GOOD | {"prompt_ids": [row]} for row in range(10_000)])
    assert max(table.num_rows for _, table in file.tables()) <= ROWS_PER_GROUP
    assert [int(rollout.prompt_ids[0]) for rollout in file.read(4321, 4324)] == [4321, 4322, 4323]
