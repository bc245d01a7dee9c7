"""The dataset card: names from an artifact are text in it, never markup."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import DatasetCard
from markdown_it import MarkdownIt

import lopd_store
from lopd_store.card import render_card
from lopd_store.identity import ModelIdentity
from lopd_store.manifest import Manifest

FINGERPRINT = "sha256:" + "0123456789abcdef" * 4


def card_of(manifest: Manifest, name: str) -> str:
    """The card of an artifact all of whose models have this name, and this revision."""

    def named(identity: ModelIdentity) -> ModelIdentity:
        return replace(identity, name=name, revision=name or None)

    (inputs,) = manifest.inputs
    assert inputs.sft.teacher is not None
    assert inputs.rollouts is not None
    inputs = replace(
        inputs,
        teacher=named(inputs.teacher),
        sft=replace(inputs.sft, teacher=named(inputs.sft.teacher)),
        rollouts=replace(inputs.rollouts, policy=named(inputs.rollouts.policy)),
        scoring=replace(inputs.scoring, engine=name, dtype=name),
    )
    return render_card(replace(manifest, inputs=(inputs,)), FINGERPRINT)


def structure(card: str) -> list[str]:
    """What the card is made of, without its words."""
    tokens = MarkdownIt("commonmark").enable("table").parse(DatasetCard(card).text)
    return [kind for token in tokens for kind in (token.type, *(child.type for child in token.children or ()))]


@pytest.mark.parametrize(
    "name",
    [
        "a|b",
        "`code`",
        "``",
        "**bold** _it_ ~~gone~~",
        "[click](https://evil.example)",
        "https://evil.example",
        "<script>alert(1)</script><img src=x>",
        "line\n\n# heading\n---\ntags: [evil]",
        "{{ fingerprint }}{% raw %}",
        "\u202egnp.elif\x1b[2J",
        "&lt;b&gt;",
        "\\",
        "",
        "x" * 10_000,
    ],
)
def test_a_name_is_inert(sealed: Path, name: str) -> None:
    manifest = lopd_store.open(sealed).manifest
    card, plain = card_of(manifest, name), card_of(manifest, name and "plain")
    assert structure(card) == structure(plain)
    assert vars(DatasetCard(card).data) == vars(DatasetCard(plain).data)
    markers = re.compile("<!-- [a-z,; ]* -->")
    assert not set(markers.sub("", DatasetCard(card).text)) & set("\x1b\u202e<>")
    assert len(card) < 5000


def test_a_name_of_any_script_stays_readable(sealed: Path) -> None:
    assert "# Teacher log-probs of `Qwen/教師-8B.v2_ß`\n" in card_of(
        lopd_store.open(sealed).manifest, "Qwen/教師-8B.v2_ß"
    )


def test_the_card_says_what_is_not_known(unknown: Path) -> None:
    text = (unknown / "README.md").read_text()
    assert "| SFT teacher | unknown (unknown) |" not in text
    assert "| SFT teacher | unknown |" in text
    assert "| teacher consistency | **unknown** |" in text
