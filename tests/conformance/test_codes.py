"""Every code of the specification is a check of the verifier, every check has a code, and each is seen to be found."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def codes(path: str, pattern: str) -> set[str]:
    return set(re.findall(pattern, (ROOT / path).read_text(encoding="utf-8")))


def test_the_codes_of_the_text_are_those_of_the_verifier() -> None:
    assert codes("spec/artifact.md", r"\[(A[0-9]{3})\]") == codes("lopd_store/verifier.py", r'"(A[0-9]{3})"')


def test_every_code_is_found_in_a_broken_artifact() -> None:
    tested = codes("tests/unit/test_verifier.py", r'"(A[0-9]{3})"')
    assert codes("lopd_store/verifier.py", r'"(A[0-9]{3})"') - tested == set()
