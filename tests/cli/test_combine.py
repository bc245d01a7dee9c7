"""Several teachers as a user runs them: `build --domain`, `combine`, `inspect`, `verify`, and what goes wrong."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import lopd_store
from lopd_store.identity import identify
from lopd_store.rollouts import RolloutsFile
from tests.commands import Ran, run_command
from tests.records import CHECKPOINT, SFT_OF_CODE, SFT_OF_MATH, policy


def store(*words: object) -> Ran:
    return run_command("lopd-store", *words)


@pytest.fixture(scope="session")
def made(
    teacher_dir: Path,
    other_teacher_dir: Path,
    student_dir: Path,
    rollouts_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Rollouts of a policy with SFT data of two teachers, an artifact of each teacher, and both combined."""
    here, student = tmp_path_factory.mktemp("domains"), identify(student_dir)
    sft = tuple(
        replace(one, teacher=identify(teacher))
        for one, teacher in ((SFT_OF_MATH, teacher_dir), (SFT_OF_CODE, other_teacher_dir))
    )
    record = policy(student, replace(CHECKPOINT, model=student, data=None, sft=sft))
    RolloutsFile(rollouts_file).copy(here / "rollouts.parquet", record)
    for domain, teacher in (("math", teacher_dir), ("code", other_teacher_dir)):
        options = ("--rollouts", here / "rollouts.parquet", "--domain", domain, "--workers", 1)
        assert store("build", "--teacher", teacher, *options, "--output", here / domain).code == 0
    assert store("combine", here / "math", here / "code", "--output", here / "both").code == 0
    return here


def test_build_takes_the_sft_teacher_of_the_domain(made: Path) -> None:
    for domain in ("math", "code"):
        (inputs,) = lopd_store.open(made / domain).manifest.inputs
        assert (inputs.domain, inputs.sft.domain, inputs.sft.teacher) == (domain, domain, inputs.teacher)


@pytest.mark.parametrize(
    ("options", "message", "actual"),
    [
        ((), "was fine-tuned on SFT data of several domains, and none is named", ""),
        (("--domain", "chat"), "was fine-tuned on no SFT data of the domain `chat`", "  actual    chat\n"),
    ],
)
def test_build_names_the_domains_that_there_are(
    made: Path, teacher_dir: Path, here: Path, options: tuple[str, ...], message: str, actual: str
) -> None:
    ran = store(
        "build", "--teacher", teacher_dir, "--rollouts", made / "rollouts.parquet", "--output", "artifact", *options
    )
    assert (ran.code, ran.stdout) == (2, "")
    assert f"{message}\n  expected  math, code\n{actual}" in ran.stderr
    assert "hint: name the domain of the rollouts, `--domain NAME`" in ran.stderr and list(here.iterdir()) == []


def test_build_refuses_a_domain_that_can_be_no_name(teacher_dir: Path, rollouts_file: Path, here: Path) -> None:
    ran = store(
        "build", "--teacher", teacher_dir, "--rollouts", rollouts_file, "--output", "a", "--domain", "Two words"
    )
    assert ran.code == 2 and "`Two words` is not a name for a domain" in ran.stderr


def test_inspect_shows_every_domain(made: Path, teacher_dir: Path, other_teacher_dir: Path) -> None:
    ran = store("inspect", made / "both")
    assert (ran.code, ran.stderr) == (0, "")
    rows = [line.split(maxsplit=1) for line in ran.stdout.splitlines()]
    artifact = lopd_store.open(made / "both")
    sizes = [artifact.manifest.counts_of(index) for index in (0, 1)]
    assert [words for name, words in rows if name == "domain"] == [
        f"{domain}: {size.rollouts:,} rollouts, {size.positions:,} positions"
        for domain, size in zip(("math", "code"), sizes, strict=True)
    ]
    weights = [identify(teacher).weights[7:19] for teacher in (teacher_dir, other_teacher_dir)]
    shown = [words for name, words in rows if name == "teacher"]
    assert [text.split()[-1] for text in shown] == [f"{one}…" for one in weights]
    assert rows[-1] == ["consistency", "consistent"]


def test_the_lineage_is_drawn_with_a_branch_per_domain(made: Path) -> None:
    ran = store("inspect", made / "both", "--lineage")
    titles = [line for line in ran.stdout.splitlines() if "artifact: " in line or "SFT data: " in line]
    assert [title.strip(" └─") for title in titles] == [
        "math: SFT data: recorded (the file is not here to compare)",
        "math: artifact: verified (the teacher is the SFT teacher)",
        "code: SFT data: recorded (the file is not here to compare)",
        "code: artifact: verified (the teacher is the SFT teacher)",
    ]
    assert [title.startswith(("math", "code")) for title in titles] == [True, False, True, False]
    assert ran.stdout.endswith("weakest link: recorded\nteacher consistency: consistent\n")


def test_combine_answers_with_the_facts_of_what_it_made(made: Path, here: Path) -> None:
    ran = store("combine", made / "code", made / "math", "--output", "both", "--json")
    assert (ran.code, ran.stderr) == (0, "")
    assert [one["domain"] for one in ran.json["inputs"]] == ["code", "math"]
    assert ran.json["consistency"] == "consistent"
    assert ran.json["fingerprint"] == lopd_store.open("both").fingerprint
    assert store("verify", "both").code == 0


def test_a_domain_is_named_on_the_command_line(sealed: Path, made: Path, here: Path) -> None:
    Path("ours=artifact").symlink_to(sealed)
    assert store("combine", f"chat={sealed}", made / "code", "--output", "named").code == 0
    assert [one.domain for one in lopd_store.open("named").manifest.inputs] == ["chat", "code"]
    ran = store("combine", "ours=artifact", made / "code", "--output", "path")
    assert ran.code == 2 and "hint: name it: DOMAIN=ours=artifact" in ran.stderr


def test_what_does_not_go_together_is_said_with_both_sides(
    teacher_dir: Path, rollouts_file: Path, made: Path, here: Path
) -> None:
    options = ("--rollouts", rollouts_file, "--workers", 1, "--k-max", 40, "--output", "other")
    assert store("build", "--teacher", teacher_dir, *options).code == 0
    ran = store("combine", made / "math", "chat=other", "--output", "both")
    assert ran == Ran(
        code=2,
        stdout="",
        stderr=f"error: `other` does not go with `{made / 'math'}`: another encoding\n"
        "  expected  `selection.k_max` 64\n  actual    `selection.k_max` 40\n\n"
        "hint: build all with the same `--k-max`, `--coverage` and so on, and with `--reference` all or none\n",
    )
    assert [path.name for path in here.iterdir()] == ["other"]


def test_a_teacher_scores_again_only_what_is_its_own(
    made: Path, teacher_dir: Path, other_teacher_dir: Path, student_dir: Path
) -> None:
    opened = lopd_store.open(made / "both")
    for index, teacher in enumerate((teacher_dir, other_teacher_dir)):
        ran = store("verify", made / "both", "--rescore", 1000, "--teacher", teacher, "--json")
        assert ran.code == 0, ran.stderr
        assert ran.json["rescored"]["rollouts"] == list(opened.rollouts_of(index))
    ran = store("verify", made / "both", "--rescore", 2, "--teacher", student_dir)
    weights = [one.teacher.weights for one in opened.manifest.inputs]
    assert ran.code == 2 and "is none of the teachers of this artifact" in ran.stderr
    assert f"expected  math: teacher, weights {weights[0]}, code: other-teacher, weights {weights[1]}\n" in ran.stderr


def test_a_partial_copy_keeps_its_inputs_and_is_scored_again_in_part(
    made: Path, teacher_dir: Path, other_teacher_dir: Path, here: Path
) -> None:
    opened = lopd_store.open(made / "both")
    first = opened.manifest.parts_of(1).start
    stop = len(opened.manifest.parts)
    assert store("subset", made / "both", "--parts", f"{first}:{stop}", "--output", "code").code == 0
    copy = lopd_store.open("code")
    assert (copy.manifest == opened.manifest and copy.rollouts_of(0) == range(0)[:0]) or not copy.rollouts_of(0)
    assert copy.rollouts_of(1) == opened.rollouts_of(1)
    assert store("verify", "code", "--rescore", 2, "--teacher", other_teacher_dir).code == 0
    ran = store("verify", "code", "--rescore", 2, "--teacher", teacher_dir)
    assert ran.code == 2 and "`code` is a copy without rollouts that" in ran.stderr


def test_the_gate_names_the_domain_that_another_teacher_scored(
    made: Path, teacher_dir: Path, other_teacher_dir: Path, student_dir: Path, here: Path
) -> None:
    options = ("--rollouts", made / "rollouts.parquet", "--domain", "code", "--workers", 1, "--output", "wrong")
    assert store("build", "--teacher", teacher_dir, *options).code == 0
    ran = store("combine", made / "math", "wrong", "--output", "both")
    assert (
        ran.code == 0 and "note: training will refuse this artifact: teacher consistency is inconsistent" in ran.stderr
    )
    ran = store("verify", "both", "--student", student_dir)
    assert ran.code == 1 and ran.stderr.count("error[A080]") == 1
    assert (
        "`inputs (teacher)`: teacher consistency is inconsistent: domain code: the SFT data was written" in ran.stderr
    )
    assert store("verify", made / "both", "--student", student_dir).code == 0


def test_a_checkpoint_is_declared_with_the_data_of_each_domain(
    student_dir: Path, teacher_dir: Path, other_teacher_dir: Path, sft_file: Path, here: Path
) -> None:
    shutil.copytree(student_dir, "sft")
    words = ("record", "checkpoint", "sft", "--base", student_dir, "--force", "--json")
    data = ("--sft-data", f"math={sft_file}", "--sft-teacher", f"code={other_teacher_dir}")
    record = store(*words, *data).json["record"]
    assert record["data"] is None
    assert [(one["domain"], one["status"]) for one in record["sft"]] == [("math", "declared"), ("code", "declared")]
    teachers = [one["teacher"]["weights"] for one in record["sft"]]
    assert teachers == [identify(one).weights for one in (teacher_dir, other_teacher_dir)]
    ran = store(*words, "--sft-data", sft_file, "--sft-teacher", f"code={other_teacher_dir}")
    assert ran.code == 2 and "do not name the same domains\n  expected  None\n  actual    code" in ran.stderr
    ran = store(*words, "--sft-data", f"math={sft_file}", "--sft-data", sft_file)
    assert ran.code == 2 and "needs a domain\n  expected  --sft-data DOMAIN=VALUE, once per domain" in ran.stderr
    ran = store(*words, *(word for _ in range(2) for word in ("--sft-data", f"math={sft_file}")))
    assert ran.code == 2 and "names a domain twice" in ran.stderr
    ran = store(*words, "--sft-data", f"Math={sft_file}")
    assert ran.code == 2 and "`sft_data` does not name domains" in ran.stderr
