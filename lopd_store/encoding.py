"""How values become the numbers that are stored, and what that costs.

`compact` rounds log-probs to a grid, with the worst-case error stated; `exact` keeps float32. Token ids of the
top-k are stored as ranks in the part's own frequency table, which makes them small numbers. Rounded values are
ordinary float32, multiples of a power of two: a reader needs no arithmetic to use them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lopd_store.errors import ArtifactError, InputError
from lopd_store.topk import TopK, sort_entries

Profile = Literal["compact", "exact"]
K_LIMIT = 65_534  # 65,535 is the fill value of `counts`
TOPK_STEP = 1 / 16  # nat; tried on real teachers: KL of the rounding about 4e-5 nat
SAMPLED_STEP = 1 / 256  # nat; the advantage is a difference of two of these


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """What is kept of each distribution and how finely; everything a reader must know to decode.

    Steps are in nats and 0 where nothing is rounded; the worst-case error of a stored value is half its step.
    """

    profile: Profile
    k_min: int
    k_max: int
    coverage: float
    topk_step: float
    sampled_step: float

    def to_json(self) -> dict[str, Any]:
        """The manifest's `encoding` object."""
        return {
            "profile": self.profile,
            "selection": {"rule": "teacher", "k_min": self.k_min, "k_max": self.k_max, "coverage": self.coverage},
            "steps": {"topk_logprobs": self.topk_step, "sampled_logprobs": self.sampled_step},
            "bounds": {"topk_logprobs": self.topk_step / 2, "sampled_logprobs": self.sampled_step / 2},
        }

    @classmethod
    def from_json(cls, value: dict[str, Any], *, where: str) -> Encoding:
        """Parse what `to_json` gave; raises ArtifactError where it says something else."""
        try:
            selection, steps = value["selection"], value["steps"]
            encoding = make_encoding(
                exact=value["profile"] == "exact",
                k_min=selection["k_min"],
                k_max=selection["k_max"],
                coverage=selection["coverage"],
                topk_step=steps["topk_logprobs"],
                sampled_step=steps["sampled_logprobs"],
            )
        except (KeyError, TypeError, InputError) as error:
            raise ArtifactError(f"`{where}` is not an encoding: {error}") from error
        if encoding.to_json() != value:
            raise ArtifactError(f"`{where}` is not an encoding of this version", actual=repr(value)[:300])
        return encoding


def make_encoding(
    *,
    exact: bool = False,
    k_min: int = 1,
    k_max: int = 64,
    coverage: float = 0.99,
    topk_step: float = TOPK_STEP,
    sampled_step: float = SAMPLED_STEP,
) -> Encoding:
    """An encoding from the options of `lopd-store build`; raises InputError at values out of range."""
    for name, k in (("k_min", k_min), ("k_max", k_max)):
        if type(k) is not int or not 1 <= k <= K_LIMIT:
            raise InputError(f"`{name}` is out of range", expected=f"1 to {K_LIMIT}", actual=k)
    if k_min > k_max:
        raise InputError("`k_min` is greater than `k_max`", actual=f"{k_min} > {k_max}")
    if type(coverage) not in (int, float) or not 0 < coverage <= 1:
        raise InputError("`coverage` is out of range", expected="above 0, at most 1 (1 keeps k_max)", actual=coverage)
    if exact:
        topk_step = sampled_step = 0.0
    elif not all(step in (2.0**-n for n in range(1, 21)) for step in (topk_step, sampled_step)):
        raise InputError("a step is not a power of two", expected="1/2, 1/4, … 2^-20", actual=(topk_step, sampled_step))
    return Encoding(
        profile="exact" if exact else "compact",
        k_min=k_min,
        k_max=k_max,
        coverage=float(coverage),
        topk_step=float(topk_step),
        sampled_step=float(sampled_step),
    )


def round_to_grid(logprobs: npt.NDArray[np.float32], step: float) -> npt.NDArray[np.float32]:
    """The nearest multiples of `step` (ties to even), unchanged for step 0; -inf stays, and -0.0 becomes 0.0."""
    if step == 0:
        return logprobs
    rounded: npt.NDArray[np.float32] = np.rint(logprobs / np.float32(step)) * np.float32(step) + np.float32(0)
    return rounded


def round_topk(topk: TopK, step: float) -> TopK:
    """Round log-probs and tail, and put entries that rounding made equal back in order of their ids."""
    if step == 0:
        return topk
    rounded = TopK(
        counts=topk.counts,
        ids=topk.ids,
        logprobs=round_to_grid(topk.logprobs, step),
        tail_logprobs=round_to_grid(topk.tail_logprobs, step),
    )
    return sort_entries(rounded)


def ids_to_ranks(ids: npt.NDArray[np.uint32]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
    """(table, ranks): `table[ranks]` are the ids; the table lists distinct ids, most frequent first, then by id."""
    if len(ids) == 0:
        return np.zeros(0, np.uint32), np.zeros(0, np.uint32)
    frequency = np.bincount(ids)
    distinct = np.flatnonzero(frequency)
    table = distinct[np.lexsort((distinct, -frequency[distinct]))].astype(np.uint32)
    rank_of = np.zeros(len(frequency), np.uint32)
    rank_of[table] = np.arange(len(table), dtype=np.uint32)
    return table, rank_of[ids]


def ranks_to_ids(table: npt.NDArray[np.uint32], ranks: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """The ids behind the ranks; raises ArtifactError where a rank has no row in the table."""
    if len(ranks) and int(ranks.max()) >= len(table):
        raise ArtifactError("a rank has no row in `id_table`", expected=f"below {len(table)}", actual=int(ranks.max()))
    return table[ranks]
