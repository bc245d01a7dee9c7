"""Honest sets: at every position of a real text, many tokens drawn from the model's own distribution.

Two cores sample about 70 tokens a second, too few for a hundred texts. Given its context, though, each token drawn is a
sample from the model, and that is all the audit supposes: one token per position makes a set as honest as a text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SETS = 100
PLAIN, CUT = (1.0, 1.0), (0.7, 0.9)  # temperature, top-p
_BATCH_TOKENS = 4096
Columns = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The sums of the audit per rollout: column 0 of `score` is the text itself, the others are drawn sets."""

    positions: npt.NDArray[np.int64]  # [rollouts]
    score: npt.NDArray[np.float64]  # [rollouts, sets]
    variance: npt.NDArray[np.float64]  # [rollouts]
    entropy: npt.NDArray[np.float64]  # [rollouts]

    @property
    def z(self) -> npt.NDArray[np.float64]:
        """Of each column."""
        z: npt.NDArray[np.float64] = self.score.sum(axis=0) / np.sqrt(self.variance.sum())
        return z


@dataclass(frozen=True, kw_only=True)
class Honest:
    """The sets drawn from a model, and its scores of them; `cut` are other draws, at another temperature and top-p."""

    ids: npt.NDArray[np.int64]  # [positions, SETS]
    plain: Scores
    cut: Scores


def draw_honest(cache: Path, model: Path, text: Path, seed: int = 0) -> Honest:
    """Draw SETS tokens at each position of a text, and score them under the model that they are drawn from."""
    path = cache / "honest.npz"
    if not path.is_file():
        import torch

        from lopd_store.audit import sampling_logprobs

        generator = torch.Generator().manual_seed(seed)

        def compute(targets: torch.Tensor, logits: torch.Tensor) -> Columns:
            columns: Columns = {}
            for name, sampling in (("plain", PLAIN), ("cut", CUT)):
                mass = sampling_logprobs(logits, *sampling).exp()
                ids = torch.multinomial(mass, SETS, replacement=True, generator=generator)
                del mass
                if name == "plain":
                    columns["ids"] = ids.numpy()
                    ids = torch.cat([targets[:, None], ids], dim=1)
                columns |= {f"{name}_{key}": value for key, value in _score(logits, ids, sampling).items()}
            return columns

        columns, positions = _map(model, text, compute)
        sums = {name: _add_up(column, positions) for name, column in columns.items() if name != "ids"}
        _save(path, {"ids": columns["ids"], "positions": positions, **sums})
    with np.load(path) as arrays:
        plain, cut = (
            Scores(positions=arrays["positions"], **{key: arrays[f"{name}_{key}"] for key in _KEYS})
            for name in ("plain", "cut")
        )
        return Honest(ids=arrays["ids"], plain=plain, cut=cut)


def score_under(cache: Path, name: str, model: Path, text: Path, ids: npt.NDArray[np.int64], dtype: str) -> Scores:
    """The scores of a text and of tokens drawn at its positions under another model."""
    path = cache / f"{name}.npz"
    if not path.is_file():
        import torch

        from lopd_store.rollouts import RolloutsFile
        from lopd_store.teachers.transformers import batches

        rollouts = RolloutsFile(text).read()
        starts = np.cumsum([0, *(len(rollout.response_ids) for rollout in rollouts)])
        order = [index for batch in batches(rollouts, _BATCH_TOKENS) for index in batch]
        waiting = torch.from_numpy(np.concatenate([ids[starts[index] : starts[index + 1]] for index in order]))

        def compute(targets: torch.Tensor, logits: torch.Tensor) -> Columns:
            nonlocal waiting  # the engine asks for the positions in its own order
            now, waiting = waiting[: len(targets)], waiting[len(targets) :]
            return _score(logits, torch.cat([targets[:, None], now], dim=1), PLAIN)

        columns, positions = _map(model, text, compute, dtype)
        _save(path, {"positions": positions, **{key: _add_up(columns[key], positions) for key in _KEYS}})
    with np.load(path) as arrays:
        return Scores(**arrays)


_KEYS = ("score", "variance", "entropy")


def _score(logits: Any, ids: Any, sampling: tuple[float, float]) -> Columns:
    """What the audit makes of several tokens per position, and the entropy."""
    import torch

    from lopd_store.audit import sampling_logprobs, score_and_variance

    logprobs = sampling_logprobs(logits, *sampling)
    entropy = -torch.where(logprobs > -torch.inf, logprobs.exp() * logprobs, 0.0).sum(dim=-1)
    del logprobs
    return {**score_and_variance(logits, ids, *sampling), "entropy": entropy.numpy()}


def _map(
    model: Path, text: Path, compute: Callable[..., Columns], dtype: str = "float32"
) -> tuple[Columns, npt.NDArray[np.int64]]:
    """The columns for all positions in the order of the text, and how many positions each rollout has."""
    from lopd_store.identity import identify
    from lopd_store.rollouts import RolloutsFile
    from lopd_store.teachers.transformers import TransformersTeacher

    rollouts = RolloutsFile(text).read()
    vocab_size = identify(model).vocab_size
    engine = TransformersTeacher(
        str(model), vocab_size=vocab_size, dtype=dtype, device="cpu", batch_tokens=_BATCH_TOKENS
    )
    found = dict(
        engine.map_positions(rollouts, lambda targets, logits: compute(targets, logits[:, :vocab_size].float()))
    )
    columns = {name: np.concatenate([found[index][name] for index in range(len(rollouts))]) for name in found[0]}
    return columns, np.array([len(rollout.response_ids) for rollout in rollouts])


def _add_up(values: npt.NDArray[Any], positions: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """Sums per rollout."""
    sums: npt.NDArray[Any] = np.add.reduceat(values, np.cumsum(positions) - positions, axis=0)
    return sums


def _save(path: Path, arrays: Columns) -> None:
    unfinished = path.with_suffix(".unfinished.npz")
    np.savez(unfinished, allow_pickle=False, **arrays)
    unfinished.replace(path)
