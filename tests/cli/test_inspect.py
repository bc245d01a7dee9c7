"""`lopd-store inspect` and `identity` as a user runs them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import lopd_store
from lopd_store import manifest
from tests.commands import Ran, run_command
from tests.tiny import save_tiny_model


def inspect(artifact: Path | str, *more: object) -> Ran:
    return run_command("lopd-store", "inspect", artifact, *more)


def test_a_table_for_people_names_everything_once(sealed: Path) -> None:
    ran = inspect(sealed)
    opened = lopd_store.open(sealed)
    counts, teacher = opened.manifest.counts, opened.manifest.inputs[0].teacher
    assert (ran.code, ran.stderr) == (0, "")
    rows = dict(line.split("  ", 1) for line in ran.stdout.splitlines())
    assert {name: value.strip() for name, value in rows.items()} == {
        "artifact": str(sealed),
        "fingerprint": opened.fingerprint,
        "format": "lopd 1.0, compact",
        "rollouts": "18",
        "positions": f"{counts.positions} of {counts.tokens} tokens",
        "parts": "4",
        "top-k": f"mean k {counts.entries / counts.positions:.2f}; at most 64, coverage 0.99",
        "size": rows["size"].strip(),
        "teacher": f"teacher  weights {teacher.weights[7:19]}…",
        "licence": "unknown",
        "SFT teacher": f"teacher  weights {teacher.weights[7:19]}… (declared)",
        "SFT data audit": "none",
        "reference policy": rows["reference policy"].strip(),
        "rollouts audit": "none",
        "consistency": "consistent",
    }


def test_no_line_is_wrapped_padded_or_coloured(sealed: Path, teacher_dir: Path) -> None:
    for options in ((), ("--rollout", 3), ("--rollout", 3, "--model", teacher_dir)):
        lines = inspect(sealed, *options).stdout.splitlines()
        assert [line.rstrip() for line in lines] == lines
        assert not any("\x1b" in line for line in lines)


def test_the_same_facts_come_in_json(sealed: Path) -> None:
    ran = inspect(sealed, "--json")
    opened = lopd_store.open(sealed)
    assert (ran.code, ran.stderr) == (0, "")
    assert ran.json["counts"] == opened.manifest.counts.to_json()
    assert ran.json["fingerprint"] == opened.fingerprint
    (inputs,) = ran.json["inputs"]
    assert inputs["sft"]["teacher"] == inputs["teacher"] == opened.manifest.inputs[0].teacher.to_json()
    assert ran.json["bytes"] == sum(file.stat().st_size for file in (sealed / "parts").iterdir())


def test_an_artifact_without_sft_provenance_is_said_to_be_refused_by_training(unknown: Path) -> None:
    for options in ((), ("--json",)):
        ran = inspect(unknown, *options)
        assert ran.code == 0
        assert ran.stderr.startswith("note: training will refuse this artifact: teacher consistency is unknown: ")
    assert inspect(unknown, "--json").json["consistency"] == "unknown"


def test_a_rollout_is_shown_token_by_token(sealed: Path, teacher_dir: Path) -> None:
    stored = lopd_store.open(sealed).rollout(3)
    ran = inspect(sealed, "--rollout", 3, "--model", teacher_dir)
    assert (ran.code, ran.stderr) == (0, "")
    header, *lines = ran.stdout.splitlines()
    assert header.split() == ["position", "token", "teacher", "loss", "top-5", "of", "the", "teacher"]
    assert len(lines) == len(stored.response_ids)


def test_a_rollout_in_json_has_ids_text_and_the_five_most_likely(sealed: Path, teacher_dir: Path) -> None:
    from lopd_store import models

    stored = lopd_store.open(sealed).rollout(3)
    tokenizer = models.load_tokenizer(models.find(teacher_dir))
    ran = inspect(sealed, "--rollout", 3, "--model", teacher_dir, "--json")
    assert (ran.code, ran.stderr, ran.json["rollout"]) == (0, "", 3)
    positions = ran.json["positions"]
    assert [position["id"] for position in positions] == stored.response_ids.tolist()
    assert [position["sampled_logprob"] for position in positions] == stored.sampled_logprobs.tolist()
    assert [position["token"] for position in positions] == [tokenizer.decode([id]) for id in stored.response_ids]
    assert stored.topk is not None
    for number, position in enumerate(positions):
        here = stored.topk.slice(number, number + 1)
        assert [entry["id"] for entry in position["top"]] == here.ids.tolist()[:5]


def test_without_a_model_tokens_are_shown_by_their_ids(sealed: Path) -> None:
    stored = lopd_store.open(sealed).rollout(0)
    assert inspect(sealed, "--rollout", 0).stdout.splitlines()[1].split()[1] == f"#{stored.response_ids[0]}"
    assert inspect(sealed, "--rollout", 0, "--json").json["positions"][0]["token"] is None


@pytest.mark.parametrize("index", [-1, 18])
def test_a_rollout_that_is_not_there_is_a_usage_error(sealed: Path, index: int) -> None:
    text = f"error: there is no rollout {index}\n  expected  0 to 17\n"
    assert inspect(sealed, "--rollout", index) == Ran(code=2, stdout="", stderr=text)


def test_a_model_with_another_tokenizer_does_not_turn_ids_into_text(sealed: Path, tmp_path: Path) -> None:
    wide = save_tiny_model(tmp_path / "wide", vocab_size=310)
    ran = inspect(sealed, "--rollout", 0, "--model", wide)
    assert (ran.code, ran.stdout) == (2, "")
    assert ran.stderr.startswith(f"error: `{wide}` has another tokenizer than the artifact\n  expected  sha256:")


def test_a_model_without_a_rollout_is_a_usage_error(sealed: Path, teacher_dir: Path) -> None:
    text = f"error: `--model` goes with `--rollout`\n\nhint: lopd-store inspect {sealed} --rollout 0\n"
    assert inspect(sealed, "--model", teacher_dir) == Ran(code=2, stdout="", stderr=text)


def test_a_broken_part_is_an_error_and_no_traceback(artifact: Path) -> None:
    path = artifact / "parts/00000.tokens.zarr.zip"
    path.write_bytes(path.read_bytes()[:-10])
    ran = inspect(artifact, "--rollout", 0)
    assert (ran.code, ran.stdout) == (1, "")
    text = "error: `parts/00000.tokens.zarr.zip` was damaged\n\n"
    assert ran.stderr == f"{text}hint: lopd-store verify {artifact}\n"


def test_a_newer_format_is_refused_with_the_way_out(artifact: Path) -> None:
    path = artifact / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": "2.0"}))
    assert inspect(artifact) == Ran(
        code=1,
        stdout="",
        stderr=f"error[A013]: `{path}` has format version 2.0, which this lopd does not read\n"
        "  expected  1.x\n  actual    2.0\n\nhint: pip install --upgrade lopd\n",
    )


def test_a_name_in_a_manifest_cannot_drive_the_terminal(artifact: Path) -> None:
    path = artifact / "manifest.json"
    parsed = manifest.parse(path.read_bytes())
    (inputs,) = parsed.inputs
    teacher = replace(inputs.teacher, name="evil\x1b[2Jname\n\u202ereversed")
    path.write_bytes(manifest.render(replace(parsed, inputs=(replace(inputs, teacher=teacher),))))
    ran = inspect(artifact)
    assert ran.code == 0
    assert "teacher           evil\\x1b[2Jname\\n\\u202ereversed  weights " in ran.stdout


def test_an_identity_is_a_table_or_json(teacher_dir: Path) -> None:
    facts = lopd_store.identify(teacher_dir).to_json()
    ran = run_command("lopd-store", "identity", teacher_dir)
    assert (ran.code, ran.stderr) == (0, "")
    assert dict(line.split(maxsplit=1) for line in ran.stdout.splitlines()) == {
        name: "none" if value is None else str(value) for name, value in facts.items()
    }
    assert run_command("lopd-store", "identity", teacher_dir, "--json").json == facts
