"""Exports as a whole: the gate before them, the record inside them, and nothing half-made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import lopd_store
from lopd_store import gate
from lopd_store.errors import ArtifactError, ConsistencyError, DataError, InputError
from lopd_store.interop import RECORD_KEY, target
from lopd_store.rollouts import write_rollouts
from tests.commands import run_command
from tests.interop.conftest import KEPT, LENGTHS

OTHER_TEACHER = "the SFT data was written by another teacher than the one that scored the rollouts"
NO_RECORD = "nothing says which teacher wrote the SFT data of the reference policy"


def record_of(file: Path) -> dict[str, Any]:
    return dict(json.loads(pq.read_schema(file).metadata[RECORD_KEY]))


def test_what_it_came_from_and_what_the_gate_found_is_in_the_file(
    sealed: Path, student_dir: Path, tmp_path: Path
) -> None:
    student = lopd_store.identify(student_dir)
    exported = lopd_store.export(sealed, "trl", output=tmp_path / "rows.parquet", student=student)
    record = record_of(tmp_path / "rows.parquet")
    assert record == exported.record
    assert (record["target"], record["verdict"], record["overrides"]) == ("trl", "consistent", [])
    assert record["fingerprint"] == lopd_store.open(sealed).fingerprint
    assert record["student"] == student.to_json()
    assert record["inputs"] == json.loads((sealed / "manifest.json").read_bytes())["inputs"]


@pytest.mark.parametrize(
    ("kind", "state", "reason", "override"),
    [
        ("unknown", "unknown", NO_RECORD, gate.ALLOW_UNKNOWN),
        ("inconsistent", "inconsistent", OTHER_TEACHER, gate.ALLOW_INCONSISTENT),
    ],
)
def test_what_training_refuses_is_exported_with_its_own_override_alone_which_is_recorded(
    kind: str, state: str, reason: str, override: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    artifact, output = request.getfixturevalue(kind), tmp_path / "rows.parquet"
    (other,) = set(gate.OVERRIDES) - {override}
    for overrides in ([], [other]):
        with pytest.raises(ConsistencyError, match=f"teacher consistency is {state}: {reason}"):
            lopd_store.export(artifact, "trl", output=output, overrides=overrides)
    assert not list(tmp_path.iterdir())
    lopd_store.export(artifact, "trl", output=output, overrides=gate.OVERRIDES)
    record = record_of(output)
    assert (record["verdict"], record["reasons"], record["overrides"]) == (state, [reason], [override])


def test_another_student_than_the_reference_policy_is_refused(
    sealed: Path, other_teacher_dir: Path, tmp_path: Path
) -> None:
    output, student = tmp_path / "rows.parquet", lopd_store.identify(other_teacher_dir)
    with pytest.raises(ConsistencyError, match="the student is not the reference policy that sampled the rollouts"):
        lopd_store.export(sealed, "trl", output=output, student=student)
    lopd_store.export(sealed, "trl", output=output, student=student, overrides=[gate.ALLOW_INCONSISTENT])
    assert record_of(output)["overrides"] == [gate.ALLOW_INCONSISTENT]


def test_rollouts_with_nothing_in_the_loss_are_left_out_and_counted(mixed: Path, tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []
    exported = lopd_store.export(
        mixed, "trl", output=tmp_path / "rows.parquet", on_positions=lambda done, total: heard.append((done, total))
    )
    lengths = [LENGTHS[number][1] for number in KEPT]
    assert (exported.rollouts, exported.left_out) == (len(KEPT), len(LENGTHS) - len(KEPT))
    assert exported.positions == sum(lengths)
    assert exported.bytes == (tmp_path / "rows.parquet").stat().st_size
    everything = sum(response for _, response in LENGTHS)
    assert heard[-1] == (everything, everything)
    assert len(heard) > 2


def test_batches_of_any_size_give_the_same_rows(mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lopd_store.export(mixed, "trl", output=tmp_path / "a.parquet")
    monkeypatch.setattr("lopd_store.interop._BYTES_AT_ONCE", 1)
    lopd_store.export(mixed, "trl", output=tmp_path / "b.parquet")
    assert pq.read_metadata(tmp_path / "b.parquet").num_row_groups == len(KEPT)
    assert pq.read_table(tmp_path / "a.parquet").equals(pq.read_table(tmp_path / "b.parquet"))


def test_a_copy_of_some_parts_exports_those_and_says_so(mixed: Path, tmp_path: Path) -> None:
    copy = lopd_store.subset(mixed, output=tmp_path / "copy", parts=range(1, 2))
    exported = lopd_store.export(copy.path, "trl", output=tmp_path / "rows.parquet")
    assert exported.record["parts"] == [1, 2]
    rows = pq.read_table(tmp_path / "rows.parquet").column("completion_ids").to_pylist()
    kept = [number for number in copy.rollouts if number in KEPT]
    assert rows == [lopd_store.open(mixed).rollout(number).response_ids.tolist() for number in kept]


def test_several_teachers_are_judged_by_domain_and_all_of_them_are_in_the_record(
    sealed: Path, inconsistent: Path, tmp_path: Path
) -> None:
    both = lopd_store.combine(("math", sealed), ("code", inconsistent), output=tmp_path / "both")
    output = tmp_path / "rows.parquet"
    with pytest.raises(ConsistencyError, match=f"domain code: {OTHER_TEACHER}"):
        lopd_store.export(both.path, "trl", output=output)
    lopd_store.export(both.path, "trl", output=output, overrides=[gate.ALLOW_INCONSISTENT])
    record = record_of(output)
    assert [one["domain"] for one in record["inputs"]] == ["math", "code"]
    rows = pq.read_table(output).column("completion_ids").to_pylist()
    assert rows == [both.rollout(number).response_ids.tolist() for number in range(len(both))]


class TestNothingHalfMade:
    """After an error, Ctrl-C or a kill there is no file that looks like an export."""

    @pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
    def test_an_interrupted_export_leaves_nothing(
        self, mixed: Path, tmp_path: Path, error: type[BaseException]
    ) -> None:
        def stop(done: float, total: float) -> None:
            assert not (tmp_path / "rows.parquet").exists() and (tmp_path / "rows.parquet.unfinished").is_file()
            raise error

        with pytest.raises(error):
            lopd_store.export(mixed, "trl", output=tmp_path / "rows.parquet", on_positions=stop)
        assert not list(tmp_path.iterdir())

    def test_what_a_kill_has_left_is_no_export_and_in_nobodys_way(self, mixed: Path, tmp_path: Path) -> None:
        (tmp_path / "rows.parquet.unfinished").write_bytes(b"half")
        lopd_store.export(mixed, "trl", output=tmp_path / "rows.parquet")
        assert list(tmp_path.iterdir()) == [tmp_path / "rows.parquet"]

    def test_what_is_there_is_never_replaced(self, mixed: Path, tmp_path: Path) -> None:
        (tmp_path / "rows.parquet").write_bytes(b"mine")
        with pytest.raises(InputError, match="exists"):
            lopd_store.export(mixed, "trl", output=tmp_path / "rows.parquet")
        assert (tmp_path / "rows.parquet").read_bytes() == b"mine"


class TestBadInput:
    """What is wrong with an artifact is found before a row of it is written."""

    def test_a_damaged_artifact_is_refused(self, mixed: Path, tmp_path: Path) -> None:
        broken = Path(shutil.copytree(mixed, tmp_path / "broken"))
        file = broken / "parts" / "00001.topk.zarr.zip"
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        with pytest.raises(ArtifactError):
            lopd_store.export(broken, "trl", output=tmp_path / "rows.parquet")
        assert {path.name for path in tmp_path.iterdir()} == {"broken"}

    def test_values_that_no_teacher_can_give_are_refused_though_their_digests_are_honest(
        self, mixed: Path, tmp_path: Path
    ) -> None:
        from tests.artifacts import change, read_first_part, replace_part

        broken = Path(shutil.copytree(mixed, tmp_path / "broken"))
        topk = read_first_part(broken).topk
        assert topk is not None
        replace_part(broken, ids=change(topk.ids, 0, 70_000))
        with pytest.raises(ArtifactError, match="out of range"):
            lopd_store.export(broken, "trl", output=tmp_path / "rows.parquet")

    def test_an_artifact_elsewhere_is_pulled_first(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="is not on this machine"):
            lopd_store.export("hf://acme/art", "trl", output=tmp_path / "rows.parquet")

    def test_a_table_has_the_name_of_one(self, mixed: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"rows\.csv` is not a name for a table\n  expected  .*\.parquet"):
            lopd_store.export(mixed, "trl", output=tmp_path / "rows.csv")
        assert not list(tmp_path.glob("rows*"))

    def test_another_format_is_refused(self, mixed: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="there is no format `gguf`"):
            lopd_store.export(mixed, "gguf", output=tmp_path / "rows")  # type: ignore[arg-type]

    def test_an_artifact_with_nothing_to_learn_from_is_refused(
        self, teacher_dir: Path, sft_file: Path, tmp_path: Path
    ) -> None:
        row = {"prompt_ids": [7, 8], "response_ids": [9], "loss_mask": [False], "finish_reason": "stop"}
        write_rollouts(tmp_path / "rollouts.parquet", [row], None)
        built = lopd_store.build(
            teacher=teacher_dir, rollouts=tmp_path / "rollouts.parquet", sft=sft_file, output=tmp_path / "artifact"
        )
        with pytest.raises(DataError, match="no rollout to export\n  actual    1 left out"):
            lopd_store.export(built.path, "trl", output=tmp_path / "rows.parquet")
        assert not list(tmp_path.glob("rows*"))


class TestCommand:
    """`lopd-store export` as a user types it."""

    def test_it_answers_in_words_and_in_json(self, mixed: Path, student_dir: Path, tmp_path: Path) -> None:
        ran = run_command("lopd-store", "export", "trl", mixed, "--output", tmp_path / "a.parquet")
        assert ran.code == 0 and f"{len(KEPT)} rollouts, " in ran.stdout and "; consistent, sha256:" in ran.stdout
        assert ran.stderr == "note: rollouts left out: 2\n"
        ran = run_command("lopd-store", "export", "trl", mixed, "--output", tmp_path / "b.parquet", "--json")
        assert ran.json["rollouts"] == len(KEPT) and ran.json["record"]["verdict"] == "consistent"

    def test_an_address_is_said_as_it_was_typed(self) -> None:
        ran = run_command("lopd-store", "export", "trl", "hf://acme/art", "--output", "rows.parquet")
        assert ran.code == 2 and ran.stderr.startswith("error: `hf://acme/art` is not on this machine\n")

    def test_the_gate_refuses_with_exit_code_1_and_names_the_way_around_it(
        self, unknown: Path, student_dir: Path, tmp_path: Path
    ) -> None:
        command = ("export", "trl", unknown, "--output", tmp_path / "rows.parquet", "--student", student_dir)
        ran = run_command("lopd-store", *command)
        assert ran.code == 1 and "pass `--allow-unknown-sft-teacher`" in ran.stderr
        ran = run_command("lopd-store", *command, "--allow-unknown-sft-teacher")
        assert ran.code == 0 and "; unknown, --allow-unknown-sft-teacher, sha256:" in ran.stdout


def test_rows_are_filled_up_with_ids_that_they_do_not_have() -> None:
    from tests.artifacts import make_topk

    topk = make_topk([[(2, -0.1), (9, -3.0)], [(0, -1.0), (1, -1.0), (5, -1.5)], [(7, -0.5)]], [-4.0, -2.0, -1.0])
    ids, logprobs, stored = target.fixed_rows(topk, 3)
    assert ids.tolist() == [[2, 9, 0], [0, 1, 5], [7, 0, 1]]
    assert stored.tolist() == [[True, True, False], [True, True, True], [True, False, False]]
    assert logprobs[~stored].tolist() == [target.NOTHING] * 3
    ids, logprobs, stored = target.fixed_rows(topk, 2)
    assert ids.tolist() == [[2, 9], [0, 1], [7, 0]] and stored.sum() == 5
