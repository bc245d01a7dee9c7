"""The card of a trained model says where it comes from, and what was overridden to make it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import yaml

import lopd_train
from lopd_store.gate import ALLOW_INCONSISTENT, ALLOW_UNKNOWN
from lopd_store.license import License
from lopd_store.manifest import Manifest
from lopd_store.provenance import UNKNOWN_SFT, CheckpointRecord, read_checkpoint_record
from lopd_store.statistic import SftAudit, Statistic
from lopd_train.card import MODEL_CARD, render_model_card
from lopd_train.config import TrainConfig
from tests.artifacts import identity_named
from tests.records import CHECKPOINT, DATA, INPUTS, OTHER_TEACHER, ROLLOUTS, SFT, STUDENT, make_manifest
from tests.train.conftest import build

RECORD = replace(CHECKPOINT, method="opd", model=identity_named("trained"), base=STUDENT, data=DATA)
ON_HUB = identity_named("acme/base", revision="0123abcd")


def card(record: CheckpointRecord = RECORD, manifest: Manifest | None = None) -> str:
    return render_model_card(record, lopd_train.OPD, make_manifest() if manifest is None else manifest)


def front_matter(text: str) -> dict[str, object]:
    found: dict[str, object] = yaml.safe_load(text.split("---\n")[1])
    return found


def test_a_run_writes_its_card_beside_the_model(
    artifact: Path, reference: Path, config: TrainConfig, tmp_path: Path
) -> None:
    output = lopd_train.train_opd(
        artifact=artifact, student=reference, output=tmp_path / "trained", config=replace(config, steps=1)
    ).output
    text, record = (output / MODEL_CARD).read_text(), read_checkpoint_record(output)
    assert record is not None
    for said in ("# `trained`", f"| artifact | `{record.data}` |", record.model.weights, record.base.weights):
        assert said in text
    assert "| teacher consistency | **consistent** |" in text and "| overridden | nothing |" in text
    assert "| objective | `sampled` |" in text and "| `steps` | `1` |" in text
    assert "4. artifact, **verified** (the teacher is the SFT teacher): scored by `teacher`" in text
    assert "5. student, **verified** (it started as the policy): trained from `reference`" in text
    assert "**Trained against" not in text and "What the gate found" not in text


def test_what_was_overridden_stands_at_the_top(
    other_teacher_dir: Path, rollouts: Path, reference: Path, config: TrainConfig, tmp_path: Path
) -> None:
    output = lopd_train.train_opd(
        artifact=build(other_teacher_dir, rollouts, tmp_path / "artifact"),
        student=reference,
        output=tmp_path / "trained",
        config=replace(config, steps=1),
        overrides=[ALLOW_INCONSISTENT],
    ).output
    text = (output / MODEL_CARD).read_text()
    assert "**Trained against a refusal of the gate:** `--allow-inconsistent-teacher`." in text
    assert "| teacher consistency | **inconsistent** |" in text
    assert "| overridden | `--allow-inconsistent-teacher` |" in text
    assert "- teacher, **inconsistent**: the SFT data was written by another teacher than the one" in text


def test_an_sft_run_has_a_card_too(reference: Path, teacher_dir: Path) -> None:
    text = (reference / MODEL_CARD).read_text()
    assert front_matter(text) == {"library_name": "transformers", "tags": ["lopd", "sft"]}
    assert "Fine-tuned with lopd on the responses of `teacher`." in text
    assert "| objective | `cross-entropy` |" in text and "teacher consistency" not in text


def test_the_front_matter_links_the_nearest_base_on_the_hub() -> None:
    assert "base_model" not in front_matter(card())
    assert front_matter(card(replace(RECORD, base=ON_HUB)))["base_model"] == "acme/base"
    policy = replace(ROLLOUTS, policy_checkpoint=replace(CHECKPOINT, base=ON_HUB))
    assert (
        front_matter(card(manifest=make_manifest(inputs=replace(INPUTS, rollouts=policy))))["base_model"] == "acme/base"
    )
    assert front_matter(card())["tags"] == ["lopd", "on-policy-distillation"]


def test_a_name_cannot_bring_markup_or_metadata_into_the_card() -> None:
    quantization = "*|* [x](http://evil)"
    evil = identity_named(
        "x/y\nlicense: mit | <script>`\n# [click](http://evil)", revision="z\nlicense: mit", quantization=quantization
    )
    text = card(replace(RECORD, base=evil, model=evil), make_manifest(inputs=replace(INPUTS, teacher=evil)))
    assert "What the gate found" in text
    assert set(front_matter(text)) == {"library_name", "tags"}
    assert "<script>" not in text and "](" not in text and "\n# [" not in text and "x | " not in text


def test_the_licence_of_the_teacher_and_every_finding_are_told() -> None:
    accused = Statistic(positions=20_000, outside=0, score=-900.0, variance=40_000.0)
    inputs = replace(
        INPUTS,
        license=License(id="apache-2.0", gated=True),
        sft=UNKNOWN_SFT,
        sft_audit=SftAudit(data=DATA, temperature=1.0, top_p=1.0, found=accused),
    )
    text = card(replace(RECORD, overrides=(ALLOW_INCONSISTENT, ALLOW_UNKNOWN)), make_manifest(inputs=inputs))
    assert "| licence of the teacher | `apache-2.0, gated` |" in text
    assert "- teacher, **unknown**: nothing says which teacher wrote" in text
    assert "- SFT data, **inconsistent**: the audit finds that the teacher did not write the SFT data." in text
    assert "`--allow-inconsistent-teacher`, `--allow-unknown-sft-teacher`" in text


def test_a_broken_link_shows_in_the_lineage() -> None:
    text = card(manifest=make_manifest(inputs=replace(INPUTS, sft=replace(SFT, teacher=OTHER_TEACHER))))
    assert "4. artifact, **broken** (the teacher is not the SFT teacher: weights differ): scored by `teacher`" in text
