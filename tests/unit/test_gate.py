"""The gate as a table: who may train from what, and which overrides it takes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lopd_store.errors import ConsistencyError
from lopd_store.gate import ALLOW_INCONSISTENT, ALLOW_UNKNOWN, OVERRIDES, enforce, judge
from lopd_store.identity import ModelIdentity
from lopd_store.manifest import Inputs
from lopd_store.provenance import UNKNOWN_SFT
from lopd_store.statistic import SftAudit, Statistic
from tests.artifacts import identity_named
from tests.records import CODE, CODER, INPUTS, MATH, OF_BOTH, OTHER_STUDENT, OTHER_TEACHER, SFT, STUDENT

UNKNOWN_TEACHER = replace(INPUTS, sft=UNKNOWN_SFT)
OTHER_SFT_TEACHER = replace(INPUTS, sft=replace(SFT, teacher=OTHER_TEACHER))
UNKNOWN_POLICY = replace(INPUTS, rollouts=None)
OTHER_TOKENIZER = identity_named("student", tokenizer=identity_named("x").weights)
LARGER_VOCABULARY = identity_named("student", vocab_size=301)
WIDER_TEACHER = identity_named("teacher", output_width=512)  # its head is padded further than the student's
WIDER = replace(INPUTS, teacher=WIDER_TEACHER, sft=replace(SFT, teacher=WIDER_TEACHER))

ACCUSED = Statistic(positions=20_000, outside=0, score=-900.0, variance=40_000.0)
HONEST = replace(ACCUSED, score=90.0)
TOO_LITTLE = replace(ACCUSED, positions=100)
ACCUSED_SFT, HONEST_SFT, LITTLE_SFT = (
    replace(INPUTS, sft_audit=SftAudit(data=SFT.data or "", temperature=1.0, top_p=1.0, found=found))
    for found in (ACCUSED, HONEST, TOO_LITTLE)
)
ACCUSED_ROLLOUTS, HONEST_ROLLOUTS, LITTLE_ROLLOUTS = (
    replace(INPUTS, rollouts_audit=found) for found in (ACCUSED, HONEST, TOO_LITTLE)
)

TABLE = [
    # inputs, student, state, subjects, overrides that are needed
    (INPUTS, STUDENT, "consistent", (), ()),
    (INPUTS, None, "consistent", (), ()),
    (WIDER, STUDENT, "consistent", (), ()),
    (UNKNOWN_TEACHER, STUDENT, "unknown", ("teacher",), (ALLOW_UNKNOWN,)),
    (UNKNOWN_TEACHER, None, "unknown", ("teacher",), (ALLOW_UNKNOWN,)),
    (OTHER_SFT_TEACHER, STUDENT, "inconsistent", ("teacher",), (ALLOW_INCONSISTENT,)),
    (INPUTS, OTHER_STUDENT, "inconsistent", ("student",), (ALLOW_INCONSISTENT,)),
    (UNKNOWN_POLICY, STUDENT, "unknown", ("student",), (ALLOW_UNKNOWN,)),
    (UNKNOWN_POLICY, None, "consistent", (), ()),
    (UNKNOWN_TEACHER, OTHER_STUDENT, "inconsistent", ("teacher", "student"), (ALLOW_INCONSISTENT, ALLOW_UNKNOWN)),
    (OTHER_SFT_TEACHER, OTHER_STUDENT, "inconsistent", ("teacher", "student"), (ALLOW_INCONSISTENT,)),
    (HONEST_SFT, STUDENT, "consistent", (), ()),
    (LITTLE_SFT, STUDENT, "consistent", (), ()),
    (ACCUSED_SFT, STUDENT, "inconsistent", ("SFT data",), (ALLOW_INCONSISTENT,)),
    (ACCUSED_SFT, None, "inconsistent", ("SFT data",), (ALLOW_INCONSISTENT,)),
    (HONEST_ROLLOUTS, STUDENT, "consistent", (), ()),
    (LITTLE_ROLLOUTS, STUDENT, "consistent", (), ()),
    (ACCUSED_ROLLOUTS, STUDENT, "inconsistent", ("rollouts",), (ALLOW_INCONSISTENT,)),
    (ACCUSED_ROLLOUTS, None, "inconsistent", ("rollouts",), (ALLOW_INCONSISTENT,)),
    (replace(ACCUSED_SFT, sft=UNKNOWN_SFT), None, "inconsistent", ("teacher", "SFT data"), OVERRIDES),
    (replace(HONEST_SFT, sft=UNKNOWN_SFT), None, "unknown", ("teacher",), (ALLOW_UNKNOWN,)),
]
TABLE_NAMES = ("inputs", "student", "state", "subjects", "needed")


@pytest.mark.parametrize(TABLE_NAMES, TABLE)
def test_the_verdict_names_its_state_and_subjects(
    inputs: Inputs, student: ModelIdentity | None, state: str, subjects: tuple[str, ...], needed: tuple[str, ...]
) -> None:
    verdict = judge([inputs], student)
    assert verdict.state == state
    assert tuple(finding.subject for finding in verdict.findings) == subjects


@pytest.mark.parametrize(TABLE_NAMES, TABLE)
def test_only_the_overrides_that_are_needed_are_used(
    inputs: Inputs, student: ModelIdentity | None, state: str, subjects: tuple[str, ...], needed: tuple[str, ...]
) -> None:
    assert enforce(judge([inputs], student), OVERRIDES) == tuple(sorted(needed))


@pytest.mark.parametrize(TABLE_NAMES, [row for row in TABLE if row[4]])
def test_one_override_too_few_is_refused(
    inputs: Inputs, student: ModelIdentity | None, state: str, subjects: tuple[str, ...], needed: tuple[str, ...]
) -> None:
    for missing in needed:
        with pytest.raises(ConsistencyError, match=f"or, knowing that the gradient is biased, pass `--{missing}`"):
            enforce(judge([inputs], student), [override for override in OVERRIDES if override != missing])


@pytest.mark.parametrize("student", [OTHER_TOKENIZER, LARGER_VOCABULARY])
def test_another_tokenizer_is_never_overridden(student: ModelIdentity) -> None:
    verdict = judge([replace(INPUTS, rollouts=None)], student)
    assert verdict.findings[-1].subject == "tokenizer"
    with pytest.raises(
        ConsistencyError, match=r"the student's tokenizer is not the teacher's(?s:.)*hint: .*tokenizer$"
    ):
        enforce(verdict, OVERRIDES)


def test_a_refusal_shows_both_identities_where_they_differ() -> None:
    with pytest.raises(ConsistencyError) as refusal:
        enforce(judge([OTHER_SFT_TEACHER]))
    wanted, found = (identity.weights[7:19] for identity in (OTHER_TEACHER, INPUTS.teacher))
    assert str(refusal.value) == (
        "teacher consistency is inconsistent: "
        "the SFT data was written by another teacher than the one that scored the rollouts\n"
        f"  expected  other-teacher  (weights {wanted}…)\n"
        f"  actual    teacher  (weights {found}…)\n\n"
        "hint: score the rollouts with the teacher that wrote the SFT data; "
        "or, knowing that the gradient is biased, pass `--allow-inconsistent-teacher`"
    )


def test_a_refusal_for_an_audit_shows_what_was_found() -> None:
    weights = INPUTS.teacher.weights[7:19]
    with pytest.raises(ConsistencyError) as refusal:
        enforce(judge([ACCUSED_SFT]))
    assert str(refusal.value).startswith(
        "teacher consistency is inconsistent: the audit finds that the teacher did not write the SFT data\n"
        f"  expected  samples of teacher  (weights {weights}…)\n"
        "  actual    z -4.5, -0.0450 nat per token (-0.0646 to -0.0254), 20,000 positions\n"
    )


def test_a_refusal_for_want_of_provenance_says_how_to_name_it() -> None:
    with pytest.raises(ConsistencyError, match=r"  actual    unknown\n\nhint: .*`lopd-store build --sft …`"):
        enforce(judge([UNKNOWN_TEACHER]))


@pytest.mark.parametrize("name", ["name", "revision"])
def test_where_a_model_came_from_takes_no_part(name: str) -> None:
    assert judge([INPUTS], identity_named("student", **{name: "elsewhere"})).state == "consistent"


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": identity_named("x").weights},
        {"config": identity_named("x").weights},
        {"chat_template": identity_named("x").weights},
        {"adapter": identity_named("x").weights},
        {"quantization": "gguf"},
        {"output_width": 321},
    ],
)
def test_every_other_difference_makes_another_student(changes: dict[str, object]) -> None:
    (finding,) = judge([INPUTS], identity_named("student", **changes)).findings
    assert (finding.subject, finding.differences) == ("student", tuple(changes))


# Several domains

BOTH = (MATH, CODE)
SWAPPED = (replace(MATH, teacher=CODER), replace(CODE, teacher=MATH.teacher))
DOMAINS = [
    # inputs, student, state, (subject, whose), overrides that are needed
    (BOTH, STUDENT, "consistent", [], ()),
    (BOTH, None, "consistent", [], ()),
    (
        SWAPPED,
        STUDENT,
        "inconsistent",
        [("teacher", "domain math: "), ("teacher", "domain code: ")],
        (ALLOW_INCONSISTENT,),
    ),
    ((MATH, replace(CODE, sft=UNKNOWN_SFT)), STUDENT, "unknown", [("teacher", "domain code: ")], (ALLOW_UNKNOWN,)),
    (BOTH, OTHER_STUDENT, "inconsistent", [("student", "the student is not ")], (ALLOW_INCONSISTENT,)),
    (
        (MATH, replace(CODE, rollouts=replace(OF_BOTH, policy=OTHER_STUDENT))),
        STUDENT,
        "inconsistent",
        [("student", "domain code: the student is not ")],
        (ALLOW_INCONSISTENT,),
    ),
    (
        (MATH, replace(CODE, domain="chat", rollouts=None), replace(CODE, rollouts=None)),
        STUDENT,
        "unknown",
        [("student", "domains chat, code: nothing says which reference policy")],
        (ALLOW_UNKNOWN,),
    ),
    (
        (replace(MATH, sft_audit=ACCUSED_SFT.sft_audit), replace(CODE, rollouts_audit=ACCUSED)),
        None,
        "inconsistent",
        [("SFT data", "domain math: the audit finds"), ("rollouts", "domain code: the audit finds")],
        (ALLOW_INCONSISTENT,),
    ),
    (
        (MATH, replace(CODE, sft=UNKNOWN_SFT), replace(MATH, domain="chat", teacher=OTHER_TEACHER)),
        None,
        "inconsistent",
        [("teacher", "domain code: nothing says"), ("teacher", "domain chat: the SFT data was written by another")],
        OVERRIDES,
    ),
]


@pytest.mark.parametrize(("inputs", "student", "state", "found", "needed"), DOMAINS)
def test_each_domain_is_judged_by_itself_and_named_where_others_differ(
    inputs: tuple[Inputs, ...],
    student: ModelIdentity | None,
    state: str,
    found: list[tuple[str, str]],
    needed: tuple[str, ...],
) -> None:
    verdict = judge(inputs, student)
    assert verdict.state == state
    assert [finding.subject for finding in verdict.findings] == [subject for subject, _ in found]
    for finding, (_, reason) in zip(verdict.findings, found, strict=True):
        assert finding.reason.startswith(reason)
    assert enforce(verdict, OVERRIDES) == tuple(sorted(needed))


@pytest.mark.parametrize("student", [OTHER_TOKENIZER, LARGER_VOCABULARY])
def test_another_tokenizer_is_found_once_however_many_domains_there_are(student: ModelIdentity) -> None:
    findings = judge([replace(one, rollouts=None) for one in BOTH], student).findings
    assert [finding.subject for finding in findings] == ["student", "tokenizer"]
    assert findings[-1].reason == "the student's tokenizer is not the teacher's"


def test_a_refusal_names_the_domain_and_shows_its_two_teachers() -> None:
    with pytest.raises(ConsistencyError) as refusal:
        enforce(judge(SWAPPED))
    assert str(refusal.value).startswith(
        "teacher consistency is inconsistent: domain math: "
        "the SFT data was written by another teacher than the one that scored the rollouts\n"
        f"  expected  teacher  (weights {MATH.teacher.weights[7:19]}…)\n"
        f"  actual    coder  (weights {CODER.weights[7:19]}…)\n"
    )
