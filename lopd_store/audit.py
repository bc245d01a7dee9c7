"""The audit: was this text sampled from this model? It proves instead of trusting.

    audit(model="sft", data="rollouts.parquet").verdict         # "consistent", "inconsistent" or "too little"

The statistic is that of `lopd_store.statistic`, over the distributions that the text was drawn from: temperature
applied, cut to top-p, renormalised.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lopd_store.digest import digest_file
from lopd_store.errors import DataError, InputError
from lopd_store.identity import ModelIdentity, identify
from lopd_store.provenance import require_sampling_ranges
from lopd_store.rollouts import Rollout, RolloutsFile
from lopd_store.statistic import SftAudit, Statistic, Verdict, add_up

if TYPE_CHECKING:
    import torch

SFT_POSITIONS = 20_000  # of SFT data, in a build: enough for a model fine-tuned a tenth of 50 steps away


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
    positions: int | None = None,
    dtype: str = "float32",
    device: str | None = None,
    batch_tokens: int = 4096,
    on_progress: Callable[[int, int], None] | None = None,
) -> Audit:
    """Test whether the responses of a rollouts or SFT data file were sampled from a model.

    Temperature and top-p are those of the file's record where they are not given. `limit` looks at the first rollouts
    only, `positions` at about so many positions (twice as many at most), evenly spread over the file. Tokens that the
    loss mask excludes were not sampled and do not count. `on_progress` hears (positions, in all).
    """
    from lopd_store import models
    from lopd_store.teachers.transformers import TransformersTeacher

    file = RolloutsFile(data)
    rollouts = file.read(0, limit) if positions is None else _spread(file, positions)
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


def audit_sft(
    *,
    teacher: str | Path,
    data: str | Path,
    dtype: str,
    device: str,
    batch_tokens: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> SftAudit:
    """The audit of SFT data that an artifact keeps: under its teacher, at about `SFT_POSITIONS` positions."""
    found = audit(
        model=teacher,
        data=data,
        positions=SFT_POSITIONS,
        dtype=dtype,
        device=device,
        batch_tokens=batch_tokens,
        on_progress=on_progress,
    )
    return SftAudit(data=found.data, temperature=found.temperature, top_p=found.top_p, found=found.overall)


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


def _spread(file: RolloutsFile, positions: int) -> list[Rollout]:
    """Every n-th rollout, so many that there are at least this many positions, if the file has them."""
    if positions < 1:
        raise InputError("`positions` is out of range", expected="1 or more", actual=positions)
    every = max(1, int(file.response_lengths.sum()) // positions)
    numbered = enumerate(rollout for batch in file.batches() for rollout in batch)
    return [rollout for row, rollout in numbered if row % every == 0]


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
    if file.record is not None:
        recorded = file.record.sampling
        temperature = recorded.temperature if temperature is None else temperature
        top_p = recorded.top_p if top_p is None else top_p
    if temperature is None or top_p is None:
        raise InputError(
            f"`{file.path}` does not say how it was sampled",
            hint="name it to `audit` or `record`: `--temperature 1 --top-p 1` for plain sampling",
        )
    require_sampling_ranges(temperature, top_p)
    return float(temperature), float(top_p)
