"""The student: a causal language model that is read without ever holding [positions, vocabulary] logits.

    student = load("sft/", config)
    sums = student.sums(student.states(batch), batch, lambda predicted, piece: {"loss": -predicted.sampled.sum()})
    sums["loss"].backward()

The body runs once over a batch; the head runs over chunks of positions, see `head`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lopd_store import models
from lopd_store.errors import InputError
from lopd_store.models import SplitModel
from lopd_train.batches import Batch
from lopd_train.config import TrainConfig
from lopd_train.head import MIN_CHUNK, Measure, Sums, chunked_sums

_CHUNK_LOGITS = 1 << 24  # alive at once, a few times over: 64 MiB each in float32


@dataclass(frozen=True, kw_only=True)
class Student:
    """A model in training, its tokenizer, and its two halves; weights are float32, whatever the arithmetic is."""

    model: Any
    tokenizer: Any
    split: SplitModel
    device: str
    dtype: torch.dtype  # of the arithmetic

    def states(self, batch: Batch) -> Tensor:
        """The hidden state that predicts each target; [positions, width].

        Padding is on the right, where a causal model does not look, so no attention mask is needed.
        """
        with self._autocast():
            output = self.split.body(input_ids=batch.input_ids, use_cache=False)
        states: Tensor = output.last_hidden_state.flatten(0, 1)[batch.sources]
        return states

    def sums(self, states: Tensor, batch: Batch, measure: Measure) -> Sums:
        """The sums of a measure over all positions of a batch; `loss` is differentiable, once."""
        weights = tuple(self.model.get_output_embeddings().parameters())
        chunk = max(MIN_CHUNK, _CHUNK_LOGITS // self.split.output_width)
        with self._autocast():
            return chunked_sums(self.split.logits, states, batch, measure, weights=weights, chunk=chunk)

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
