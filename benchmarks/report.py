"""The tables that a benchmark prints and keeps in RESULTS.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Row:
    """One thing measured, and its target where it has one."""

    what: str
    value: float
    unit: str
    target: float | None = None
    at_most: bool = False

    def cells(self) -> list[str]:
        """The columns of `table`; the margin is at least 1 where the target is met."""
        shown = [self.what, f"{number(self.value)} {self.unit}"]
        if self.target is None:
            return [*shown, "", "", ""]
        margin = self.target / self.value if self.at_most else self.value / self.target
        target = f"{'<=' if self.at_most else '>='} {number(self.target)}"
        return [*shown, target, f"{margin:.2f}", "met" if margin >= 1 else "**not met**"]


def table_of_rows(rows: Iterable[Row]) -> str:
    """The rows beside their targets."""
    return table(["measured", "value", "target", "margin", ""], [row.cells() for row in rows])


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table that reads well as plain text, too: numbers to the right."""
    widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([line(heads), rule, *map(line, lines)])


def number(value: float) -> str:
    """Three digits that matter."""
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"


def write_section(path: Path, title: str, text: str) -> None:
    """Put a text under its title, between markers that the next run finds again; the rest of the file stays."""
    begin, end = f"<!-- begin {title.lower()} -->", f"<!-- end {title.lower()} -->"
    section = f"{begin}\n{text}\n{end}"
    whole = path.read_text(encoding="utf-8") if path.is_file() else "# Results of the benchmarks\n"
    if begin in whole:
        before, _, rest = whole.partition(begin)
        whole = before + section + rest.partition(end)[2]
    else:
        whole += f"\n## {title}\n\n{section}\n"
    path.write_text(whole, encoding="utf-8")
