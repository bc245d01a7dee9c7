"""slime's Parquet: prompts survive as text or are refused, and every log-prob is the artifact's."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

import lopd_store
from lopd_store.errors import DataError, InputError
from lopd_store.rollouts import write_rollouts
from tests.commands import run_command
from tests.tiny import save_tiny_model


@pytest.fixture(scope="module")
def torn(teacher_dir: Path, sft_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rollouts: a prompt that is text, one that its text does not give back, and one with a zero in its mask."""
    here = tmp_path_factory.mktemp("torn")
    tokenizer = AutoTokenizer.from_pretrained(teacher_dir)
    words = "The answer is forty-two."
    text, letters = tokenizer.encode(words), [tokenizer.encode(letter)[0] for letter in words]
    assert tokenizer.decode(letters) == words and len(text) < len(letters)
    rows = [
        {"prompt_ids": prompt, "response_ids": [9, 10, 11], "loss_mask": mask, "finish_reason": "length"}
        for prompt, mask in ((text, None), (letters, None), (text, [True, False, True]))
    ]
    write_rollouts(here / "rollouts.parquet", rows, None)
    return lopd_store.build(
        teacher=teacher_dir, rollouts=here / "rollouts.parquet", sft=sft_file, output=here / "artifact"
    ).path


def test_every_row_is_a_rollout_as_slime_reads_it(sealed: Path, teacher_dir: Path, tmp_path: Path) -> None:
    lopd_store.export(sealed, "lightning-opd", output=tmp_path / "rows.parquet", tokenizer=teacher_dir)
    rows, artifact = pq.read_table(tmp_path / "rows.parquet").to_pylist(), lopd_store.open(sealed)
    tokenizer = AutoTokenizer.from_pretrained(teacher_dir)
    assert len(rows) == len(artifact)
    for number, row in enumerate(rows):
        rollout, metadata = artifact.rollout(number), row["metadata"]
        assert tokenizer(row["prompt"], add_special_tokens=False)["input_ids"] == rollout.prompt_ids.tolist()
        assert row["label"] == "0" and metadata["is_lightning_opd"] is True
        assert metadata["response_tokens"] == rollout.response_ids.tolist()
        assert metadata["response"] == tokenizer.decode(rollout.response_ids)
        assert metadata["loss_mask"] == [1] * len(rollout.response_ids)
        assert metadata["teacher_log_probs"] == rollout.sampled_logprobs.tolist()
        assert rollout.reference_logprobs is not None
        assert metadata["student_log_probs"] == rollout.reference_logprobs.tolist()


def test_a_copy_without_top_k_is_enough(sealed: Path, teacher_dir: Path, tmp_path: Path) -> None:
    copy = lopd_store.subset(sealed, output=tmp_path / "copy", only="sampled").path
    for name, artifact in (("a", sealed), ("b", copy)):
        lopd_store.export(artifact, "lightning-opd", output=tmp_path / f"{name}.parquet", tokenizer=teacher_dir)
    assert pq.read_table(tmp_path / "a.parquet").equals(pq.read_table(tmp_path / "b.parquet"))


def test_a_prompt_that_text_does_not_hold_is_refused_by_its_number(
    torn: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        DataError, match="rollout 1: its prompt, as text, is encoded to other ids\n  expected  24 ids: "
    ):
        lopd_store.export(torn, "lightning-opd", output=tmp_path / "rows.parquet", tokenizer=teacher_dir)
    assert not list(tmp_path.iterdir())


def test_it_can_be_left_out_and_zeros_in_a_mask_are_warned_about(torn: Path, teacher_dir: Path, tmp_path: Path) -> None:
    command = ("export", "lightning-opd", torn, "--tokenizer", teacher_dir, "--output", tmp_path / "rows.parquet")
    ran = run_command("lopd-store", *command, "--on-bad-rollout", "skip")
    assert ran.code == 0
    assert ", and 1 of 2 rollouts have zeros in theirs" in ran.stderr
    assert "note: rollouts left out: 1\n" in ran.stderr
    masks = [row["metadata"]["loss_mask"] for row in pq.read_table(tmp_path / "rows.parquet").to_pylist()]
    assert masks == [[1, 1, 1], [1, 0, 1]]


def test_another_tokenizer_is_refused(sealed: Path, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "other", vocab_size=310)
    with pytest.raises(InputError, match="has another tokenizer than the artifact"):
        lopd_store.export(sealed, "lightning-opd", output=tmp_path / "rows.parquet", tokenizer=other)


def test_a_tokenizer_is_asked_for_and_goes_with_no_other_format(
    sealed: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="`tokenizer` goes with `lightning-opd`"):
        lopd_store.export(sealed, "lightning-opd", output=tmp_path / "rows.parquet")
    with pytest.raises(InputError, match="`tokenizer` goes with `lightning-opd`"):
        lopd_store.export(sealed, "trl", output=tmp_path / "rows.parquet", tokenizer=teacher_dir)
