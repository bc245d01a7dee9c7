"""Provenance records: read back as written, refused in any other shape, and what follows from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lopd_store import strictjson
from lopd_store.errors import ArtifactError, InputError
from lopd_store.models import PROVENANCE_FILE
from lopd_store.provenance import (
    UNKNOWN_SFT,
    CheckpointRecord,
    RolloutsRecord,
    SftProvenance,
    Status,
    are_domains,
    by_domain,
    declared,
    read_checkpoint_record,
    sft_of_checkpoint,
    sft_of_data,
    sft_of_policy,
)
from tests.records import (
    CHECKPOINT,
    DATA,
    OF_BOTH,
    OTHER_STUDENT,
    ROLLOUTS,
    SFT,
    SFT_OF_CODE,
    SFT_OF_MATH,
    TEACHER,
    policy,
)

Record = CheckpointRecord | RolloutsRecord | SftProvenance


@pytest.mark.parametrize(
    "record",
    [
        ROLLOUTS,
        replace(ROLLOUTS, policy_checkpoint=None, status="declared"),
        CHECKPOINT,
        replace(CHECKPOINT, method="opd", overrides=("allow-inconsistent-teacher",), sft=(UNKNOWN_SFT,)),
        SFT,
        UNKNOWN_SFT,
        replace(SFT, status="declared", data=None),
    ],
)
def test_a_record_comes_back_from_its_bytes(record: Record) -> None:
    data = strictjson.canonical(record.to_json())
    assert type(record).from_json(strictjson.loads(data, where="x"), where="x") == record


@pytest.mark.parametrize(
    ("record", "edit", "said"),
    [
        (ROLLOUTS, lambda v: v.pop("prompts"), "`x` lacks `prompts`"),
        (ROLLOUTS, lambda v: v.update(extra=1), "`x` has unknown members: `extra`"),
        (ROLLOUTS, lambda v: v.update(record="checkpoint"), "`x` is not a rollouts record"),
        (ROLLOUTS, lambda v: v.update(prompts="x"), r"`x\.prompts` is neither a digest nor null"),
        (ROLLOUTS, lambda v: v["sampling"].update(temperature=-1), r"`x\.sampling\.temperature` is not a number"),
        (ROLLOUTS, lambda v: v["sampling"].update(stop="a"), r"`x\.sampling\.stop` is not a list of texts"),
        (ROLLOUTS, lambda v: v["sampling"].update(stop=["a", ""]), r"`x\.sampling\.stop` is not a list of texts"),
        (ROLLOUTS, lambda v: v["sampling"].update(stop=["a"] * 65), r"`x\.sampling\.stop` is not a list of texts"),
        (ROLLOUTS, lambda v: v["sampling"].update(seed=1.5), r"`x\.sampling\.seed` is not a number"),
        (ROLLOUTS, lambda v: v["sampling"].update(top_p=True), r"`x\.sampling\.top_p` is not a number"),
        (ROLLOUTS, lambda v: v["sampling"].pop("seed"), r"`x\.sampling` lacks `seed`"),
        (ROLLOUTS, lambda v: v["policy"].pop("weights"), r"`x\.policy` lacks `weights`"),
        (ROLLOUTS, lambda v: v.update(policy_checkpoint=[]), r"`x\.policy_checkpoint` is not an object"),
        (CHECKPOINT, lambda v: v.update(method="dpo"), "`x` is not a checkpoint record"),
        (CHECKPOINT, lambda v: v.update(overrides="all"), r"`x\.overrides` is not a list of names"),
        (CHECKPOINT, lambda v: v.update(status="sure"), r"`x\.status` is not known"),
        (
            CHECKPOINT,
            lambda v: v["sft"][0].update(teacher=None),
            r"`x\.sft\[0\]` has status `recorded`, but its teacher is null",
        ),
        (SFT, lambda v: v.update(status="unknown"), "`x` has status `unknown`, but its teacher is named"),
        (SFT, lambda v: v.update(data="x"), r"`x\.data` is neither a digest nor null"),
    ],
)
def test_a_record_of_another_shape_is_refused_with_its_place(
    record: Record, edit: Callable[[Any], Any], said: str
) -> None:
    value = record.to_json()
    edit(value)
    with pytest.raises(ArtifactError, match=said):
        type(record).from_json(value, where="x")


def test_the_sft_of_a_policy_is_what_its_checkpoint_says() -> None:
    assert sft_of_policy(ROLLOUTS) == SFT


@pytest.mark.parametrize("record", [None, policy(OTHER_STUDENT, None), policy(OTHER_STUDENT, CHECKPOINT)])
def test_the_sft_of_a_policy_is_unknown_where_no_record_speaks_of_it(record: RolloutsRecord | None) -> None:
    assert sft_of_policy(record) == UNKNOWN_SFT


def test_the_policy_of_sft_data_is_the_sft_teacher() -> None:
    assert sft_of_data(policy(TEACHER), DATA) == SFT


@pytest.mark.parametrize("record", [None, replace(ROLLOUTS, status="unknown")])
def test_sft_data_of_nobody_in_particular_has_no_teacher(record: RolloutsRecord | None) -> None:
    assert sft_of_data(record, DATA) == replace(UNKNOWN_SFT, data=DATA)


def test_a_declared_record_stays_declared() -> None:
    assert sft_of_data(replace(ROLLOUTS, status="declared"), DATA).status == "declared"


def test_the_record_beside_a_checkpoint_is_read(tmp_path: Path) -> None:
    assert read_checkpoint_record(tmp_path) is None
    (tmp_path / PROVENANCE_FILE).write_bytes(strictjson.pretty(CHECKPOINT.to_json()))
    assert read_checkpoint_record(tmp_path) == CHECKPOINT


def test_a_damaged_record_beside_a_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / PROVENANCE_FILE).write_bytes(b"{")
    with pytest.raises(ArtifactError, match=f"{PROVENANCE_FILE}` is not valid JSON"):
        read_checkpoint_record(tmp_path)


@pytest.mark.parametrize("status", ["declared", "unknown"])
def test_what_rests_on_a_record_is_known_no_better_than_the_record(status: Status) -> None:
    beside = replace(CHECKPOINT, status=status)
    expected = declared(SFT) if status == "declared" else UNKNOWN_SFT
    assert sft_of_checkpoint(beside) == expected
    assert sft_of_policy(replace(ROLLOUTS, policy_checkpoint=beside)) == expected
    assert sft_of_policy(replace(ROLLOUTS, status=status)) == expected


# Several domains


def test_the_sft_of_a_domain_is_what_the_checkpoint_says_of_it() -> None:
    assert sft_of_policy(OF_BOTH, "math") == SFT_OF_MATH and sft_of_policy(OF_BOTH, "code") == SFT_OF_CODE
    assert sft_of_policy(replace(OF_BOTH, status="declared"), "code") == declared(SFT_OF_CODE)


def test_a_checkpoint_of_several_domains_wants_one_named() -> None:
    with pytest.raises(
        InputError,
        match=r"several domains, and none is named\n  expected  math, code\n\nhint: .*--domain NAME",
    ):
        sft_of_policy(OF_BOTH)
    with pytest.raises(InputError, match="no SFT data of the domain `chat`\n  expected  math, code\n  actual    chat"):
        sft_of_policy(OF_BOTH, "chat")


def test_of_a_single_domain_none_need_be_named_and_no_other_may() -> None:
    one = replace(ROLLOUTS, policy_checkpoint=replace(CHECKPOINT, sft=(SFT_OF_MATH,)))
    assert sft_of_policy(one) == sft_of_policy(one, "math") == SFT_OF_MATH
    with pytest.raises(InputError, match="no SFT data of the domain `code`"):
        sft_of_policy(one, "code")
    assert sft_of_policy(ROLLOUTS, "code") == SFT  # the data has no domain, so this only names the rollouts


@pytest.mark.parametrize(
    "names", [["math", "math"], ["math", None], ["Math", "code"], ["", "code"], [".math"], ["m" * 65], ["m\n"], []]
)
def test_domains_that_do_not_name_each_are_refused(names: list[str | None]) -> None:
    record = replace(CHECKPOINT, sft=tuple(replace(SFT, domain=name) for name in names))
    with pytest.raises(ArtifactError, match=r"`x\.sft` (do not have a domain each|is not a list of 1 to 64)"):
        CheckpointRecord.from_json(record.to_json(), where="x")
    assert not are_domains(names)


def test_what_is_handed_over_per_domain_is_one_thing_or_has_names() -> None:
    assert by_domain("data", "data") == {None: "data"}
    assert by_domain({"math": "a", "code": "b"}, "data") == {"math": "a", "code": "b"}
    with pytest.raises(InputError, match="`data` does not name domains"):
        by_domain({"Math": "a"}, "data")
    with pytest.raises(InputError, match="`data` does not name domains"):
        by_domain({}, "data")
