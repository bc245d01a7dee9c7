"""Two teachers and two SFT records through the commands: one combination trains, three are refused with a reason."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import lopd_store
from lopd_store.digest import digest_file
from tests.commands import Ran, run_command

SETTINGS = ("--steps", 2, "--batch-rollouts", 4, "--eval-fraction", 0.2, "--device", "cpu")
OTHER_TEACHER = "the SFT data was written by another teacher than the one that scored the rollouts"
NO_RECORD = "nothing says which teacher wrote the SFT data of the reference policy"


@pytest.fixture(scope="module")
def made(
    teacher_dir: Path,
    other_teacher_dir: Path,
    student_dir: Path,
    prompts_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """An SFT checkpoint with a record and the same without; its rollouts scored by both teachers: four artifacts."""
    here = tmp_path_factory.mktemp("gate")

    def done(program: str, *arguments: object) -> None:
        ran = run_command(program, *arguments)
        assert ran.code == 0, ran.stderr

    sampling = ("--prompts", prompts_file, "--max-response-tokens", 20, "--n", 4)
    data, checkpoint = here / "sft.parquet", here / "sft"
    done("lopd-store", "generate", "--model", teacher_dir, "--output", data, *sampling)
    done("lopd-train", "sft", "--model", student_dir, "--data", data, "--output", checkpoint, *SETTINGS)
    for record in ("recorded", "unknown"):
        if record == "unknown":
            (checkpoint / "lopd-provenance.json").rename(here / "kept.json")
        rollouts = here / f"{record}.parquet"
        done("lopd-store", "generate", "--model", checkpoint, "--output", rollouts, *sampling)
        for name, teacher in (("same", teacher_dir), ("other", other_teacher_dir)):
            scored = ("--teacher", teacher, "--rollouts", rollouts, "--workers", 1)
            done("lopd-store", "build", *scored, "--output", here / f"{record}-{name}")
    (here / "kept.json").rename(here / "sft" / "lopd-provenance.json")
    return here


def opd(made: Path, artifact: str, output: Path, *more: object) -> Ran:
    where = ("--artifact", made / artifact, "--student", made / "sft", "--output", output)
    return run_command("lopd-train", "opd", *where, *SETTINGS, *more)


def test_the_teacher_that_wrote_the_sft_data_trains(made: Path, tmp_path: Path) -> None:
    ran = opd(made, "recorded-same", tmp_path / "opd")
    assert ran.code == 0, ran.stderr
    record = json.loads((tmp_path / "opd" / "lopd-provenance.json").read_text())
    assert record["overrides"] == [] and record["method"] == "opd"


@pytest.mark.parametrize(
    ("artifact", "state", "reason", "flag"),
    [
        ("recorded-other", "inconsistent", OTHER_TEACHER, "--allow-inconsistent-teacher"),
        ("unknown-same", "unknown", NO_RECORD, "--allow-unknown-sft-teacher"),
        ("unknown-other", "unknown", NO_RECORD, "--allow-unknown-sft-teacher"),
    ],
)
class TestRefusal:
    """What is refused, and what is written down when somebody insists."""

    def test_it_has_its_reason_and_leaves_nothing(
        self, made: Path, tmp_path: Path, artifact: str, state: str, reason: str, flag: str
    ) -> None:
        ran = opd(made, artifact, tmp_path / "opd")
        assert ran.code == 1 and f"teacher consistency is {state}: {reason}" in ran.stderr
        assert f"pass `{flag}`" in ran.stderr and not (tmp_path / "opd").exists()

    def test_the_other_override_does_not_help(
        self, made: Path, tmp_path: Path, artifact: str, state: str, reason: str, flag: str
    ) -> None:
        (other,) = {"--allow-inconsistent-teacher", "--allow-unknown-sft-teacher"} - {flag}
        assert opd(made, artifact, tmp_path / "opd", other).code == 1

    def test_its_own_override_trains_and_is_written_down(
        self, made: Path, tmp_path: Path, artifact: str, state: str, reason: str, flag: str
    ) -> None:
        assert opd(made, artifact, tmp_path / "opd", flag).code == 0
        name = flag.removeprefix("--")
        record = json.loads((tmp_path / "opd" / "lopd-provenance.json").read_text())
        run = json.loads((tmp_path / "opd" / "run.json").read_text())
        assert record["overrides"] == [name] and run["overrides"] == [name] and run["verdict"] == state


# docs/gate.md, several teachers

TEXT = (Path(__file__).parents[2] / "docs" / "gate.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^```\n(.*?)^```$", TEXT.partition("## Several teachers")[2], re.DOTALL | re.MULTILINE)[0]


def test_a_student_of_two_teachers_learns_each_domain_of_its_own(
    teacher_dir: Path,
    other_teacher_dir: Path,
    student_dir: Path,
    prompts_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = prompts_file.read_text().splitlines(keepends=True)
    Path("math.jsonl").write_text("".join(lines[:3]))
    Path("code.jsonl").write_text("".join(lines[3:]))
    more = {
        "generate": ["--max-response-tokens", 20, "--n", 4],
        "sft": SETTINGS,
        "opd": SETTINGS,
        "build": ["--workers", 1],
    }
    places = {"MATH_TEACHER": teacher_dir, "CODE_TEACHER": other_teacher_dir, "STUDENT": student_dir}
    commands = COMMANDS.splitlines()
    assert len(commands) == 11
    for line in commands:
        program, command, *words = [places.get(word, word) for word in line.split()]
        ran = run_command(str(program), command, *words, *more.get(str(command), []))
        assert ran.code == 0, ran.stderr
    record, both = json.loads(Path("trained/lopd-provenance.json").read_text()), lopd_store.open("both")
    assert (record["data"], record["overrides"]) == (both.fingerprint, [])
    assert record["sft"] == [one.sft.to_json() for one in both.manifest.inputs]
    card = Path("trained/README.md").read_text()
    assert "A student of `teacher` and `other-teacher`, trained" in card and "| teacher, code | `other-teacher`" in card
    chain = run_command("lopd-store", "inspect", "trained", "--lineage").stdout
    assert "math: artifact: verified" in chain and "code: artifact: verified" in chain
    assert "\nstudent trained: verified (it started as the policy)\n" in chain
    assert chain.endswith("weakest link: verified\nteacher consistency: consistent\n")

    for domain, teacher in (("math", other_teacher_dir), ("code", teacher_dir)):
        scored = ("--teacher", teacher, "--rollouts", f"{domain}-rollouts.parquet", "--domain", domain, "--workers", 1)
        assert run_command("lopd-store", "build", *scored, "--output", f"wrong-{domain}").code == 0
    assert run_command("lopd-store", "combine", "wrong-math", "wrong-code", "--output", "swapped").code == 0
    found = run_command("lopd-store", "verify", "swapped", "--student", "sft").stderr
    assert f"domain math: {OTHER_TEACHER}" in found and f"domain code: {OTHER_TEACHER}" in found
    assert run_command("lopd-store", "combine", "math", "wrong-code", "--output", "half").code == 0
    for artifact, domain in (("swapped", "math"), ("half", "code")):
        ran = run_command("lopd-train", "opd", "--artifact", artifact, "--student", "sft", "--output", "no", *SETTINGS)
        assert ran.code == 1 and f"teacher consistency is inconsistent: domain {domain}: {OTHER_TEACHER}" in ran.stderr
        assert not Path("no").exists()
    allowed = ("--artifact", "half", "--student", "sft", "--output", "no", "--allow-inconsistent-teacher")
    assert run_command("lopd-train", "opd", *allowed, *SETTINGS).code == 0
    assert f"- teacher, **inconsistent**: domain code: {OTHER_TEACHER}" in Path("no/README.md").read_text()

    # SFT data that is mixed in must be one of the teachers', and may be any of theirs.
    mixing = ("--artifact", "both", "--student", "sft", "--output", "mixed", "--sft-weight", "0.1", *SETTINGS)
    ran = run_command("lopd-train", "opd", *mixing, "--sft-data", "code-rollouts.parquet")
    assert ran.code == 1 and "the SFT data was written by another teacher" in ran.stderr
    ran = run_command("lopd-train", "opd", *mixing, "--sft-data", "code-sft.parquet")
    assert ran.code == 0, ran.stderr
    mixed = json.loads(Path("mixed/run.json").read_text())["inputs"]["sft_data"]["digest"]
    assert mixed == digest_file(Path("code-sft.parquet")).sha256
    assert f"| SFT data mixed in | `{mixed}` |" in Path("mixed/README.md").read_text()
