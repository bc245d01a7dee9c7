"""Lineage as a table: which link of a chain is how sure."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lopd_store.lineage import Link, of_checkpoint, of_manifest, weakest
from lopd_store.manifest import Inputs
from lopd_store.provenance import UNKNOWN_SFT, RolloutsRecord, declared
from tests.records import (
    CHECKPOINT,
    CODE,
    CODER,
    DATA,
    INPUTS,
    MATH,
    OF_BOTH,
    OTHER_STUDENT,
    OTHER_TEACHER,
    ROLLOUTS,
    SFT,
    SFT_OF_CODE,
    STUDENT,
    TEACHER,
    make_manifest,
    policy,
)

FINGERPRINT = "sha256:" + 64 * "f"
SFT_DATA = policy(TEACHER)
DECLARED_CHECKPOINT = replace(CHECKPOINT, status="declared", sft=(declared(SFT),))
TRAINED = replace(CHECKPOINT, method="opd", base=STUDENT, model=OTHER_STUDENT, data=FINGERPRINT)


def rollouts(record: RolloutsRecord | None) -> Inputs:
    return replace(INPUTS, rollouts=record)


def chain(inputs: Inputs, sft_data: RolloutsRecord | None = None) -> tuple[Link, ...]:
    return of_manifest(make_manifest(inputs=inputs), FINGERPRINT, sft_data={} if sft_data is None else {DATA: sft_data})


def marks(links: tuple[Link, ...]) -> list[str]:
    return [link.mark for link in links]


MARKS = [
    # of SFT data, SFT checkpoint, rollouts, artifact; the weakest is that of the chain
    ("all recorded", INPUTS, None, "recorded recorded verified verified", "recorded"),
    ("all here", INPUTS, SFT_DATA, "verified verified verified verified", "verified"),
    (
        "declared data",
        replace(INPUTS, sft=declared(SFT)),
        replace(SFT_DATA, status="declared"),
        "declared declared verified declared",
        "declared",
    ),
    (
        "declared checkpoint",
        replace(INPUTS, sft=declared(SFT), rollouts=replace(ROLLOUTS, policy_checkpoint=DECLARED_CHECKPOINT)),
        None,
        "declared declared declared declared",
        "declared",
    ),
    (
        "declared rollouts",
        replace(INPUTS, sft=declared(SFT), rollouts=replace(ROLLOUTS, status="declared")),
        None,
        "declared recorded declared declared",
        "declared",
    ),
    (
        "data named by hand",
        replace(INPUTS, sft=declared(SFT), rollouts=policy(STUDENT)),
        None,
        "declared declared recorded declared",
        "declared",
    ),
    ("no record", Inputs(**{**vars(INPUTS), "sft": UNKNOWN_SFT, "rollouts": None}), None,
     "unknown unknown unknown recorded", "unknown"),
    ("another teacher scored", replace(INPUTS, teacher=OTHER_TEACHER), None,
     "recorded recorded verified broken", "broken"),
    ("another policy sampled", rollouts(policy(OTHER_STUDENT, CHECKPOINT)), None,
     "recorded recorded broken verified", "broken"),
    ("another file of data", replace(INPUTS, sft=replace(SFT, data=FINGERPRINT)), None,
     "recorded broken verified verified", "broken"),
    ("the data names another", INPUTS, policy(OTHER_TEACHER), "broken verified verified verified", "broken"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("inputs", "sft_data", "expected", "whole"), [row[1:] for row in MARKS], ids=[m[0] for m in MARKS]
)
def test_each_link_of_an_artifact_has_its_mark(
    inputs: Inputs, sft_data: RolloutsRecord | None, expected: str, whole: str
) -> None:
    links = chain(inputs, sft_data)
    assert [link.thing for link in links] == ["SFT data", "SFT checkpoint", "rollouts", "artifact"]
    assert marks(links) == expected.split()
    assert weakest(links) == whole


def test_each_link_names_its_model_and_its_digest() -> None:
    links = chain(INPUTS, SFT_DATA)
    assert [(link.made, link.model) for link in links] == [
        ("written by", TEACHER),
        ("trained from", CHECKPOINT.base),
        ("sampled by", STUDENT),
        ("scored by", TEACHER),
    ]
    assert [link.digest for link in links] == [DATA, STUDENT.weights, DATA, FINGERPRINT]
    assert [link.prompts for link in links] == [DATA, None, DATA, None]


def test_a_checkpoint_of_sft_ends_the_chain() -> None:
    links = of_checkpoint(CHECKPOINT, STUDENT)
    assert [link.thing for link in links] == ["SFT data", "SFT checkpoint"]
    assert marks(links) == ["recorded", "recorded"]
    assert marks(of_checkpoint(CHECKPOINT, STUDENT, sft_data={DATA: SFT_DATA})) == ["verified", "verified"]
    assert marks(of_checkpoint(DECLARED_CHECKPOINT, STUDENT, sft_data={DATA: SFT_DATA})) == ["declared", "declared"]


def test_a_student_hangs_on_its_artifact() -> None:
    links = of_checkpoint(TRAINED, OTHER_STUDENT, artifact=make_manifest())
    assert links[:-1] == chain(INPUTS)
    assert (links[-1].thing, links[-1].mark, links[-1].model) == ("student", "verified", STUDENT)


def test_a_student_without_its_artifact_says_so() -> None:
    links = of_checkpoint(TRAINED, OTHER_STUDENT)
    assert [(link.thing, link.mark) for link in links] == [
        ("SFT data", "recorded"),
        ("artifact", "unknown"),
        ("student", "recorded"),
    ]
    assert links[1].digest == FINGERPRINT


def test_a_student_that_started_elsewhere_is_broken_off_and_names_what_was_overridden() -> None:
    record = replace(TRAINED, base=OTHER_TEACHER, overrides=("allow-inconsistent-teacher",))
    link = of_checkpoint(record, OTHER_STUDENT, artifact=make_manifest())[-1]
    assert link.mark == "broken"
    assert link.reason.endswith("; trained with --allow-inconsistent-teacher")


def test_a_record_beside_other_weights_is_broken_off() -> None:
    link = of_checkpoint(CHECKPOINT, OTHER_STUDENT)[-1]
    assert (link.mark, link.reason) == ("broken", "its record speaks of another model: weights differ")


def test_a_link_in_json_has_the_whole_identity() -> None:
    value = chain(INPUTS)[0].to_json()
    assert value["model"] == TEACHER.to_json()
    assert (value["thing"], value["made"], value["mark"]) == ("SFT data", "written by", "recorded")


# Several domains

OF_CODE = replace(SFT_DATA, policy=CODER)


def test_every_domain_has_a_branch_of_its_own() -> None:
    links = of_manifest(make_manifest(inputs=(MATH, CODE)), FINGERPRINT)
    assert [link.domain for link in links] == 4 * ["math"] + 4 * ["code"]
    assert marks(links) == 2 * ["recorded", "recorded", "verified", "verified"]
    assert [link.model for link in links if link.thing == "artifact"] == [TEACHER, CODER]


def test_a_domain_that_another_teacher_scored_breaks_its_own_branch() -> None:
    swapped = (replace(MATH, teacher=CODER), CODE)
    links = of_manifest(make_manifest(inputs=swapped), FINGERPRINT)
    assert [(link.domain, link.thing) for link in links if link.mark == "broken"] == [("math", "artifact")]


def test_a_checkpoint_of_several_files_is_verified_where_all_are_here() -> None:
    assert OF_BOTH.policy_checkpoint is not None and SFT_OF_CODE.data is not None
    record, both = OF_BOTH.policy_checkpoint, {DATA: SFT_DATA, SFT_OF_CODE.data: OF_CODE}
    links = of_checkpoint(record, STUDENT, sft_data=both)
    assert [(link.thing, link.domain) for link in links] == [
        ("SFT data", "math"),
        ("SFT data", "code"),
        ("SFT checkpoint", None),
    ]
    assert marks(links) == 3 * ["verified"]
    assert marks(of_checkpoint(record, STUDENT, sft_data={DATA: SFT_DATA})) == ["verified", "recorded", "recorded"]


def test_data_that_a_checkpoint_was_not_trained_on_breaks_it() -> None:
    other = replace(CODE, sft=replace(SFT_OF_CODE, data=FINGERPRINT))
    links = of_manifest(make_manifest(inputs=(MATH, other)), FINGERPRINT)
    assert [(link.domain, link.reason) for link in links if link.mark == "broken"] == [
        ("code", "it was trained on other data")
    ]


def test_a_student_is_held_to_the_policy_of_every_domain() -> None:
    both, other = (MATH, CODE), (MATH, replace(CODE, rollouts=replace(OF_BOTH, policy=OTHER_STUDENT)))
    unknown = (MATH, replace(CODE, rollouts=None))
    found = [
        of_checkpoint(TRAINED, OTHER_STUDENT, artifact=make_manifest(inputs=inputs))[-1]
        for inputs in (both, other, unknown)
    ]
    assert [(link.mark, link.domain) for link in found] == [("verified", None), ("broken", None), ("recorded", None)]
