"""What is kept of each distribution, and how values become the numbers that are stored.

`compact` stores log-probs as codes on a grid, with the worst-case error stated; `exact` keeps float32. Token ids of the
top-k are stored as rows of the part's own table, frequent ids first, which makes them small numbers; the response
token, which the tokens file has already, is row 0 wherever it is among the entries.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lopd_store import strictjson
from lopd_store.compiled import compiled
from lopd_store.errors import ArtifactError, InputError
from lopd_store.grid import Grid
from lopd_store.topk import TopK, sort_entries

Profile = Literal["compact", "exact"]
Rule = Literal["teacher", "teacher+reference"]
Ids = npt.NDArray[np.uint32]
Counts = npt.NDArray[np.uint16]

K_LIMIT = 32_767  # a union has at most twice as many entries, and 65,535 is the fill value of `counts`
# Tried on a real teacher (benchmarks/format.py): a mean KL of the rounding of about 4e-5 nat.
TOPK_GRID = Grid(segments=((0.0, 1 / 32), (1.0, 1 / 16), (4.0, 1 / 8), (8.0, 1 / 4)))
SAMPLED_GRID = Grid(segments=((0.0, 1 / 256), (32.0, 1 / 16)))  # the advantage is a difference of two of these
_ENCODING = {
    "selection": ("rule", "k_min", "k_max", "coverage"),
    "grids": ("topk_logprobs", "sampled_logprobs"),
    "bounds": ("topk_logprobs", "sampled_logprobs"),
}
RESPONSE_TOKEN = 0  # the stored id of the entry that is the response token; row i of the table is stored as i + 1


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """What is kept of each distribution and how finely; everything a reader must know to decode.

    `topk_grid` governs the entries and the tail, `sampled_grid` the sampled and reference log-probs of the response
    tokens; both are None in the profile `exact`.
    """

    rule: Rule
    k_min: int
    k_max: int
    coverage: float
    topk_grid: Grid | None
    sampled_grid: Grid | None

    @property
    def profile(self) -> Profile:
        """`compact` where there are grids, else `exact`."""
        return "exact" if self.topk_grid is None else "compact"

    @property
    def most_entries(self) -> int:
        """The greatest number of entries that a position can have."""
        return self.k_max * (2 if self.rule == "teacher+reference" else 1)

    def to_json(self) -> dict[str, Any]:
        """The manifest's `encoding` object."""
        grids = {"topk_logprobs": self.topk_grid, "sampled_logprobs": self.sampled_grid}
        return {
            "profile": self.profile,
            "selection": {"rule": self.rule, "k_min": self.k_min, "k_max": self.k_max, "coverage": self.coverage},
            "grids": {name: None if grid is None else grid.to_json() for name, grid in grids.items()},
            "bounds": {name: 0.0 if grid is None else grid.bound for name, grid in grids.items()},
        }

    @classmethod
    def from_json(cls, value: Any, *, where: str, open_ended: bool = False) -> Encoding:
        """Parse what `to_json` gave; raises ArtifactError where it says something else."""

        def members(value: Any, *names: str, within: str = where) -> dict[str, Any]:
            return strictjson.members(value, names, where=within, open_ended=open_ended)

        value = members(value, "profile", "selection", "grids", "bounds")
        for name, names in _ENCODING.items():
            value[name] = members(value[name], *names, within=f"{where}.{name}")
        selection, grids = value["selection"], value["grids"]
        try:
            encoding = make_encoding(
                exact=value["profile"] == "exact",
                rule=selection["rule"],
                k_min=selection["k_min"],
                k_max=selection["k_max"],
                coverage=selection["coverage"],
                topk_grid=_parse_grid(grids["topk_logprobs"]),
                sampled_grid=_parse_grid(grids["sampled_logprobs"]),
            )
        except InputError as error:
            raise ArtifactError(f"`{where}` is not an encoding: {error}") from error
        if strictjson.canonical(encoding.to_json()) != strictjson.canonical(value):
            raise ArtifactError(f"`{where}` is not an encoding of this version", actual=repr(value)[:300])
        return encoding


def make_encoding(
    *,
    exact: bool = False,
    rule: Rule = "teacher",
    k_min: int = 1,
    k_max: int = 64,
    coverage: float = 0.99,
    topk_grid: Grid | None = TOPK_GRID,
    sampled_grid: Grid | None = SAMPLED_GRID,
) -> Encoding:
    """An encoding from the options of `lopd-store build`; raises InputError at values out of range."""
    if rule not in ("teacher", "teacher+reference"):
        raise InputError("there is no such selection", expected="teacher or teacher+reference", actual=rule)
    for name, k in (("k_min", k_min), ("k_max", k_max)):
        if type(k) is not int or not 1 <= k <= K_LIMIT:
            raise InputError(f"`{name}` is out of range", expected=f"1 to {K_LIMIT}", actual=k)
    if k_min > k_max:
        raise InputError("`k_min` is greater than `k_max`", actual=f"{k_min} > {k_max}")
    if type(coverage) not in (int, float) or not 0 < coverage <= 1:
        raise InputError("`coverage` is out of range", expected="above 0, at most 1 (1 keeps k_max)", actual=coverage)
    if not exact and (topk_grid is None or sampled_grid is None):
        raise InputError("the profile `compact` lacks a grid")
    return Encoding(
        rule=rule,
        k_min=k_min,
        k_max=k_max,
        coverage=float(coverage),
        topk_grid=None if exact else topk_grid,
        sampled_grid=None if exact else sampled_grid,
    )


def round_logprobs(logprobs: npt.NDArray[np.float32], grid: Grid | None) -> npt.NDArray[np.float32]:
    """The nearest levels of the grid; the same values where there is none."""
    return logprobs if grid is None else grid.to_logprobs(grid.to_codes(logprobs))


def round_topk(topk: TopK, grid: Grid | None) -> TopK:
    """Round every log-prob, and put entries that rounding made equal back in order of their ids."""
    if grid is None:
        return topk
    reference, reference_tail = topk.reference_logprobs, topk.reference_tail_logprobs
    rounded = replace(
        topk,
        logprobs=round_logprobs(topk.logprobs, grid),
        tail_logprobs=round_logprobs(topk.tail_logprobs, grid),
        reference_logprobs=None if reference is None else round_logprobs(reference, grid),
        reference_tail_logprobs=None if reference_tail is None else round_logprobs(reference_tail, grid),
    )
    return sort_entries(rounded)


def ids_to_rows(ids: Ids, counts: Counts, response_ids: Ids) -> tuple[Ids, Ids]:
    """(table, rows): what is stored for the ids of the entries, `counts` of them at each position.

    The table lists the ids that are not their position's response token, frequent ones first: by powers of two of their
    frequency, then by id, so that it is small itself.
    """
    frequency = np.zeros(int(ids.max(initial=0)) + 1, np.int64)
    _count_ids(ids, counts, response_ids, frequency)
    distinct = np.flatnonzero(frequency)
    octave = np.frexp(frequency[distinct])[1]
    table = distinct[np.lexsort((distinct, -octave))].astype(np.uint32)
    row_of = np.zeros(len(frequency), np.uint32)
    row_of[table] = np.arange(1, len(table) + 1, dtype=np.uint32)
    rows = np.empty(len(ids), np.uint32)
    _ids_to_rows(ids, counts, response_ids, row_of, rows)
    return table, rows


class IdDecoder:
    """Stored rows back to ids, piece by piece in order; `counts` must add up to the entries of all pieces."""

    def __init__(self, table: Ids, counts: Counts, response_ids: Ids) -> None:
        self._ids = np.concatenate([np.zeros(1, np.uint32), table])  # row 0 is the response token, whichever it is
        self._response_ids = response_ids
        self._ends = np.cumsum(counts, dtype=np.int64)
        self._position = 0  # of the next piece's first entry

    def decode(self, start: int, rows: Ids, out: Ids) -> None:
        """Ids of the entries from `start` on; raises ArtifactError where a row is not in the table."""
        if int(rows.max(initial=0)) >= len(self._ids):
            raise ArtifactError(
                "a row is not in `id_table`", code="A044", expected=f"below {len(self._ids)}", actual=int(rows.max())
            )
        self._position = _rows_to_ids(rows, self._ids, self._ends, self._response_ids, start, self._position, out)


@compiled
def _count_ids(ids: Ids, counts: Counts, response_ids: Ids, frequency: npt.NDArray[np.int64]) -> None:
    entry = 0
    for position in range(len(counts)):
        stop = entry + counts[position]
        while entry < stop:
            if ids[entry] != response_ids[position]:
                frequency[ids[entry]] += 1
            entry += 1


@compiled
def _ids_to_rows(ids: Ids, counts: Counts, response_ids: Ids, row_of: Ids, rows: Ids) -> None:
    entry = 0
    for position in range(len(counts)):
        stop = entry + counts[position]
        while entry < stop:
            is_response = ids[entry] == response_ids[position]
            rows[entry] = RESPONSE_TOKEN if is_response else row_of[ids[entry]]
            entry += 1


@compiled
def _rows_to_ids(
    rows: Ids,
    ids: Ids,
    ends: npt.NDArray[np.int64],  # [positions], of their entries
    response_ids: Ids,
    start: int,  # entry of the first row
    position: int,  # at or before that of the first row
    out: Ids,
) -> int:
    for i in range(len(rows)):
        while start + i >= ends[position]:
            position += 1
        out[i] = response_ids[position] if rows[i] == RESPONSE_TOKEN else ids[rows[i]]
    return position


def _parse_grid(value: Any) -> Grid | None:
    return None if value is None else Grid.from_json(value)
