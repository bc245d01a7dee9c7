"""What the compiled loop finds at each position is what the rules say, read one after the other in plain Python."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import lopd_store
from lopd_store import checks, layout
from lopd_store.container import Arrays, Group
from lopd_store.encoding import Encoding
from lopd_store.grid import Grid
from lopd_store.part import tokens_arrays, topk_arrays

VECTORS = Path(__file__).parents[2] / "spec" / "vectors" / "valid"
NAMES = [
    *("adaptive_k", "fixed_k", "ties", "k_min_above_one", "response_tokens_outside_the_entries", "certain_token"),
    *("exact", "teacher_and_reference"),
]
OF_POSITIONS = {"A046", "A061", "A062", "A063", "A064", "A065", "A066", "A067", "A068"}
SLACK = 1e-4


@cache
def stored(name: str) -> tuple[lopd_store.Artifact, Arrays, Arrays]:
    """An artifact, and its first part's arrays as they are stored."""
    artifact = lopd_store.open(VECTORS / name)
    encoding = artifact.manifest.encoding
    groups = [
        Group((artifact.path / layout.part_file(0, kind)).read_bytes(), specs(encoding), where=kind)
        for kind, specs in ((layout.TOKENS, tokens_arrays), (layout.TOPK, topk_arrays))
    ]
    tokens, topk = ({name: group.read(name) for name in group.lengths} for group in groups)
    return artifact, tokens, topk


def findings(artifact: lopd_store.Artifact, tokens: Arrays, topk: Arrays) -> dict[str, int]:
    """Codes found at positions, and where first; of a part that all earlier checks let through."""
    manifest = artifact.manifest
    with np.errstate(all="ignore"):
        found = list(
            checks.check_topk(
                tokens, topk, manifest.parts[0].counts, manifest.encoding, manifest.inputs[0].teacher.vocab_size, "topk"
            )
        )
    return {one.code: int(one.message.split()[1].rstrip(":")) for one in found if one.code in OF_POSITIONS}


def interval(stored: np.generic, grid: Grid | None) -> tuple[float, float, float]:
    """A log-prob, and the least and greatest one that may stand behind it."""
    if grid is None:
        return float(stored), float(stored), float(stored)
    value, half = float(grid.levels[int(stored)]), float(grid.half_steps[int(stored)])
    return value, value - half, value + half


def by_the_rules(tokens: Arrays, topk: Arrays, encoding: Encoding) -> dict[str, int]:
    """The same from the sentences of the specification."""
    found: dict[str, int] = {}
    response_ids = []
    for rollout, prompt in enumerate(tokens["prompt_lengths"].tolist()):
        begin, end = tokens["rollout_offsets"][rollout : rollout + 2].tolist()
        response_ids += tokens["token_ids"][begin + prompt : end].tolist()
    start = 0
    for position, (k, response) in enumerate(zip(topk["counts"].tolist(), response_ids, strict=True)):
        here = slice(start, start + k)
        start += k
        rows = topk["ids"][here].tolist()
        ids = [response if row == 0 else int(topk["id_table"][row - 1]) for row in rows]
        entries = [interval(stored, encoding.topk_grid) for stored in topk["logprobs"][here]]
        tail = interval(topk["tail_logprobs"][position], encoding.topk_grid)
        sampled = interval(tokens["sampled_logprobs"][position], encoding.sampled_grid)
        least, most = (sum(math.exp(one[side]) for one in entries) for side in (1, 2))
        likeliest_first = sorted(range(k), key=lambda i: (-entries[i][0], ids[i]))
        reaches = encoding.coverage < 1 and most >= encoding.coverage - SLACK
        broken = {
            "A061": likeliest_first != list(range(k)) or len(set(zip(ids, entries, strict=True))) < k,
            "A062": len(set(ids)) < k,
            "A046": any(row != 0 and id == response for row, id in zip(rows, ids, strict=True)),
            "A063": least + math.exp(tail[1]) > 1 + SLACK or most + math.exp(tail[2]) < 1 - SLACK,
            "A065": 0 not in rows and sampled[1] > tail[2] + SLACK,
            "A066": k < encoding.k_max and not reaches and tail[0] > -math.inf,
            "A067": encoding.rule == "teacher"
            and encoding.coverage < 1
            and k > encoding.k_min
            and least - math.exp(entries[-1][1]) > encoding.coverage + SLACK,
        }
        if 0 in rows:
            entry = entries[k - 1 - rows[::-1].index(0)]
            far = entry[2] - entry[0] + sampled[2] - sampled[0] + SLACK if sampled[0] > -math.inf else 0.0
            broken["A064"] = not abs(entry[0] - sampled[0]) <= far
        if "reference_logprobs" in topk:
            entries = [interval(stored, encoding.topk_grid) for stored in topk["reference_logprobs"][here]]
            tail = interval(topk["reference_tail_logprobs"][position], encoding.topk_grid)
            least, most = (sum(math.exp(one[side]) for one in [*entries, tail]) for side in (1, 2))
            broken["A068"] = least > 1 + SLACK or most < 1 - SLACK
        for code in [code for code, is_broken in broken.items() if is_broken and code not in found]:
            found[code] = position
    return found


@given(st.sampled_from(NAMES), st.data())
def test_the_loop_finds_what_the_rules_say(name: str, data: st.DataObject) -> None:
    artifact, *arrays = stored(name)
    tokens, topk = ({key: values.copy() for key, values in file.items()} for file in arrays)
    places = {key: topk[key] for key in ("ids", "logprobs", "tail_logprobs")}
    places |= {"sampled_logprobs": tokens["sampled_logprobs"]}
    places |= {key: topk[key] for key in ("reference_logprobs", "reference_tail_logprobs") if key in topk}
    for _ in range(data.draw(st.integers(0, 4))):
        kind = data.draw(st.sampled_from([key for key, array in places.items() if len(array)]))
        values = places[kind]
        at, other = (data.draw(st.integers(0, len(values) - 1)) for _ in range(2))
        if values.dtype == np.float32:
            values[at] = data.draw(st.sampled_from([values[other], values[at] * np.float32(1.5), np.float32(0)]))
        else:
            limit = len(topk["id_table"]) if kind == "ids" else 60_000
            near = int(values[at]) + data.draw(st.integers(-3, 3))
            values[at] = min(max(data.draw(st.sampled_from([near, int(values[other])])), 0), limit)
    assert findings(artifact, tokens, topk) == by_the_rules(tokens, topk, artifact.manifest.encoding)
