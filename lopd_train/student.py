"""The student: a causal language model that is read without ever holding [positions, vocabulary] logits.

    student = load("sft/", config)
    sums = student.sums(student.states(batch), batch, lambda predicted, piece: {"loss": -predicted.sampled.sum()})
    sums["loss"].backward()

The body runs once over a batch; the head runs over chunks of positions, see `head`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lopd_store import models
from lopd_store.identity import ModelIdentity
from lopd_store.models import SplitModel
from lopd_train import lora, packing
from lopd_train.batches import Batch
from lopd_train.config import TrainConfig
from lopd_train.data import Limits
from lopd_train.head import MIN_CHUNK, Measure, Sums, chunked_sums
from lopd_train.world import ALONE, World, blocks, own_device, shard

_CHUNK_LOGITS = 1 << 24  # alive at once, a few times over: 64 MiB each in float32


@dataclass(frozen=True, kw_only=True)
class Student:
    """A model in training, its tokenizer, and its two halves; weights are float32, whatever the arithmetic is."""

    model: Any
    tokenizer: Any
    split: SplitModel
    config: TrainConfig
    device: str
    world: World
    gathered: Callable[..., Any]  # calls a function of this student while its weights are whole, see `world.shard`

    def states(self, batch: Batch) -> Tensor:
        """The hidden state that predicts each target; [positions, width]."""
        with self._autocast(cache_enabled=False):  # each weight is read once: a copy of all of them would serve nobody
            states: Tensor = self.split.body(**packing.inputs(batch.input_ids, batch.borders)).last_hidden_state
        return states[0, batch.sources]

    def sums(self, states: Tensor, batch: Batch, measure: Measure) -> Sums:
        """The sums of a measure over all positions of a batch; `loss` is differentiable, once."""
        weights = tuple(self.model.get_output_embeddings().parameters())
        chunk = max(MIN_CHUNK, _CHUNK_LOGITS // self.split.output_width)
        with self._autocast():
            return chunked_sums(self.split.logits, states, batch, measure, weights=weights, chunk=chunk)

    def _autocast(self, *, cache_enabled: bool = True) -> torch.autocast:
        dtype, kind = getattr(torch, self.config.dtype), torch.device(self.device).type
        return torch.autocast(kind, dtype, enabled=dtype != torch.float32, cache_enabled=cache_enabled)


def load(model: str | Path, config: TrainConfig, world: World = ALONE) -> Student:
    """Load a student with float32 weights, or frozen ones with adapters; sharded where there are several processes."""
    files, device = models.find(model), models.pick_device(config.device and own_device(config.device))
    # Beside adapters, which are float32, the weights only stand there; but the same FSDP unit wants a single dtype.
    kept = config.dtype if config.lora_rank and world.size == 1 else "float32"
    loaded = models.load_model(files, dtype=kept, device=device if world.size == 1 else "cpu")
    if files.gguf_file is not None:
        loaded = models.copy_without_quantization(loaded)
    split = models.split(loaded)
    packing.prepare(loaded)
    if config.lora_rank:
        lora.add(loaded, config)
    if config.gradient_checkpointing:
        loaded.activation_checkpointing_enable()
    if config.compile:
        for block in blocks(loaded):
            # What is recomputed is not traced through, so there its parts are compiled.
            for module in block.children() if config.gradient_checkpointing else [block]:
                module.compile()
    return Student(
        model=loaded,
        tokenizer=models.load_tokenizer(files),
        split=split,
        config=config,
        device=device,
        world=world,
        gathered=shard(loaded, world, getattr(torch, config.dtype), device),
    )


def limits(model: str | Path, base: ModelIdentity) -> Limits:
    """What a model of this identity can read."""
    config = models.load_config(models.find(model))
    return Limits(vocab_size=min(base.vocab_size, base.output_width), context_length=models.context_length(config))
