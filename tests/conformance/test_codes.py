"""Every code of the specification is one fact that the library checks, and every check has a code."""

from __future__ import annotations

import re

from tests.conformance.text import ROOT, TEXT, items

CODE = r"A[0-9]{3}"


def test_the_codes_of_the_text_are_those_of_the_library() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "lopd_store").rglob("*.py"))
    assert set(re.findall(rf"\[({CODE})\]", TEXT)) == set(re.findall(rf'"({CODE})"', sources))


def test_every_must_carries_a_code_of_its_own() -> None:
    rules = [item for item in items() if re.search(r"\bMUST\b", item)]
    assert [rule for rule in rules if len(re.findall(r"\bMUST\b", rule)) != 1] == []
    assert [rule for rule in rules if len(re.findall(rf"\[{CODE}\]", rule)) != 1] == []
    defined = [re.findall(rf"\[({CODE})\]", rule)[0] for rule in rules]
    assert sorted(defined) == sorted(set(re.findall(rf"\[({CODE})\]", TEXT)))


def test_every_code_is_a_step_of_the_verification() -> None:
    steps = TEXT.partition("\n## 10. Verification\n")[2].partition("\n## ")[0]
    assert set(re.findall(rf"\[({CODE})\]", steps)) == set(re.findall(rf"\[({CODE})\]", TEXT))
