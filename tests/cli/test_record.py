"""`lopd-store record` and `inspect --lineage` as a user runs them who sampled and fine-tuned elsewhere."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import lopd_store
import lopd_train
from lopd_store.digest import digest_file
from tests.commands import Ran, run_command
from tests.tiny import save_tiny_model

CONFIG = replace(lopd_train.OPD, steps=2, batch_rollouts=4, eval_fraction=0.2, device="cpu")


def store(line: str, *more: object) -> Ran:
    return run_command("lopd-store", *line.split(), *more)


@pytest.fixture
def elsewhere(here: Path, teacher_dir: Path, student_dir: Path, sft_file: Path, prompts_file: Path) -> Path:
    """What somebody brings: models, prompts, and the teacher's responses without a word of who wrote them."""
    for name, model in (("teacher", teacher_dir), ("sft", student_dir)):
        shutil.copytree(model, name)
    save_tiny_model(Path("base"), seed=7)
    shutil.copy(prompts_file, "prompts.jsonl")
    pq.write_table(pq.read_table(sft_file).replace_schema_metadata(None), "theirs.parquet")
    return here


def mark_of(ran: Ran) -> dict[str, str]:
    """The marks that `inspect --lineage --json` gives, by thing."""
    assert (ran.code, ran.stderr) == (0, "")
    return {link["thing"]: link["mark"] for link in ran.json["links"]}


def test_a_chain_from_elsewhere_is_declared_and_passes_the_gate(elsewhere: Path) -> None:
    ran = store("record sft-data theirs.parquet --teacher teacher --output sft.parquet --temperature 0.7")
    weights = lopd_store.identify("teacher").weights[7:19]
    assert ran == Ran(code=0, stdout=f"sft.parquet: declared, sampled by teacher (weights {weights}…)\n", stderr="")
    ran = store("record checkpoint sft --base base --sft-data sft.parquet --json")
    assert (ran.code, ran.json["record"]["status"], ran.json["record"]["sft"][0]["status"]) == (
        0,
        "declared",
        "declared",
    )

    sample = "generate --model sft --prompts prompts.jsonl --n 2 --max-response-tokens 16 --output rollouts.parquet"
    assert store(sample).code == 0
    ran = store("build --teacher teacher --rollouts rollouts.parquet --output artifact --workers 1 --json")
    assert (ran.code, ran.stderr, ran.json["consistency"]) == (0, "", "consistent")
    assert ran.json["inputs"][0]["sft"]["status"] == "declared"
    assert store("verify artifact --student sft").code == 0

    ran = store("inspect artifact --lineage --json")
    declared = dict.fromkeys(["SFT data", "SFT checkpoint", "rollouts", "artifact"], "declared")
    assert mark_of(ran) == declared
    assert (ran.json["weakest"], ran.json["consistency"]) == ("declared", "consistent")

    lopd_train.train(artifact="artifact", student="sft", output="trained", config=CONFIG)
    assert mark_of(store("inspect trained --lineage --json")) == {**declared, "student": "verified"}


def test_a_declared_checkpoint_named_to_build_stays_declared(elsewhere: Path, sft_file: Path) -> None:
    sample = "generate --model sft --prompts prompts.jsonl --max-response-tokens 8 --output rollouts.parquet"
    assert store(sample).code == 0
    assert store("record checkpoint sft --base base --sft-data", sft_file).code == 0
    build = "build --teacher teacher --rollouts rollouts.parquet --sft sft --output artifact --workers 1 --json"
    assert store(build).json["inputs"][0]["sft"]["status"] == "declared"
    marks = mark_of(store("inspect artifact --lineage --json"))
    assert marks == {
        "SFT data": "declared",
        "SFT checkpoint": "declared",
        "rollouts": "recorded",
        "artifact": "declared",
    }


def test_rollouts_from_elsewhere_are_declared_and_so_is_their_artifact(elsewhere: Path, rollouts_file: Path) -> None:
    pq.write_table(pq.read_table(rollouts_file).replace_schema_metadata(None), "sampled.parquet")
    assert store("record checkpoint sft --base base --sft-teacher teacher").code == 0
    assert store("record rollouts sampled.parquet --policy sft --output rollouts.parquet").code == 0
    ran = store("build --teacher teacher --rollouts rollouts.parquet --output artifact --workers 1 --json")
    assert (ran.json["consistency"], ran.json["inputs"][0]["sft"]["status"]) == ("consistent", "declared")
    assert ran.json["inputs"][0]["rollouts"]["status"] == "declared"


def test_a_declared_teacher_that_did_not_score_is_refused(elsewhere: Path, other_teacher_dir: Path) -> None:
    assert store("record checkpoint sft --base base --sft-teacher", other_teacher_dir).code == 0
    assert store("generate --model sft --prompts prompts.jsonl --max-response-tokens 8 --output r.parquet").code == 0
    ran = store("build --teacher teacher --rollouts r.parquet --output artifact --workers 1")
    assert "note: training will refuse this artifact: teacher consistency is inconsistent: " in ran.stderr
    assert store("verify artifact --student sft").code == 1
    ran = store("inspect artifact --lineage")
    assert "artifact: broken (the teacher is not the SFT teacher: weights differ)" in ran.stdout
    assert ran.stdout.endswith("weakest link: broken\nteacher consistency: inconsistent\n")


def test_a_chain_of_our_own_tools_is_verified_where_its_files_are(elsewhere: Path, sft_file: Path) -> None:
    lopd_train.train_sft(model="base", data=sft_file, output="reference", config=replace(CONFIG, learning_rate=1e-3))
    assert set(mark_of(store("inspect reference --lineage --json")).values()) == {"verified"}
    sample = "generate --model reference --prompts prompts.jsonl --n 2 --max-response-tokens 16 --output r.parquet"
    assert store(sample).code == 0
    assert store("build --teacher teacher --rollouts r.parquet --output artifact --workers 1").code == 0
    lopd_train.train(artifact="artifact", student="reference", output="trained", config=CONFIG)

    ran = store("inspect trained --lineage")
    reference, artifact = lopd_store.identify("reference"), lopd_store.open("artifact")

    def named(name: str) -> str:
        return f"{name}  weights {lopd_store.identify(name).weights[7:19]}…"

    data, prompts = digest_file(sft_file).sha256, digest_file(Path("prompts.jsonl")).sha256
    assert ran == Ran(
        code=0,
        stdout=f"""\
SFT data: verified (the file itself names this teacher)
  written by {named("teacher")}
  file {data}
  prompts {prompts}
└── SFT checkpoint reference: verified (this data is what it was trained on)
      trained from {named("base")}
      weights {reference.weights}
    └── rollouts: verified (the policy is this checkpoint)
          sampled by {named("reference")}
          file {artifact.manifest.inputs[0].rollouts_file}
          prompts {prompts}
        └── artifact: verified (the teacher is the SFT teacher)
              scored by {named("teacher")}
              fingerprint {artifact.fingerprint}
            └── student trained: verified (it started as the policy)
                  trained from {named("reference")}
                  weights {lopd_store.identify("trained").weights}
weakest link: verified
teacher consistency: consistent
""",
        stderr="",
    )
    shutil.rmtree("artifact")
    shutil.rmtree("reference")
    ran = store("inspect trained --lineage --json")
    assert mark_of(ran) == {"SFT data": "recorded", "artifact": "unknown", "student": "recorded"}
    assert ran.json["consistency"] is None


def test_an_artifact_without_provenance_has_unknown_links(unknown: Path) -> None:
    marks = mark_of(store("inspect --lineage --json", unknown))
    assert marks == {
        "SFT data": "unknown",
        "SFT checkpoint": "unknown",
        "rollouts": "recorded",
        "artifact": "recorded",
    }


def test_a_name_in_a_record_cannot_drive_the_terminal(elsewhere: Path) -> None:
    Path("sft").rename("evil\x1b[2J[red]")
    assert (
        run_command(
            "lopd-store", "record", "checkpoint", "evil\x1b[2J[red]", "--base", "base", "--sft-teacher", "teacher"
        ).code
        == 0
    )
    assert (
        "SFT checkpoint evil\\x1b[2J[red]: declared"
        in run_command("lopd-store", "inspect", "evil\x1b[2J[red]", "--lineage").stdout
    )


def test_what_has_no_lineage_says_what_to_type(elsewhere: Path) -> None:
    assert store("inspect sft --lineage") == Ran(
        code=2,
        stdout="",
        stderr="error: nothing says how `sft` was trained\n"
        "  expected  `lopd-provenance.json` beside its weights\n\n"
        "hint: lopd-store record checkpoint sft --base MODEL --sft-data FILE\n",
    )
    assert store("inspect nowhere --lineage").stderr.startswith("error: no artifact at `nowhere`\n")
    assert store("inspect sft --lineage --rollout 0").code == 2


def test_a_record_is_not_made_twice_and_not_without_a_teacher(elsewhere: Path) -> None:
    assert store("record checkpoint sft --base base") == Ran(
        code=2,
        stdout="",
        stderr="error: nothing says which teacher wrote the SFT data\n\n"
        "hint: name the teacher with `--sft-teacher`, or declare the data first with `lopd-store record sft-data`\n",
    )
    declare = "record checkpoint sft --base base --sft-teacher teacher"
    assert store(declare).code == 0
    assert store(declare) == Ran(
        code=2,
        stdout="",
        stderr="error: `sft/lopd-provenance.json` exists\n\n"
        "hint: pass `--force` to put a declared record in its place\n",
    )
    assert store(f"{declare} --force").code == 0
