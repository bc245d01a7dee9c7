"""SFT on data of several teachers: its order, its record, and going on with it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import lopd_train
from lopd_store.digest import digest_file
from lopd_store.errors import DataError, InputError
from lopd_store.identity import identify
from lopd_store.provenance import read_checkpoint_record
from lopd_store.rollouts import RolloutsFile
from lopd_train import TrainConfig
from lopd_train.data import rollouts_source
from tests.tiny import save_tiny_model
from tests.train.conftest import sample

Data = dict[str, str | Path]


@pytest.fixture(scope="module")
def data(sft_data: Path, other_teacher_dir: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Data:
    """SFT data of two teachers."""
    of_code = sample(other_teacher_dir, prompts, tmp_path_factory.mktemp("code") / "code.parquet")
    return {"math": sft_data, "code": of_code}


@pytest.fixture(scope="module")
def policy(student_dir: Path, data: Data, config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student after SFT on both."""
    output = tmp_path_factory.mktemp("policy") / "policy"
    return lopd_train.train_sft(model=student_dir, data=data, output=output, config=replace(config, steps=2)).output


def test_the_rows_of_all_files_follow_each_other(data: Data) -> None:
    files = [RolloutsFile(path) for path in data.values()]
    source = rollouts_source(*files)
    records = [record for number in source.sizes for record in source.read(number)]
    wanted = [rollout for file in files for rollout in file.read(0, len(file))]
    assert [record.row for record in records] == list(range(sum(map(len, files))))
    assert [record.token_ids.tolist() for record in records] == [rollout.token_ids.tolist() for rollout in wanted]
    assert sum(source.sizes.values()) == len(wanted) and source.where == ", ".join(map(str, data.values()))


def test_the_record_names_the_teacher_and_the_file_of_each_domain(
    policy: Path, data: Data, teacher_dir: Path, other_teacher_dir: Path
) -> None:
    record = read_checkpoint_record(policy)
    assert record is not None and record.data is None
    assert [(one.domain, one.status, one.teacher, one.data) for one in record.sft] == [
        (domain, "recorded", identify(teacher), digest_file(Path(data[domain])).sha256)
        for domain, teacher in (("math", teacher_dir), ("code", other_teacher_dir))
    ]
    run = json.loads((policy / "run.json").read_text())
    assert run["inputs"]["data"] == {"path": [str(path) for path in data.values()], "digest": None}
    card = (policy / "README.md").read_text()
    assert "the responses of `teacher` and `other-teacher`." in card
    assert f"| SFT data, code | `{record.sft[1].data}` |\n| SFT teacher, code | `other-teacher` (recorded) |" in card


def test_a_run_with_other_data_of_one_domain_is_another_run(
    student_dir: Path, data: Data, config: TrainConfig, tmp_path: Path
) -> None:
    def stop(progress: lopd_train.Progress) -> None:
        if progress.step == 2:
            raise KeyboardInterrupt

    run = replace(config, steps=3, checkpoint_every=1)
    with pytest.raises(KeyboardInterrupt):
        lopd_train.train_sft(model=student_dir, data=data, output=tmp_path / "sft", config=run, on_progress=stop)
    with pytest.raises(InputError, match=r"an interrupted run with another `inputs\.sft`"):
        other: Data = {"math": data["code"], "code": data["math"]}
        lopd_train.train_sft(model=student_dir, data=other, output=tmp_path / "sft", config=run)
    moved: Data = {domain: shutil.copy(path, tmp_path / f"{domain}.parquet") for domain, path in data.items()}
    assert lopd_train.train_sft(model=student_dir, data=moved, output=tmp_path / "sft", config=run).steps == 3


def test_data_of_another_tokenizer_is_refused_in_any_domain(data: Data, config: TrainConfig, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "other", seed=1, vocab_size=290)
    with pytest.raises(DataError, match="has ids of another tokenizer than that of the model"):
        lopd_train.train_sft(model=other, data=data, output=tmp_path / "sft", config=config)


def test_names_that_are_no_domains_are_refused(
    student_dir: Path, sft_data: Path, config: TrainConfig, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="`data` does not name domains"):
        lopd_train.train_sft(model=student_dir, data={"A": sft_data}, output=tmp_path / "sft", config=config)
