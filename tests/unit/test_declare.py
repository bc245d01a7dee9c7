"""Records by hand: what they say, what they leave as it is, and what they refuse."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from peft import LoraConfig, get_peft_model

import lopd_store
from lopd_store import models
from lopd_store.declare import declare_checkpoint, declare_rollouts
from lopd_store.digest import digest_file
from lopd_store.errors import DataError, InputError
from lopd_store.models import PROVENANCE_FILE
from lopd_store.provenance import SftProvenance, Status, read_checkpoint_record, sft_of_data, sft_of_policy
from lopd_store.rollouts import RolloutsFile
from tests.artifacts import save_rollouts
from tests.records import DATA, ROLLOUTS


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """Rollouts as another tool writes them: its own types, a column of its own, no record, one row group."""
    rows = {
        "prompt_ids": [[7, 8], [7, 8], [9]],
        "response_ids": [[10, 11, 12], [13], [14, 15]],
        "reward": [1.0, 0.0, 0.5],
    }
    path = tmp_path / "theirs.parquet"
    pq.write_table(pa.table(rows).replace_schema_metadata({"theirs": "kept"}), path)
    return path


@pytest.fixture
def checkpoint(student_dir: Path, tmp_path: Path) -> Path:
    """A checkpoint of which nothing is recorded."""
    return Path(shutil.copytree(student_dir, tmp_path / "checkpoint"))


def test_rollouts_are_the_same_but_for_their_record(theirs: Path, teacher_dir: Path, tmp_path: Path) -> None:
    before, output = theirs.read_bytes(), tmp_path / "sft.parquet"
    record = declare_rollouts(theirs, policy=teacher_dir, output=output)
    assert theirs.read_bytes() == before
    assert pq.read_table(output).equals(pq.read_table(theirs))
    assert pq.read_schema(output).metadata[b"theirs"] == b"kept"
    assert RolloutsFile(output).record == record
    assert (record.status, record.policy) == ("declared", lopd_store.identify(teacher_dir))


def test_what_nobody_says_is_taken_from_the_rows(theirs: Path, teacher_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "sft.parquet"
    record = declare_rollouts(theirs, policy=teacher_dir, output=output, temperature=0.6, top_p=0.95)
    assert record.sampling.to_json() == {
        "temperature": 0.6,
        "top_p": 0.95,
        "max_response_tokens": 3,
        "samples_per_prompt": 2,
        "seed": None,
        "stop": None,
    }
    assert record.prompts is None


def test_how_it_was_sampled_stays_unknown_where_nobody_says(theirs: Path, teacher_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "sft.parquet"
    record = declare_rollouts(theirs, policy=teacher_dir, output=output)
    assert (record.sampling.temperature, record.sampling.top_p, record.sampling.seed) == (None, None, None)
    assert RolloutsFile(output).record == record
    with pytest.raises(InputError, match="does not say how it was sampled"):
        lopd_store.audit(model=teacher_dir, data=output)
    lopd_store.audit(model=teacher_dir, data=output, temperature=1, top_p=1)


def test_the_prompts_may_be_named(theirs: Path, teacher_dir: Path, prompts_file: Path, tmp_path: Path) -> None:
    record = declare_rollouts(theirs, policy=teacher_dir, output=tmp_path / "sft.parquet", prompts=prompts_file)
    assert record.prompts == digest_file(prompts_file).sha256


@pytest.mark.parametrize("status", ["recorded", "declared"])
def test_what_has_a_record_is_not_declared(status: Status, teacher_dir: Path, tmp_path: Path) -> None:
    path = save_rollouts(tmp_path / "r.parquet", [([7], [8])], record=replace(ROLLOUTS, status=status))
    with pytest.raises(InputError, match=rf"says already who sampled it(.|\n)*student \({status}\)"):
        declare_rollouts(path, policy=teacher_dir, output=tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()


def test_what_is_unknown_may_be_declared(teacher_dir: Path, tmp_path: Path) -> None:
    path = save_rollouts(tmp_path / "r.parquet", [([7], [8])], record=replace(ROLLOUTS, status="unknown"))
    assert declare_rollouts(path, policy=teacher_dir, output=tmp_path / "out.parquet").status == "declared"


def test_ids_of_another_tokenizer_are_refused_with_their_row(teacher_dir: Path, tmp_path: Path) -> None:
    path = save_rollouts(tmp_path / "r.parquet", [*[([7], [8])] * 1030, ([7], [8, 300])])
    with pytest.raises(DataError, match=r"row 1030: an id that the tokenizer of `teacher` does not know\n.*below 300"):
        declare_rollouts(path, policy=teacher_dir, output=tmp_path / "out.parquet")
    assert not list(tmp_path.glob("out.parquet*"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"output": "r.parquet"}, "exists"),
        ({"output": "out.jsonl"}, "is not a name for rollouts"),
        ({"temperature": -1.0}, "`temperature` is out of range\n  expected  0 to 100"),
        ({"top_p": 0.0}, "`top_p` is out of range"),
        ({"prompts": "lost.jsonl"}, "no prompts at `lost.jsonl`"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    changes: dict[str, object], said: str, teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_rollouts(tmp_path / "r.parquet", [([7], [8])])
    arguments: dict[str, object] = {"policy": teacher_dir, "output": "out.parquet", **changes}
    with pytest.raises(InputError, match=said):
        declare_rollouts("r.parquet", **arguments)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["r.parquet"]


def test_a_declared_checkpoint_is_declared_though_its_data_is_recorded(
    checkpoint: Path, other_teacher_dir: Path, teacher_dir: Path, sft_file: Path
) -> None:
    record = declare_checkpoint(checkpoint, base=other_teacher_dir, sft_data=sft_file)
    assert RolloutsFile(sft_file).record is not None
    assert read_checkpoint_record(checkpoint) == record
    assert (record.status, record.method, record.overrides) == ("declared", "sft", ())
    assert record.model == lopd_store.identify(checkpoint)
    assert record.base == lopd_store.identify(other_teacher_dir)
    teacher, data = lopd_store.identify(teacher_dir), digest_file(sft_file).sha256
    assert record.sft[0] == SftProvenance(status="declared", teacher=teacher, data=data)
    assert record.data == data


def test_the_record_of_an_adapter_goes_into_its_rollouts(
    student_dir: Path, teacher_dir: Path, prompts_file: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    model = models.load_model(models.find(student_dir))
    lora = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    lora.peft_config["default"].base_model_name_or_path = str(student_dir)
    lora.save_pretrained(adapter)
    record = declare_checkpoint(adapter, base=student_dir, sft_teacher=teacher_dir)
    generated = lopd_store.generate(
        model=adapter, prompts=prompts_file, output=tmp_path / "r.parquet", max_response_tokens=4
    )
    assert sft_of_policy(RolloutsFile(generated.output).record) == record.sft[0]


def test_a_teacher_goes_without_data(checkpoint: Path, student_dir: Path, teacher_dir: Path) -> None:
    record = declare_checkpoint(checkpoint, base=student_dir, sft_teacher=teacher_dir)
    assert (record.sft[0].teacher, record.sft[0].data) == (lopd_store.identify(teacher_dir), None)
    assert record.data is None and read_checkpoint_record(checkpoint) == record


@pytest.mark.parametrize("name", ["chats.jsonl", "chats.parquet"])
def test_data_in_text_goes_with_a_teacher(
    name: str, checkpoint: Path, student_dir: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    data = tmp_path / name
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"text": ["a chat"]}), data)
    else:
        data.write_text('{"text": "a chat"}\n')
    record = declare_checkpoint(checkpoint, base=student_dir, sft_data=data, sft_teacher=teacher_dir)
    assert record.data == record.sft[0].data == digest_file(data).sha256
    declare_checkpoint(checkpoint, base=student_dir, sft_data=data, sft_teacher=teacher_dir, force=True)
    with pytest.raises(InputError, match=f"nothing says which teacher wrote the SFT data in `{data}`"):
        declare_checkpoint(checkpoint, base=student_dir, sft_data=data, force=True)


def test_a_teacher_that_the_data_does_not_name_is_refused(
    checkpoint: Path, student_dir: Path, other_teacher_dir: Path, sft_file: Path
) -> None:
    with pytest.raises(InputError, match="was written by another teacher than `--sft-teacher`"):
        declare_checkpoint(checkpoint, base=student_dir, sft_data=sft_file, sft_teacher=other_teacher_dir)
    assert not (checkpoint / PROVENANCE_FILE).exists()


def test_a_record_is_replaced_only_by_force(checkpoint: Path, student_dir: Path, teacher_dir: Path) -> None:
    (checkpoint / PROVENANCE_FILE).write_text("not ours to lose")
    with pytest.raises(InputError, match="exists\n\nhint: pass `--force`"):
        declare_checkpoint(checkpoint, base=student_dir, sft_teacher=teacher_dir)
    assert (checkpoint / PROVENANCE_FILE).read_text() == "not ours to lose"
    record = declare_checkpoint(checkpoint, base=student_dir, sft_teacher=teacher_dir, force=True)
    assert read_checkpoint_record(checkpoint) == record


def test_rollouts_and_training_on_a_declared_record_stay_declared(
    checkpoint: Path, student_dir: Path, teacher_dir: Path, prompts_file: Path, theirs: Path, tmp_path: Path
) -> None:
    declare_checkpoint(checkpoint, base=student_dir, sft_teacher=teacher_dir)
    output = lopd_store.generate(
        model=checkpoint, prompts=prompts_file, output=tmp_path / "r.parquet", max_response_tokens=4
    )
    record = RolloutsFile(output.output).record
    assert record is not None
    assert (record.status, sft_of_policy(record).status) == ("recorded", "declared")
    declared = declare_rollouts(theirs, policy=teacher_dir, output=tmp_path / "sft.parquet")
    assert sft_of_data(declared, DATA).status == "declared"
