"""The dataset card says what the manifest says, and nothing in it is markup."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import yaml

from lopd_store.card import render_card
from lopd_store.license import License
from lopd_store.manifest import Inputs
from lopd_store.statistic import SftAudit, Statistic
from tests.artifacts import identity_named
from tests.records import CODE, CODER, DATA, INPUTS, MATH, make_manifest


def test_the_card_names_the_fingerprint_the_teacher_and_the_verdict() -> None:
    card = render_card(make_manifest(), DATA)
    for text in (DATA, "teacher", INPUTS.teacher.weights, "consistent", "at most 64, until 99 % of the mass"):
        assert text in card


def test_the_card_shows_what_audits_found_and_warns_where_they_accuse() -> None:
    honest = Statistic(positions=20_000, outside=0, score=90.0, variance=40_000.0)
    sft_audit = SftAudit(data=DATA, temperature=1.0, top_p=1.0, found=replace(honest, score=-900.0))
    inputs = replace(INPUTS, sft_audit=sft_audit, rollouts_audit=honest)
    card = render_card(make_manifest(inputs=inputs), DATA)
    assert "| audit of the SFT data under the teacher | **inconsistent**: z -4.5, -0.0450 nat per token" in card
    assert "| audit of the rollouts under it | **consistent**: z 0.5, +0.0045 nat per token" in card
    assert card.count("**Warning:**") == 1
    assert "**Warning:** the audit finds that the teacher did not write the SFT data." in card
    assert "audit" not in render_card(make_manifest(), DATA)


def test_the_card_shows_the_licence_of_the_teacher_where_it_is_known() -> None:
    license = License(id="other", name="acme | 1", link="https://acme.example", gated=True)
    card = render_card(make_manifest(inputs=replace(INPUTS, license=license)), DATA)
    assert "| licence of the teacher | `other (acme ? 1) (https://acme.example), gated` |" in card
    assert "| licence of the teacher | unknown |" in render_card(make_manifest(), DATA)


def test_the_card_begins_with_its_metadata() -> None:
    assert render_card(make_manifest(), DATA).startswith("---\ntags:\n- lopd\n")


def test_a_name_cannot_bring_markup_into_the_card() -> None:
    evil = identity_named("x | <script>`\n# [click](http://evil)")
    card = render_card(make_manifest(inputs=replace(INPUTS, teacher=evil)), DATA)
    assert "<script>" not in card and "](" not in card and "\n# [" not in card and "x | " not in card


@pytest.mark.parametrize(
    ("rollouts", "category"),
    [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (123_456, "100K<n<1M"), (5_000_000, "1M<n<10M"), (10**10, "n>1B")],
)
def test_the_size_category_is_the_hubs(rollouts: int, category: str) -> None:
    manifest = make_manifest()
    card = render_card(replace(manifest, counts=replace(manifest.counts, rollouts=rollouts)), DATA)
    assert f"size_categories:\n- {category}\n" in card


# Several domains


def test_the_card_of_several_domains_tells_of_each_teacher_and_its_licence() -> None:
    licensed = [replace(MATH, license=License(id="mit")), replace(CODE, license=License(id="other", name="acme-1"))]
    card = render_card(make_manifest(inputs=tuple(licensed)), DATA)
    assert "# Teacher log-probs of `teacher` and `coder`\n" in card
    assert "| math | 2 | 4 |\n| code | 2 | 4 |\n" in card
    assert "| licence of the teacher, math | `mit` |" in card
    assert "| licence of the teacher, code | `other (acme-1)` |" in card
    assert f"| teacher, code | `coder`, weights `{CODER.weights}` |" in card
    assert "The teacher that wrote the SFT data is the teacher that scored the rollouts, in every domain." in card


def front_matter(*inputs: Inputs) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(render_card(make_manifest(inputs=inputs), DATA).split("---\n")[1])
    return found


def test_the_licence_is_for_the_hub_where_all_teachers_have_the_same() -> None:
    mit, apache = License(id="mit"), License(id="apache-2.0")
    assert front_matter(replace(MATH, license=mit), replace(CODE, license=mit))["license"] == "mit"
    assert "license" not in front_matter(replace(MATH, license=mit), replace(CODE, license=apache))
    assert "license" not in front_matter(replace(MATH, license=mit), CODE)
    assert "license" not in front_matter(MATH, CODE)


def test_every_teacher_is_found_by_a_tag_and_a_relation_of_its_own() -> None:
    coder = replace(CODER, name="acme/coder", revision="0123")
    found = front_matter(MATH, replace(CODE, teacher=coder))
    tags = [f"lopd-artifact-{DATA[7:19]}", *(f"lopd-teacher-{one.weights[7:19]}" for one in (MATH.teacher, CODER))]
    assert found["tags"] == ["lopd", *tags, f"lopd-tokenizer-{CODER.tokenizer[7:19]}", "distillation"]
    assert found["base_model"] == ["acme/coder"]


def test_the_card_warns_of_the_domain_that_is_accused() -> None:
    accused = Statistic(positions=20_000, outside=0, score=-900.0, variance=40_000.0)
    card = render_card(make_manifest(inputs=(MATH, replace(CODE, rollouts_audit=accused))), DATA)
    assert "**Warning:** domain code: the audit finds that the reference policy did not sample the rollouts." in card
    assert "teacher consistency is inconsistent" in card
