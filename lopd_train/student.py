"""The student: a causal language model that gives log-probs without ever holding [positions, vocabulary] logits.

    student = load("sft/", config)
    student.token_logprobs(batch)       # [positions], differentiable
    student.topk_logprobs(batch)        # at the stored ids, and the tail

The body runs once over a batch; the head runs over chunks of positions, whose logits are computed again in the
backward pass instead of being kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lopd_store import models
from lopd_store.errors import InputError
from lopd_store.models import SplitModel
from lopd_train.batches import Batch, BatchTopK
from lopd_train.config import TrainConfig

_CHUNK_LOGITS = 1 << 24  # alive at once, a few times over: 64 MiB each in float32
_MIN_CHUNK = 256  # positions; below it, adding up the head's gradient costs more than computing it


@dataclass(frozen=True, kw_only=True)
class Student:
    """A model in training, its tokenizer, and its two halves; weights are float32, whatever the arithmetic is."""

    model: Any
    tokenizer: Any
    split: SplitModel
    device: str
    dtype: torch.dtype  # of the arithmetic

    def token_logprobs(self, batch: Batch) -> Tensor:
        """log p_student of each target, given everything before it; [positions], float32."""
        with self._autocast():
            return chunked_token_logprobs(self.split, self._states(batch), batch.targets)

    def topk_logprobs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """log p_student at the stored ids [entries], and of everything else together [positions]; float32."""
        assert batch.topk is not None
        with self._autocast():
            return chunked_topk_logprobs(self.split, self._states(batch), batch.topk)

    def _states(self, batch: Batch) -> Tensor:
        """The hidden state that predicts each target; [positions, width].

        Padding is on the right, where a causal model does not look, so no attention mask is needed.
        """
        output = self.split.body(input_ids=batch.input_ids, use_cache=False)
        states: Tensor = output.last_hidden_state.flatten(0, 1)[batch.sources]
        return states

    def _autocast(self) -> torch.autocast:
        return torch.autocast(torch.device(self.device).type, self.dtype, enabled=self.dtype != torch.float32)


def load(model: str | Path, config: TrainConfig) -> Student:
    """Load a student with float32 weights on the config's device."""
    device = config.device or models.default_device()
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"there is no device `{device}` here", expected="cpu", hint="leave `--device` out")
    files = models.find(model)
    loaded = models.load_model(files, dtype="float32", device=device)
    if files.gguf_file is not None:
        loaded = models.copy_without_quantization(loaded)
    if config.gradient_checkpointing:
        loaded.activation_checkpointing_enable()
    return Student(
        model=loaded,
        tokenizer=models.load_tokenizer(files),
        split=models.split(loaded),
        device=device,
        dtype=getattr(torch, config.dtype),
    )


def chunked_token_logprobs(
    split: SplitModel,
    states: Tensor,  # [positions, width]
    targets: Tensor,  # [positions]
    *,
    chunk: int | None = None,  # positions
) -> Tensor:  # [positions]
    """Log-softmax of the head at one id per position, a chunk of positions at a time."""

    def head(states: Tensor, targets: Tensor) -> Tensor:
        logits = split.logits(states)
        return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(dim=-1)

    size = chunk or _chunk(split)
    pairs = zip(torch.split(states, size), torch.split(targets, size), strict=True)
    return torch.cat([_recomputed(head, *pair) for pair in pairs])


def chunked_topk_logprobs(
    split: SplitModel,
    states: Tensor,  # [positions, width]
    topk: BatchTopK,
    *,
    chunk: int | None = None,  # positions
) -> tuple[Tensor, Tensor]:  # [entries], [positions]
    """Log-softmax of the head at the stored ids, and the log of the mass outside them.

    The tail is summed over the logits that are left, not taken as 1 minus the rest, so it is exact where it is small.
    """

    def head(states: Tensor, rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        logits = split.logits(states)
        total = logits.logsumexp(dim=-1)
        rest = logits.index_put((rows, ids), logits.new_tensor(-torch.inf))
        return logits[rows, ids] - total[rows], rest.logsumexp(dim=-1) - total

    size = chunk or _chunk(split)
    at_ids, tails = [], []
    for start in range(0, len(states), size):
        stop = min(start + size, len(states))
        entries = slice(int(topk.offsets[start]), int(topk.offsets[stop]))
        rows = topk.positions[entries] - start
        logprobs, tail = _recomputed(head, states[start:stop], rows, topk.ids[entries])
        at_ids.append(logprobs)
        tails.append(tail)
    return torch.cat(at_ids), torch.cat(tails)


def _chunk(split: SplitModel) -> int:
    return max(_MIN_CHUNK, _CHUNK_LOGITS // split.output_width)


def _recomputed(function: Any, *arguments: Tensor) -> Any:
    """Call a function whose intermediate tensors are not kept for the backward pass but made again."""
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
