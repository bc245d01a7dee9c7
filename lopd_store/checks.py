"""What the values of a part must obey: each check states its rule, in the order of spec/artifact.md, section 10.

The values come as they are stored, so that the checks share nothing with the reader but the container.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lopd_store.compiled import compiled
from lopd_store.container import Arrays
from lopd_store.encoding import RESPONSE_TOKEN, Encoding
from lopd_store.errors import ArtifactError, LopdError
from lopd_store.grid import IMPOSSIBLE, LAST_LEVEL, Grid
from lopd_store.lookup import lookup
from lopd_store.manifest import Counts
from lopd_store.statistic import Statistic, of_stored

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


def audit_rollouts(tokens: Arrays, topk: Arrays, encoding: Encoding, temperature: float) -> Statistic:
    """What the reference policy's distributions in a part say of its rollouts; only where all of it is in order."""
    grid = encoding.topk_grid
    stored = (topk["reference_logprobs"], topk["reference_tail_logprobs"])
    logprobs, tails = stored if grid is None else (lookup(grid.levels, codes) for codes in stored)
    is_response = topk["ids"] == RESPONSE_TOKEN
    return of_stored(topk["counts"], logprobs, tails, is_response, tokens["loss_mask"], temperature)


class _Values(NamedTuple):
    """Log-probs as places in tables of what they stand for; without a grid, each has a place of its own."""

    places: npt.NDArray[Any]
    logprobs: npt.NDArray[np.float32]
    halves: npt.NDArray[np.float32]  # greatest errors in nats
    least: npt.NDArray[np.float32]  # probabilities that the errors allow
    most: npt.NDArray[np.float32]


def _check_positions(tokens: Arrays, topk: Arrays, encoding: Encoding, where: str) -> Iterator[Finding]:
    """What must hold at every position; each rule is reported once, where it fails first."""
    offsets = np.zeros(len(topk["counts"]) + 1, np.uint64)
    np.cumsum(topk["counts"], out=offsets[1:])
    broken = np.zeros(len(topk["counts"]), np.uint16)
    _find_broken(
        offsets,
        -topk["logprobs"] if encoding.topk_grid is None else topk["logprobs"],  # codes count downwards
        _values(topk["logprobs"], encoding.topk_grid),
        topk["ids"],
        np.concatenate([np.zeros(1, np.uint32), topk["id_table"]]),
        tokens["token_ids"][_is_response(tokens)],
        _values(tokens["sampled_logprobs"], encoding.sampled_grid),
        _values(topk["tail_logprobs"], encoding.topk_grid),
        encoding.k_min,
        encoding.k_max,
        encoding.coverage,
        encoding.rule == "teacher",
        broken,
    )
    if "reference_logprobs" in topk:
        reference = _values(topk["reference_logprobs"], encoding.topk_grid)
        reference_tail = _values(topk["reference_tail_logprobs"], encoding.topk_grid)
        _find_unequal(offsets, reference, reference_tail, broken)
    for bit, (code, message, expected) in enumerate(_rules_of_positions(encoding) if broken.any() else ()):
        if (failed := (broken & (1 << bit)) > 0).any():
            yield finding(code, where, f"position {np.argmax(failed)}: {message}", expected)


def _rules_of_positions(encoding: Encoding) -> tuple[tuple[str, str, object], ...]:
    """Code, what to say and what was expected of each rule, in the order of the bits that the loops set."""
    if encoding.coverage < 1:
        too_few = ("A066", "the entries do not reach the coverage", encoding.coverage)
    else:
        too_few = ("A066", "there are fewer entries than `k_max`", encoding.k_max)
    return (
        ("A061", "entries are not in order", "log-prob descending, then id ascending"),
        ("A062", "an id stands twice", None),
        ("A046", "the response token is stored by its row", RESPONSE_TOKEN),
        ("A063", "top-k and tail do not sum to one", "1 within the bounds of the grid"),
        ("A064", "the sampled log-prob and the entry of the response token differ", None),
        ("A065", "the sampled token is not among the entries, yet likelier than the tail", None),
        too_few,
        ("A067", "there are more entries than the coverage asks for", encoding.coverage),
        ("A068", "the reference log-probs and their tail do not sum to one", None),
    )


@compiled
def _find_broken(
    offsets: npt.NDArray[np.uint64],  # [positions + 1], of their entries; unsigned, as no index counts from the end
    keys: npt.NDArray[Any],  # [entries], ascending where log-probs descend
    entries: _Values,
    rows: npt.NDArray[np.uint32],  # [entries], all in `ids`
    ids: npt.NDArray[np.uint32],  # of each row; row 0 is the response token, whichever it is
    response_ids: npt.NDArray[np.uint32],  # [positions]
    sampled: _Values,
    tail: _Values,
    k_min: int,
    k_max: int,
    coverage: float,
    of_teacher: bool,  # alone
    broken: npt.NDArray[np.uint16],  # [positions]
) -> None:
    last_seen = np.zeros(len(ids), np.uint32)  # of each row, the position that had it last, from 1
    for position in range(len(offsets) - 1):
        response, is_among = response_ids[position], False
        place = of_response = entries.places[offsets[position]]
        key, id = keys[offsets[position]], np.int64(-1)
        least, most, bits = 0.0, 0.0, 0
        for entry in range(offsets[position], offsets[position + 1]):
            row, place, last_key, last_id = rows[entry], entries.places[entry], key, id
            key, id = keys[entry], np.int64(response if row == RESPONSE_TOKEN else ids[row])
            # A061: log-probs descend; where they are equal, ids ascend. No `or`: its branch would be mispredicted.
            if (key < last_key) | ((key == last_key) & (id <= last_id)):
                bits |= 1 << 0
            # A046: the response token is stored as row 0.
            if row == RESPONSE_TOKEN:
                is_among, of_response = True, place
            elif id == response:
                bits |= 1 << 2
                row = np.uint32(RESPONSE_TOKEN)
            # A062: no id stands twice.
            if last_seen[row] == position + 1:
                bits |= 1 << 1
            last_seen[row] = position + 1
            least += entries.least[place]
            most += entries.most[place]
        count = offsets[position + 1] - offsets[position]
        at, here = tail.places[position], sampled.places[position]
        # A063: top-k and tail sum to one within the bounds.
        if least + tail.least[at] > 1 + _SLACK or most + tail.most[at] < 1 - _SLACK:
            bits |= 1 << 3
        if is_among:
            # A064: the entry of the response token is its sampled log-prob.
            difference = abs(entries.logprobs[of_response] - sampled.logprobs[here])
            if not difference <= entries.halves[of_response] + sampled.halves[here] + _SLACK:
                bits |= 1 << 4
        # A065: outside the entries, it is part of the tail.
        elif sampled.logprobs[here] - sampled.halves[here] > tail.logprobs[at] + tail.halves[at] + _SLACK:
            bits |= 1 << 5
        # A066: fewer entries than k_max reach the coverage, or are all that the teacher holds possible.
        if count < k_max and (coverage >= 1 or most < coverage - _SLACK) and tail.logprobs[at] > -np.inf:
            bits |= 1 << 6
        # A067: without the last of them they do not reach it.
        if of_teacher and coverage < 1 and count > k_min and least - entries.least[place] > coverage + _SLACK:
            bits |= 1 << 7
        broken[position] = bits


@compiled
def _find_unequal(
    offsets: npt.NDArray[np.uint64], entries: _Values, tail: _Values, broken: npt.NDArray[np.uint16]
) -> None:
    for position in range(len(offsets) - 1):
        at = tail.places[position]
        least, most = np.float64(tail.least[at]), np.float64(tail.most[at])
        for entry in range(offsets[position], offsets[position + 1]):
            least += entries.least[entries.places[entry]]
            most += entries.most[entries.places[entry]]
        # A068: the reference log-probs and their tail sum to one within the bounds.
        if least > 1 + _SLACK or most < 1 - _SLACK:
            broken[position] |= 1 << 8


def _values(stored: npt.NDArray[Any], grid: Grid | None) -> _Values:
    if grid is None:
        masses, exact = np.exp(stored), np.zeros(len(stored), np.float32)
        return _Values(np.arange(len(stored)), stored, exact, masses, masses)
    levels, halves = grid.levels.astype(np.float64), grid.half_steps
    least, most = np.exp(levels - halves).astype(np.float32), np.exp(levels + halves).astype(np.float32)
    return _Values(stored, grid.levels, halves, least, most)


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
