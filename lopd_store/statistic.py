"""The statistic of an audit: was this text sampled from this distribution?

    Statistic(positions=20_000, outside=0, score=-3160.0, variance=38_000.0).verdict        # "inconsistent"

If x_t is drawn from p_t, then log p_t(x_t) + H(p_t) has mean 0 and variance V_t = sum p_t log^2 p_t - H(p_t)^2, given
everything before it. The sum over positions is a martingale, and divided by the square root of the summed variances
it is standard normal (the martingale central limit theorem), however the positions depend on each other and wherever
a response stops. It holds for any grouping of tokens into outcomes, so stored entries and one tail are enough.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lopd_store import strictjson
from lopd_store.digest import is_digest
from lopd_store.errors import ArtifactError

Verdict = Literal["consistent", "inconsistent", "too little"]
Z_LIMIT = 4.0  # an honest set of thousands of positions passes it once in 16,000
EFFECT_LIMIT = 0.01  # nat per token; less is what another engine or precision can make of an honest text
OUTSIDE_LIMIT = 1e-3  # share of tokens outside top-p that rounding in another engine may explain
LEAST_POSITIONS = 200  # fewer are not normal enough to judge
_SUMS = ("positions", "outside", "score", "variance")
_DECIMALS = 6  # of stored sums: processors differ in the last bits of an exponential
_BLOCK = 1 << 13  # positions looked at together


@dataclass(frozen=True, kw_only=True)
class Statistic:
    """The martingale over some positions; sums of (log p + H) and of its variance, in nats and nats squared."""

    positions: int
    outside: int  # tokens to which the model gives no probability; they are not in the sums
    score: float
    variance: float

    @property
    def z(self) -> float:
        """Standard normal where the text was sampled from the model; 0 where nothing was random."""
        return self.score / math.sqrt(self.variance) if self.variance > 0 else 0.0

    @property
    def p_value(self) -> float:
        """Two-sided."""
        return math.erfc(abs(self.z) / math.sqrt(2))

    @property
    def effect(self) -> float:
        """How much likelier than its own samples the model finds the text, in nats per token."""
        return self.score / max(self.positions - self.outside, 1)

    @property
    def interval(self) -> tuple[float, float]:
        """The effect with 95 % confidence."""
        half = 1.96 * math.sqrt(self.variance) / max(self.positions - self.outside, 1)
        return self.effect - half, self.effect + half

    @property
    def verdict(self) -> Verdict:
        """Inconsistent where |z| is above 4 and the effect is no noise, or too many tokens could not be drawn."""
        if self.outside > max(OUTSIDE_LIMIT * self.positions, 1):
            return "inconsistent"
        if self.positions < LEAST_POSITIONS or self.variance == 0:
            return "too little"
        return "inconsistent" if abs(self.z) > Z_LIMIT and abs(self.effect) > EFFECT_LIMIT else "consistent"

    def is_near(self, other: Statistic) -> bool:
        """Whether another engine or precision may make the one of the other, over the same text."""
        room = EFFECT_LIMIT * self.positions
        return (
            self.positions == other.positions
            and abs(self.outside - other.outside) <= max(OUTSIDE_LIMIT * self.positions, 1)
            and abs(self.score - other.score) <= room
            and abs(self.variance - other.variance) <= room
        )

    def __str__(self) -> str:
        low, high = self.interval
        words = f"z {self.z:.1f}, {self.effect:+.4f} nat per token ({low:+.4f} to {high:+.4f})"
        outside = f", {self.outside:,} of them impossible" if self.outside else ""
        return f"{words}, {self.positions:,} positions{outside}"

    def sums(self) -> dict[str, Any]:
        """A JSON object of the sums, rounded: what an artifact stores; everything else follows from them."""
        return {
            "positions": self.positions,
            "outside": self.outside,
            "score": round(self.score, _DECIMALS) + 0.0,  # no negative zero
            "variance": round(self.variance, _DECIMALS),
        }

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the sums and what follows from them."""
        return {
            **{name: getattr(self, name) for name in _SUMS},
            "z": self.z,
            "p_value": self.p_value,
            "effect": self.effect,
            "interval": list(self.interval),
            "verdict": self.verdict,
        }

    @classmethod
    def from_json(cls, value: Any, *, where: str, open_ended: bool = False) -> Statistic:
        """Parse what `sums` gave."""
        value = strictjson.members(value, _SUMS, where=where, open_ended=open_ended)
        positions, outside = value["positions"], value["outside"]
        if type(positions) is not int or type(outside) is not int or not 0 <= outside <= positions:
            raise ArtifactError(f"`{where}` has no counts of positions", actual=repr((positions, outside))[:100])
        for name in ("score", "variance"):
            if type(value[name]) is not float or not (name == "score" or value[name] >= 0):
                raise ArtifactError(f"`{where}.{name}` is not a sum", actual=repr(value[name])[:100])
        return cls(**{name: value[name] for name in _SUMS})


@dataclass(frozen=True, kw_only=True)
class SftAudit:
    """What auditing SFT data against the teacher found, and with which sampling parameters applied."""

    data: str  # digest of the file
    temperature: float
    top_p: float
    found: Statistic

    def to_json(self) -> dict[str, Any]:
        """A JSON object: what was audited, and the sums."""
        return {"data": self.data, "temperature": self.temperature, "top_p": self.top_p, **self.found.sums()}

    @classmethod
    def from_json(cls, value: Any, *, where: str, open_ended: bool = False) -> SftAudit:
        """Parse what `to_json` gave."""
        value = strictjson.members(value, ("data", "temperature", "top_p", *_SUMS), where=where, open_ended=open_ended)
        if not is_digest(value["data"]):
            raise ArtifactError(f"`{where}.data` is not a digest", actual=repr(value["data"])[:100])
        for name in ("temperature", "top_p"):
            if type(value[name]) is not float or value[name] < 0:
                raise ArtifactError(f"`{where}.{name}` is not a number that fits", actual=repr(value[name])[:100])
        return cls(
            data=value["data"],
            temperature=value["temperature"],
            top_p=value["top_p"],
            found=Statistic.from_json({name: value[name] for name in _SUMS}, where=where),
        )


def add_up(statistics: Sequence[Statistic]) -> Statistic:
    """One statistic of several."""
    return Statistic(
        positions=sum(one.positions for one in statistics),
        outside=sum(one.outside for one in statistics),
        score=math.fsum(one.score for one in statistics),
        variance=math.fsum(one.variance for one in statistics),
    )


def of_stored(
    counts: npt.NDArray[Any],  # [positions], entries of each
    logprobs: npt.NDArray[np.float32],  # [entries], of the policy
    tail_logprobs: npt.NDArray[np.float32],  # [positions], of the policy
    is_response: npt.NDArray[np.bool_],  # [entries]
    counted: npt.NDArray[np.bool_],  # [positions]
    temperature: float,
) -> Statistic:
    """The statistic that stored distributions give: their entries are outcomes, and all the rest is one more.

    They are normalised, as rounding has moved their sums. At another temperature than 1 nobody knows what the rest
    weighs: then the entries alone are outcomes, and positions whose response token is none of them do not count.
    """
    ends = np.cumsum(counts, dtype=np.int64)
    found = []
    for first in range(0, len(counts), _BLOCK):
        some = slice(first, first + _BLOCK)
        entries = slice(int(ends[first]) - int(counts[first]), int(ends[some][-1]))
        tails = tail_logprobs[some] if temperature == 1 else np.full(len(counts[some]), -np.inf, np.float32)
        block = _scores(counts[some], logprobs[entries], tails, is_response[entries], temperature)
        found.append(_add(*block, counted[some], only_entries=temperature != 1))
    return add_up(found)


def _scores(
    counts: npt.NDArray[Any],
    logprobs: npt.NDArray[np.float32],
    tails: npt.NDArray[np.float32],
    is_response: npt.NDArray[np.bool_],
    temperature: float,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """log p(x) + H and V of each position, and whether its response token is an entry."""
    position = np.repeat(np.arange(len(counts)), counts)
    starts = np.cumsum(counts, dtype=np.int64) - counts
    values, tail = logprobs.astype(np.float64) / temperature, tails.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        peak = np.maximum(np.maximum.reduceat(values, starts), tail)
        total = peak + np.log(np.add.reduceat(np.exp(values - peak[position]), starts) + np.exp(tail - peak))
        values, tail = values - total[position], tail - total
        mass, rest = np.exp(values), np.exp(tail)
        finite, finite_tail = np.where(mass > 0, values, 0), np.where(rest > 0, tail, 0)
    entropy = -np.add.reduceat(mass * finite, starts) - rest * finite_tail
    variance = np.add.reduceat(mass * finite**2, starts) + rest * finite_tail**2 - entropy**2
    inside = np.zeros(len(counts), np.bool_)
    inside[position[is_response]] = True
    score = tail.copy()
    score[position[is_response]] = values[is_response]
    return score + entropy, np.maximum(variance, 0), inside


def _add(
    score: npt.NDArray[np.float64],
    variance: npt.NDArray[np.float64],
    inside: npt.NDArray[np.bool_],
    counted: npt.NDArray[np.bool_],
    *,
    only_entries: bool,
) -> Statistic:
    counted = counted & ~np.isnan(score) & (inside | (not only_entries))
    possible = counted & np.isfinite(score)
    return Statistic(
        positions=int(counted.sum()),
        outside=int(counted.sum() - possible.sum()),
        score=float(score[possible].sum()),
        variance=float(variance[possible].sum()),
    )
