"""What the values of a part must obey: each check states its rule, in the order of spec/artifact.md, section 10.

The values come as they are stored, so that the checks share nothing with the reader but the container. Positions are
looked at some thousand at a time, which keeps everything in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lopd_store.container import Arrays
from lopd_store.encoding import RESPONSE_TOKEN, Encoding
from lopd_store.errors import ArtifactError, LopdError
from lopd_store.grid import IMPOSSIBLE, LAST_LEVEL, Grid
from lopd_store.lookup import lookup
from lopd_store.manifest import Counts
from lopd_store.screen import POSITIONS, Screen

_SLACK = 1e-4  # float32 sums over k + 1 terms


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong, in the words of an error."""

    code: str
    where: str
    message: str
    expected: str | None = None
    actual: str | None = None
    hint: str | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON object with one member per field."""
        return dict(vars(self))

    def to_error(self) -> ArtifactError:
        """The same as an exception."""
        named = self.message.startswith(f"`{self.where}")
        message = self.message if named else f"`{self.where}`: {self.message}"
        return ArtifactError(message, code=self.code, expected=self.expected, actual=self.actual, hint=self.hint)


def finding(code: str, where: str, message: str, expected: object = None, actual: object = None) -> Finding:
    """A finding from values of any kind."""
    return Finding(
        code=code,
        where=where,
        message=message,
        expected=None if expected is None else str(expected),
        actual=None if actual is None else str(actual),
    )


def finding_of(error: LopdError, where: str, code: str) -> Finding:
    """A finding from an error, under its own code or else this one."""
    return replace(finding(error.code or code, where, error.message, error.expected, error.actual), hint=error.hint)


def check_tokens(tokens: Arrays, counts: Counts, encoding: Encoding, vocab_size: int, where: str) -> Iterator[Finding]:
    """A041 offsets, A042 prompt lengths, A050 token ids, A051 log-probs."""
    offsets, prompts = tokens["rollout_offsets"], tokens["prompt_lengths"].astype(np.int64)
    lengths = np.diff(offsets)
    if offsets[0] != 0 or offsets[-1] != counts.tokens or (offsets[1:] < offsets[:-1]).any():
        yield finding("A041", where, "`rollout_offsets` do not run from 0 to the number of tokens", counts.tokens)
    elif (wrong := (prompts < 1) | (prompts > lengths)).any():
        row = int(np.argmax(wrong))
        yield finding("A042", where, f"rollout {row}: the prompt does not fit", f"1 to {lengths[row]}", prompts[row])
    elif int((lengths - prompts).sum()) != counts.positions:
        yield finding("A042", where, "positions are not the response tokens", counts.positions)
    if int(tokens["token_ids"].max(initial=0)) >= vocab_size:
        yield finding("A050", where, "a token id is out of range", f"below {vocab_size}", tokens["token_ids"].max())
    for name in ("sampled_logprobs", "reference_logprobs"):
        if name in tokens:
            yield from _check_logprobs(tokens[name], name, where, encoding.sampled_grid, finite=False)


def check_topk(
    tokens: Arrays, topk: Arrays, counts: Counts, encoding: Encoding, vocab_size: int, where: str
) -> Iterator[Finding]:
    """A043 to A046, A050, A051, and A060 to A067; only of a part whose tokens are in order."""
    table, rows = topk["id_table"], topk["ids"]
    if int(topk["counts"].sum(dtype=np.int64)) != counts.entries:
        found = topk["counts"].sum(dtype=np.int64)
        yield finding("A043", where, "`counts` do not add up to the entries", counts.entries, found)
        return
    if int(rows.max(initial=0)) > len(table):
        yield finding("A044", where, "a row is not in `id_table`", f"at most {len(table)}", rows.max())
        return
    if len(np.unique(table)) != len(table):
        yield finding("A045", where, "`id_table` has an id twice")
    if int(table.max(initial=0)) >= vocab_size:
        yield finding("A050", where, "an id of `id_table` is out of range", f"below {vocab_size}", table.max())
    broken = [
        *_check_logprobs(topk["logprobs"], "logprobs", where, encoding.topk_grid, finite=True),
        *(
            found
            for name in ("tail_logprobs", "reference_logprobs", "reference_tail_logprobs")
            if name in topk
            for found in _check_logprobs(topk[name], name, where, encoding.topk_grid, finite=False)
        ),
    ]
    ks = topk["counts"]
    if len(ks) and (int(ks.max()) > encoding.most_entries or int(ks.min()) < 1):
        bounds = f"1 to {encoding.most_entries}"
        broken.append(finding("A060", where, "`counts` are out of range", bounds, f"{ks.min()} to {ks.max()}"))
    yield from broken
    if not broken:
        possible = replace(encoding, k_max=min(encoding.k_max, vocab_size))  # a padded head has mass, but no more ids
        yield from _check_positions(tokens, topk, possible, where)


@dataclass(frozen=True, kw_only=True)
class _Positions:
    """Some positions, each with at least one entry, for the checks that follow."""

    numbers: npt.NDArray[np.int64]  # of the positions in the part
    entries: npt.NDArray[np.int64]  # of the entries in the part
    counts: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]  # of each position's entries, from 0
    logprobs: npt.NDArray[Any]  # as stored; [entries]
    rows: npt.NDArray[np.uint32]
    ids: npt.NDArray[np.uint32]
    position: npt.NDArray[np.uint32]  # of each entry, from 0
    response_ids: npt.NDArray[np.uint32]
    sampled: npt.NDArray[np.float32]
    tail: npt.NDArray[np.float32]
    half_sampled: npt.NDArray[np.float32]  # greatest errors of the two
    half_tail: npt.NDArray[np.float32]


def _check_positions(tokens: Arrays, topk: Arrays, encoding: Encoding, where: str) -> Iterator[Finding]:
    """The checks of every position, each reported once, where it fails first."""
    values = _Values(encoding.topk_grid)
    reported: set[str] = set()
    for some in _walk(tokens, topk, encoding, values):
        for code, failed, message, expected in _rules(some, encoding, values, topk):
            if code not in reported and failed.any():
                reported.add(code)
                at = some.numbers[np.argmax(failed)]
                yield finding(code, where, f"position {at}: {message}", expected)


def _walk(tokens: Arrays, topk: Arrays, encoding: Encoding, values: _Values) -> Iterator[_Positions]:
    """The positions that a quick look leaves in doubt, some at a time."""
    ks = topk["counts"].astype(np.int64)
    ends = np.cumsum(ks)
    table = np.concatenate([np.zeros(1, np.uint32), topk["id_table"]])
    response_ids = tokens["token_ids"][_is_response(tokens)]
    sampled_values = _Values(encoding.sampled_grid)
    known = Screen.knows(topk["id_table"], topk["logprobs"], encoding) and len(np.unique(table[1:])) == len(table) - 1
    screen = Screen(topk["id_table"], encoding) if known else None
    for first in range(0, len(ks), POSITIONS):
        some = slice(first, first + POSITIONS)
        counts, begin = ks[some], int(ends[first] - ks[first])
        here = slice(begin, int(ends[some][-1]))
        doubt = np.ones(len(counts), np.bool_)
        if screen is not None:
            doubt = screen.doubtful(
                counts,
                ends[some] - counts - begin,
                topk["logprobs"][here],
                topk["ids"][here],
                response_ids[some],
                tokens["sampled_logprobs"][some],
                topk["tail_logprobs"][some],
            )
            if not doubt.any():
                continue
        numbers = np.flatnonzero(doubt) + first
        counts = ks[numbers]
        starts = np.cumsum(counts) - counts
        entries = np.arange(counts.sum()) + np.repeat(ends[numbers] - counts - starts, counts)
        position = np.repeat(np.arange(len(counts), dtype=np.uint32), counts)
        rows, responses = topk["ids"][entries], response_ids[numbers]
        ids = lookup(table, rows)
        places = np.flatnonzero(rows == RESPONSE_TOKEN)
        ids[places] = responses[position[places]]
        stored, tail = tokens["sampled_logprobs"][numbers], topk["tail_logprobs"][numbers]
        yield _Positions(
            numbers=numbers,
            entries=entries,
            counts=counts,
            starts=starts,
            logprobs=topk["logprobs"][entries],
            rows=rows,
            ids=ids,
            position=position,
            response_ids=responses,
            sampled=sampled_values.logprobs(stored),
            tail=values.logprobs(tail),
            half_sampled=sampled_values.halves(stored),
            half_tail=values.halves(tail),
        )


def _rules(
    some: _Positions, encoding: Encoding, values: _Values, topk: Arrays
) -> Iterator[tuple[str, npt.NDArray[np.bool_], str, object]]:
    """(code, which positions break it, what to say, what was expected) of every rule."""
    size = len(some.counts)

    def of(entries: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        failed = np.zeros(size, np.bool_)
        failed[some.position[np.flatnonzero(entries)]] = True
        return failed

    nats_fall = values.descend(some.logprobs)
    wrong = np.zeros(len(some.ids), np.bool_)
    wrong[1:] = ~(nats_fall | ((some.logprobs[1:] == some.logprobs[:-1]) & (some.ids[1:] > some.ids[:-1])))
    wrong[some.starts] = False
    yield "A061", of(wrong), "entries are not in order", "log-prob descending, then id ascending"

    keys = (some.position.astype(np.uint64) << np.uint64(32)) | some.ids
    keys.sort()
    twice = np.zeros(size, np.bool_)
    twice[(keys[1:][keys[1:] == keys[:-1]] >> np.uint64(32)).astype(np.int64)] = True
    yield "A062", twice, "an id stands twice", None

    is_response = some.rows == RESPONSE_TOKEN
    same = some.ids == np.repeat(some.response_ids, some.counts)
    yield "A046", of(same & ~is_response), "the response token is stored by its row", RESPONSE_TOKEN

    low, high = values.masses(some.logprobs, some.starts)
    tail_low, tail_high = np.exp(some.tail - some.half_tail), np.exp(some.tail + some.half_tail)
    unequal = (low + tail_low > 1 + _SLACK) | (high + tail_high < 1 - _SLACK)
    yield "A063", unequal, "top-k and tail do not sum to one", "1 within the bounds of the grid"

    inside = np.flatnonzero(is_response)
    at = some.position[inside]
    entry = some.logprobs[inside]
    tolerance = values.halves(entry) + some.half_sampled[at] + _SLACK
    differ = np.zeros(size, np.bool_)
    differ[at] = ~(np.abs(values.logprobs(entry) - some.sampled[at]) <= tolerance)
    yield "A064", differ, "the sampled log-prob and the entry of the response token differ", None

    outside = np.ones(size, np.bool_)
    outside[at] = False
    likelier = some.sampled - some.half_sampled > some.tail + some.half_tail + _SLACK
    yield "A065", outside & likelier, "the sampled token is not among the entries, yet likelier than the tail", None

    if encoding.coverage < 1:
        short = (some.counts < encoding.k_max) & (high < encoding.coverage - _SLACK) & np.isfinite(some.tail)
        yield "A066", short, "the entries do not reach the coverage", encoding.coverage
        if encoding.rule == "teacher":
            last = some.starts + some.counts - 1
            without = low - values.low(some.logprobs[last])
            too_many = (some.counts > encoding.k_min) & (without > encoding.coverage + _SLACK)
            yield "A067", too_many, "there are more entries than the coverage asks for", encoding.coverage
    else:
        short = (some.counts < encoding.k_max) & np.isfinite(some.tail)
        yield "A066", short, "there are fewer entries than `k_max`", encoding.k_max
    if "reference_logprobs" in topk:
        low, high = values.masses(topk["reference_logprobs"][some.entries], some.starts)
        tail = topk["reference_tail_logprobs"][some.numbers]
        tail, half = values.logprobs(tail), values.halves(tail)
        unequal = (low + np.exp(tail - half) > 1 + _SLACK) | (high + np.exp(tail + half) < 1 - _SLACK)
        yield "A068", unequal, "the reference log-probs and their tail do not sum to one", None


class _Values:
    """What stored log-probs stand for, by table where there is a grid: values, errors, and the masses they allow."""

    def __init__(self, grid: Grid | None) -> None:
        self._grid = grid
        if grid is not None:
            levels, halves = grid.levels.astype(np.float64), grid.half_steps
            with np.errstate(invalid="ignore"):
                self._masses = (np.exp(levels - halves) + 1j * np.exp(levels + halves)).astype(np.complex64)

    def logprobs(self, stored: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        return stored if self._grid is None else lookup(self._grid.levels, stored)

    def halves(self, stored: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        return np.zeros(len(stored), np.float32) if self._grid is None else lookup(self._grid.half_steps, stored)

    def descend(self, stored: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Where an entry is less likely than the one before it; codes count downwards."""
        falls: npt.NDArray[np.bool_] = stored[1:] < stored[:-1] if self._grid is None else stored[1:] > stored[:-1]
        return falls

    def masses(
        self, stored: npt.NDArray[Any], starts: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Least and greatest sum of the probabilities of each position that the rounding allows."""
        if self._grid is None:
            mass = np.add.reduceat(np.exp(stored), starts)
            return mass, mass
        both = np.add.reduceat(lookup(self._masses, stored), starts)
        return both.real, both.imag

    def low(self, stored: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """The least probability of each value."""
        return np.exp(stored) if self._grid is None else lookup(self._masses, stored).real


def _check_logprobs(
    values: npt.NDArray[Any], name: str, where: str, grid: Grid | None, *, finite: bool
) -> Iterator[Finding]:
    """A051: a number not above 0, and not -inf where it is `finite`; a code stands for one."""
    if grid is not None:
        limit = LAST_LEVEL if finite else IMPOSSIBLE
        if int(values.max(initial=0)) > limit:
            at = int(np.argmax(values))
            yield finding("A051", where, f"`{name}`[{at}] is not a log-prob", f"a code up to {limit}", values[at])
        return
    legal = (np.isfinite(values) if finite else ~np.isnan(values)) & (values <= 0)
    if not legal.all():
        at = int(np.argmin(legal))
        yield finding("A051", where, f"`{name}`[{at}] is not a log-prob", "a number <= 0", values[at])


def _is_response(tokens: Arrays) -> npt.NDArray[np.bool_]:
    """Which tokens are positions; [tokens]."""
    prompts = tokens["prompt_lengths"].astype(np.int64)
    halves = np.stack([prompts, np.diff(tokens["rollout_offsets"]) - prompts], axis=1)  # [rollouts, 2]
    return np.repeat(np.tile([False, True], len(prompts)), halves.ravel())
