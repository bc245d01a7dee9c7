"""Values that are wrong though they decode: the containers are sound and the digests honest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lopd_store import layout
from lopd_store.encoding import Encoding, make_encoding
from lopd_store.grid import IMPOSSIBLE
from lopd_store.part import Part
from lopd_store.topk import TopK
from recipes.artifact import (
    COMPACT,
    EXACT,
    VOCABULARY,
    Tree,
    edited,
    make_part,
    tokens_only,
    with_array,
    with_arrays,
    with_counts,
    with_topk,
)

Breaker = Callable[[Tree], Tree]
FILL = 65_535


def _put(kind: str, name: str, index: Any, value: Any) -> Breaker:
    """Another value in a stored array."""

    def change(values: npt.NDArray[Any]) -> None:
        values[index] = value

    return lambda tree: with_array(tree, kind, name, change)


def _become(kind: str, name: str, values: Sequence[int]) -> Breaker:
    return lambda tree: with_array(tree, kind, name, lambda old: np.array(values, old.dtype))


def _token(name: str, index: Any, value: Any) -> Breaker:
    return _put(layout.TOKENS, name, index, value)


def _entry(name: str, index: Any, value: Any) -> Breaker:
    return _put(layout.TOPK, name, index, value)


HUGE = (1 << 63) - 1
# Two rollouts: tokens 0 to 6, of which 3 are prompt, and 7 to 10, of which 1 is.
OF_TOKENS: dict[tuple[str, str], Breaker] = {
    ("A035", "reference_logprobs_promised"): lambda tree: edited(tree, "reference_logprobs", True),
    ("A035", "reference_logprobs_not_promised"): lambda tree: edited(
        tokens_only(part=make_part()), "reference_logprobs", False
    ),
    ("A040", "more_rollouts_than_stored"): lambda tree: with_counts(tree, rollouts=3),
    ("A040", "fewer_tokens_than_stored"): lambda tree: with_counts(tree, tokens=10),
    ("A040", "more_positions_than_stored"): lambda tree: with_counts(tree, positions=8),
    ("A040", "no_rollouts"): lambda tree: with_counts(tree, rollouts=0, tokens=0, positions=0),
    ("A040", "2_to_the_52_tokens"): lambda tree: with_counts(tree, tokens=1 << 52),
    ("A041", "offsets_from_1"): _token("rollout_offsets", 0, 1),
    ("A041", "offsets_that_fall"): _become(layout.TOKENS, "rollout_offsets", [0, 12, 11]),
    ("A041", "offsets_that_end_too_early"): _token("rollout_offsets", -1, 10),
    ("A041", "offsets_that_end_too_late"): _token("rollout_offsets", -1, 12),
    ("A041", "offset_negative"): _token("rollout_offsets", 1, -1),
    ("A041", "offsets_that_overflow"): _become(layout.TOKENS, "rollout_offsets", [0, HUGE, 11]),
    ("A042", "prompt_of_no_tokens"): _token("prompt_lengths", 0, 0),
    ("A042", "prompt_of_negative_length"): _token("prompt_lengths", 0, -1),
    ("A042", "prompt_longer_than_the_rollout"): _token("prompt_lengths", 1, 5),
    ("A042", "prompt_of_2_to_the_31"): _token("prompt_lengths", 1, (1 << 31) - 1),
    ("A042", "prompts_that_leave_other_positions"): _become(layout.TOKENS, "prompt_lengths", [2, 1]),
    ("A050", "token_of_another_vocabulary"): _token("token_ids", 3, VOCABULARY),
    ("A050", "prompt_token_of_another_vocabulary"): _token("token_ids", 0, VOCABULARY),
    ("A050", "token_is_the_fill_value"): _token("token_ids", 0, 0xFFFF_FFFF),
    ("A051", "sampled_code_is_the_fill_value"): _token("sampled_logprobs", 2, FILL),
    ("A051", "reference_code_is_the_fill_value"): lambda tree: _token("reference_logprobs", 2, FILL)(
        tokens_only(part=make_part())
    ),
}
OF_EXACT_TOKENS: dict[tuple[str, str], Breaker] = {
    ("A051", "sampled_logprob_is_nan"): _token("sampled_logprobs", 2, np.nan),
    ("A051", "sampled_logprob_above_0"): _token("sampled_logprobs", 2, 1e-6),
    ("A051", "sampled_logprob_infinite"): _token("sampled_logprobs", 2, np.inf),
    ("A051", "reference_logprob_is_a_probability"): lambda tree: _token("reference_logprobs", 0, 0.5)(
        tokens_only(EXACT, make_part(encoding=EXACT))
    ),
}
OF_TOPK: dict[tuple[str, str], Breaker] = {
    ("A043", "counts_that_add_up_to_more"): _entry("counts", 0, 3),
    ("A043", "count_is_the_fill_value"): _entry("counts", 0, FILL),
    ("A043", "count_0"): _entry("counts", 0, 0),
    ("A044", "row_beyond_the_table"): _entry("ids", 0, 1000),
    ("A044", "row_just_beyond_the_table"): lambda tree: with_array(
        tree, layout.TOPK, "id_table", lambda table: table[:-1]
    ),
    ("A044", "row_is_the_fill_value"): _entry("ids", -1, 0xFFFF_FFFF),
    ("A044", "no_table"): lambda tree: with_array(tree, layout.TOPK, "id_table", lambda table: table[:0]),
    ("A045", "id_twice"): lambda tree: with_array(
        tree, layout.TOPK, "id_table", lambda table: np.append(table, table[:1])
    ),
    ("A050", "entry_of_another_vocabulary"): lambda tree: with_array(
        tree, layout.TOPK, "id_table", lambda table: np.append(table, np.uint32(VOCABULARY))
    ),
    ("A051", "entry_is_impossible"): _entry("logprobs", 0, IMPOSSIBLE),
    ("A051", "entry_is_the_fill_value"): _entry("logprobs", 0, FILL),
    ("A051", "tail_is_the_fill_value"): _entry("tail_logprobs", 0, FILL),
}
OF_EXACT_TOPK: dict[tuple[str, str], Breaker] = {
    ("A051", "entry_is_nan"): _entry("logprobs", 0, np.nan),
    ("A051", "entry_is_minus_infinity"): _entry("logprobs", 0, -np.inf),
    ("A051", "entry_above_0"): _entry("logprobs", 0, 0.25),
    ("A051", "tail_is_nan"): _entry("tail_logprobs", 0, np.nan),
    ("A051", "tail_above_0"): _entry("tail_logprobs", 0, 1.0),
    ("A040", "more_entries_than_stored"): lambda tree: with_counts(tree, entries=1),
    ("A040", "2_to_the_52_entries"): lambda tree: with_counts(tree, entries=1 << 52),
}

Row = Sequence[tuple[int, float]]  # (id, probability) of the entries of a position


def _part(rows: Sequence[Row], tails: Sequence[float], responses: Sequence[int], sampled: Sequence[float]) -> Part:
    """One rollout with the prompt 5, whose distributions are written out as probabilities."""

    def logs(probabilities: Sequence[float]) -> npt.NDArray[np.float32]:
        with np.errstate(divide="ignore"):
            return np.log(np.array(probabilities, np.float64)).astype(np.float32)

    topk = TopK(
        counts=np.array([len(row) for row in rows], np.uint16),
        ids=np.array([id for row in rows for id, _ in row], np.uint32),
        logprobs=logs([probability for row in rows for _, probability in row]),
        tail_logprobs=logs(tails),
    )
    return replace(
        make_part([([5], responses)]), sampled_logprobs=logs(sampled), reference_logprobs=logs(sampled), topk=topk
    )


def _exact(
    row: Row,
    tail: float,
    *,
    response: int = 2,
    sampled: float | None = None,
    coverage: float = 0.9,
    k_min: int = 1,
) -> Tree:
    """One position, in the profile `exact`; the response token is the first entry where nothing else is said."""
    encoding = make_encoding(exact=True, k_min=k_min, k_max=4, coverage=coverage)
    found = dict(row).get(response, tail) if sampled is None else sampled
    return with_topk(encoding, _part([row], [tail], [response], [found]))


def _compact(encoding: Encoding = COMPACT) -> Tree:
    return with_topk(encoding, make_part(encoding=encoding))


ALSO = {  # what else follows
    ("A046", "response_token_by_the_table"): ("A065",),  # it is not known as the response token then
    ("A062", "response_token_twice"): ("A064",),  # with two log-probs
}


def made() -> dict[tuple[str, str], Tree]:
    """Distributions that no teacher gives, or that the selection does not keep."""
    good: Row = [(2, 0.5), (3, 0.3), (4, 0.15)]
    both = replace(EXACT, rule="teacher+reference")
    return {
        ("A046", "response_token_by_the_table"): with_arrays(
            _exact(good, 0.05), layout.TOPK, id_table=np.array([2, 3, 4], "u4"), ids=np.array([1, 2, 3], "u4")
        ),
        ("A060", "more_entries_than_k_max"): _exact([*good, (6, 0.02), (7, 0.01)], 0.02),
        ("A060", "position_without_entries"): with_topk(EXACT, _part([[], good], [1.0, 0.05], [3, 2], [0.1, 0.5])),
        ("A061", "logprobs_that_rise"): _exact([(2, 0.3), (3, 0.5), (4, 0.15)], 0.05),
        ("A061", "equal_logprobs_with_ids_that_fall"): _exact([(2, 0.5), (4, 0.225), (3, 0.225)], 0.05),
        ("A062", "id_twice"): _exact([(2, 0.5), (3, 0.3), (3, 0.15)], 0.05),
        ("A062", "response_token_twice"): with_arrays(_exact(good, 0.05), layout.TOPK, ids=np.array([0, 0, 2], "u4")),
        ("A063", "too_little_mass"): _exact([(2, 0.5), (3, 0.3), (4, 0.11)], 0.01),
        ("A063", "too_much_mass"): _exact([(2, 0.7), (3, 0.3), (4, 0.15)], 0.05, k_min=3),
        ("A063", "tail_counted_twice"): _exact(good, 0.1),
        ("A063", "tail_certain"): with_array(_compact(), layout.TOPK, "tail_logprobs", lambda tails: tails * 0),
        ("A064", "sampled_logprob_of_another_token"): _exact(good, 0.05, sampled=0.3),
        ("A064", "sampled_logprob_impossible"): _exact(good, 0.05, sampled=0.0),
        ("A065", "sampled_token_likelier_than_the_tail"): _exact(good, 0.05, response=9, sampled=0.2),
        ("A065", "sampled_token_certain"): _exact(good, 0.05, response=9, sampled=1.0),
        ("A066", "too_little_coverage"): _exact([(2, 0.5), (3, 0.3)], 0.2),
        ("A066", "fewer_than_k_max_entries"): _exact(good, 0.05, coverage=1.0),
        ("A067", "an_entry_too_many"): _exact([*good, (6, 0.03)], 0.02),
        ("A067", "entries_after_certainty"): _exact([(2, 0.97), (3, 0.02)], 0.01),
        ("A068", "reference_logprobs_do_not_sum_to_one"): with_array(
            _compact(both), layout.TOPK, "reference_logprobs", lambda values: values - 1
        ),
        ("A068", "reference_tail_certain"): with_array(
            _compact(both), layout.TOPK, "reference_tail_logprobs", lambda values: values * 0
        ),
        ("A051", "reference_entry_is_nan"): with_array(
            _compact(both), layout.TOPK, "reference_logprobs", lambda values: values * np.float32(np.nan)
        ),
    }
