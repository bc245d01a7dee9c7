"""The specification as a test sees it: its lines, rules, tables and fenced blocks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SPEC = ROOT / "spec"
TEXT = (SPEC / "artifact.md").read_text(encoding="utf-8")


def blocks() -> Iterator[tuple[str, str]]:
    """(info string, content) of every fenced block."""
    for match in re.finditer(r"^```([^\n]*)\n(.*?)\n```$", TEXT, re.DOTALL | re.MULTILINE):
        yield match[1], match[2]


def block(info: str) -> str:
    """The content of the one block with this info string."""
    (content,) = (content for found, content in blocks() if found == info)
    return content


def items() -> list[str]:
    """Every paragraph and every item of a list below the first heading of a section, as one line each."""
    prose = re.sub(r"^```.*?^```$", "", TEXT[TEXT.index("\n## ") :], flags=re.DOTALL | re.MULTILINE)
    pieces = re.split(r"\n\s*\n|\n(?=\s*(?:-|[0-9]+\.) )|\n(?=\|)", prose)
    return [" ".join(piece.split()) for piece in pieces if piece.strip()]


def tables() -> Iterator[list[dict[str, str]]]:
    """Every table as its rows, each by the names of its columns."""
    for table in re.findall(r"(?:^\|.*\n)+", TEXT, re.MULTILINE):
        header, _, *rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines()]
        yield [dict(zip(header, row, strict=True)) for row in rows]
