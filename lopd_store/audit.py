"""The audit: was this text sampled from this model? It proves instead of trusting.

    audit(model="sft", data="rollouts.parquet").verdict         # "consistent", "inconsistent" or "too little"

If x_t is drawn from p_t, then log p_t(x_t) + H(p_t) has mean 0 and variance V_t = sum p_t log^2 p_t - H(p_t)^2, given
everything before it. The sum over positions is a martingale, and divided by the square root of the summed variances
it is standard normal (the martingale central limit theorem), however the positions depend on each other and wherever
a response stops. p_t is the distribution that was drawn from: temperature applied, cut to top-p, renormalised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lopd_store.digest import digest_file
from lopd_store.errors import DataError, InputError
from lopd_store.identity import ModelIdentity, identify
from lopd_store.rollouts import Rollout, RolloutsFile

if TYPE_CHECKING:
    import torch

Verdict = Literal["consistent", "inconsistent", "too little"]
Z_LIMIT = 4.0  # an honest set of thousands of positions passes it once in 16,000
OUTSIDE_LIMIT = 1e-3  # share of tokens outside top-p that rounding in another engine may explain
LEAST_POSITIONS = 200  # fewer are not normal enough to judge


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
        """Inconsistent where |z| is above 4 or too many tokens could not have been drawn at all."""
        if self.outside > max(OUTSIDE_LIMIT * self.positions, 1):
            return "inconsistent"
        if self.positions < LEAST_POSITIONS or self.variance == 0:
            return "too little"
        return "inconsistent" if abs(self.z) > Z_LIMIT else "consistent"

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the sums and what follows from them."""
        return {
            "positions": self.positions,
            "outside": self.outside,
            "score": self.score,
            "variance": self.variance,
            "z": self.z,
            "p_value": self.p_value,
            "effect": self.effect,
            "interval": list(self.interval),
            "verdict": self.verdict,
        }


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What the audit of a file found, overall and per rollout."""

    model: ModelIdentity
    data: str  # digest of the file
    temperature: float
    top_p: float
    overall: Statistic
    rollouts: tuple[Statistic, ...]

    @property
    def verdict(self) -> Verdict:
        """That of all positions together."""
        return self.overall.verdict

    def to_json(self) -> dict[str, Any]:
        """A JSON object; of the rollouts only how many there are and the most unusual ones."""
        order = sorted(range(len(self.rollouts)), key=lambda row: -abs(self.rollouts[row].z))
        return {
            "model": self.model.to_json(),
            "data": self.data,
            "temperature": self.temperature,
            "top_p": self.top_p,
            **self.overall.to_json(),
            "rollouts": len(self.rollouts),
            "most_unusual": [{"row": row, "z": self.rollouts[row].z} for row in order[:10]],
        }


def audit(
    *,
    model: str | Path,
    data: str | Path,
    temperature: float | None = None,
    top_p: float | None = None,
    limit: int | None = None,
    dtype: str = "float32",
    device: str | None = None,
    batch_tokens: int = 4096,
    on_progress: Callable[[int, int], None] | None = None,
) -> Audit:
    """Test whether the responses of a rollouts or SFT data file were sampled from a model.

    Temperature and top-p are those of the file's record where they are not given. `limit` looks at the first rollouts
    only. Tokens that the loss mask excludes were not sampled and do not count. `on_progress` hears (positions, in all).
    """
    from lopd_store import models
    from lopd_store.teachers.transformers import TransformersTeacher

    file = RolloutsFile(data)
    rollouts = file.read(0, limit)
    if not rollouts:
        raise DataError(f"`{data}` has no rollouts to audit")
    temperature, top_p = _sampling(file, temperature, top_p)
    identity = identify(model)
    if (highest := max(int(one.token_ids.max(initial=0)) for one in rollouts)) >= identity.vocab_size:
        raise DataError(
            f"`{data}` has ids that the tokenizer of `{model}` does not know",
            expected=f"below {identity.vocab_size}",
            actual=highest,
        )
    engine = TransformersTeacher(
        str(model),
        vocab_size=identity.vocab_size,
        dtype=dtype,
        device=models.pick_device(device),
        batch_tokens=batch_tokens,
    )
    found: list[Statistic | None] = [None] * len(rollouts)
    done, total = 0, sum(len(one.response_ids) for one in rollouts)

    def compute(targets: torch.Tensor, logits: torch.Tensor) -> dict[str, np.ndarray]:
        return score_and_variance(logits[:, : identity.vocab_size], targets, temperature, top_p)

    for index, columns in engine.map_positions(rollouts, compute):
        found[index] = _statistic(rollouts[index], columns["score"], columns["variance"])
        done += len(columns["score"])
        if on_progress is not None:
            on_progress(done, total)
    statistics = [one for one in found if one is not None]
    return Audit(
        model=identity,
        data=digest_file(file.path).sha256,
        temperature=temperature,
        top_p=top_p,
        overall=add_up(statistics),
        rollouts=tuple(statistics),
    )


def score_and_variance(
    logits: torch.Tensor,  # [positions, vocabulary], of the ids that can be drawn
    targets: torch.Tensor,  # [positions] or [positions, several]
    temperature: float,
    top_p: float,
) -> dict[str, np.ndarray]:
    """`score` log p(x) + H of each target and `variance` of each position in nats, float64.

    A score of -inf is an impossible token.
    """
    import torch

    logprobs = sampling_logprobs(logits, temperature, top_p)
    mass = logprobs.exp()
    finite = torch.where(mass > 0, logprobs, 0.0)
    entropy = -(mass * finite).sum(dim=-1)
    variance = (mass * finite.square()).sum(dim=-1) - entropy.square()
    several = targets.reshape(len(targets), -1)
    score = (logprobs.gather(1, several) + entropy[:, None]).reshape(targets.shape)
    return {"score": score.cpu().numpy(), "variance": variance.clamp(min=0).cpu().numpy()}


def sampling_logprobs(
    logits: torch.Tensor,  # [positions, vocabulary]
    temperature: float,
    top_p: float,
) -> torch.Tensor:
    """Log-probs of the distribution that a sampler draws from, float64; -inf for what it never draws.

    It is cut to top-p as the sampler cuts it: the likeliest tokens until their mass reaches top-p, the one that reaches
    it included. At temperature 0 all mass is on the likeliest token.
    """
    import torch

    if temperature == 0:
        logprobs = torch.full_like(logits, -torch.inf, dtype=torch.float64)
        logprobs.scatter_(1, logits.argmax(dim=-1, keepdim=True), 0)
    else:
        logprobs = torch.log_softmax(logits.double() / temperature, dim=-1)
    if top_p < 1:
        ordered, order = logprobs.sort(dim=-1, descending=True, stable=True)
        mass = ordered.exp()
        outside = mass.cumsum(dim=-1) - mass >= top_p
        logprobs = logprobs.scatter(1, order, ordered.masked_fill(outside, -torch.inf)).log_softmax(dim=-1)
    return logprobs


def add_up(statistics: Sequence[Statistic]) -> Statistic:
    """One statistic of several."""
    return Statistic(
        positions=sum(one.positions for one in statistics),
        outside=sum(one.outside for one in statistics),
        score=math.fsum(one.score for one in statistics),
        variance=math.fsum(one.variance for one in statistics),
    )


def _statistic(rollout: Rollout, score: np.ndarray, variance: np.ndarray) -> Statistic:
    counted = rollout.loss_mask
    possible = counted & np.isfinite(score)
    return Statistic(
        positions=int(counted.sum()),
        outside=int(counted.sum() - possible.sum()),
        score=float(score[possible].sum()),
        variance=float(variance[possible].sum()),
    )


def _sampling(file: RolloutsFile, temperature: float | None, top_p: float | None) -> tuple[float, float]:
    recorded = None if file.record is None else file.record.sampling
    if recorded is None and (temperature is None or top_p is None):
        raise InputError(
            f"`{file.path}` does not say how it was sampled",
            hint="name it: `--temperature 1 --top-p 1` for plain sampling",
        )
    if temperature is None and recorded is not None:
        temperature = recorded.temperature
    if top_p is None and recorded is not None:
        top_p = recorded.top_p
    assert temperature is not None and top_p is not None
    if not 0 <= temperature <= 100 or not 0 < top_p <= 1:
        raise InputError("sampling parameters are out of range", actual=f"temperature {temperature}, top-p {top_p}")
    return float(temperature), float(top_p)
