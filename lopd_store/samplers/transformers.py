"""Sampling with a transformers model in this process: prompts padded on the left, a key-value cache, our own draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lopd_store import models
from lopd_store.provenance import Sampling
from lopd_store.samplers import OnTokens, Response, StopStrings


def load_sampler(
    files: models.ModelFiles,
    tokenizer: Any,
    sampling: Sampling,
    strings: StopStrings,
    *,
    vocab_size: int,
    dtype: str,
    device: str,
) -> TransformersSampler:
    """Load a policy to sample from."""
    models.keep_freed_memory(device)
    model = models.load_model(files, dtype=dtype, device=device)
    stop_ids = models.stop_token_ids(model.generation_config, tokenizer)
    return TransformersSampler(model, sampling, stop_ids, vocab_size, strings)


class TransformersSampler:
    """Samples batches from one model with a key-value cache, prompts padded on the left.

    Only ids below `vocab_size` are drawn: what a padded head says of the others is noise that no tokenizer can read.
    """

    def __init__(
        self,
        model: Any,
        sampling: Sampling,
        stop_ids: tuple[int, ...],
        vocab_size: int,
        strings: StopStrings | None = None,
    ) -> None:
        self._model = model
        assert sampling.temperature is not None and sampling.top_p is not None  # who samples knows how
        assert sampling.max_response_tokens is not None and sampling.seed is not None
        self._temperature, self._top_p = sampling.temperature, sampling.top_p
        self._limit, self._seed = sampling.max_response_tokens, sampling.seed
        self._vocab_size = vocab_size
        self._strings = strings
        self._device = model.device
        self._stop = torch.tensor(stop_ids, dtype=torch.long, device=self._device)

    @torch.inference_mode()
    def sample(self, prompts: list[npt.NDArray[np.uint32]], streams: range, on_tokens: OnTokens) -> list[Response]:
        """See `Sampler.sample`."""
        limit, count = self._limit, len(prompts)
        uniforms = torch.from_numpy(
            np.stack([np.random.default_rng([self._seed, stream]).random(limit) for stream in streams])
        )
        width = max(len(prompt) for prompt in prompts)
        ids = torch.zeros(count, width, dtype=torch.long)
        mask = torch.zeros(count, width + limit, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
            mask[row, width - len(prompt) :] = 1
        ids, mask, uniforms = ids.to(self._device), mask.to(self._device), uniforms.to(self._device)
        positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
        sampled = torch.zeros(count, limit, dtype=torch.long, device=self._device)
        logprobs = torch.zeros(count, limit, device=self._device)
        lengths = torch.full((count,), limit, device=self._device)
        running = torch.ones(count, dtype=torch.bool, device=self._device)
        cache, step_ids, start = None, ids, 0
        for step in range(limit):
            stop = width + step
            output = self._model(
                input_ids=step_ids,
                attention_mask=mask[:, :stop],
                position_ids=positions[:, start:stop],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache, start = output.past_key_values, stop
            raw = torch.log_softmax(output.logits[:, -1].float(), dim=-1)
            known = raw[:, : self._vocab_size]
            chosen = draw(known, uniforms[:, step], self._temperature, self._top_p)
            sampled[:, step] = chosen
            logprobs[:, step] = raw.gather(1, chosen[:, None])[:, 0]
            ended = running & (torch.isin(chosen, self._stop) | self._at_string(sampled[:, : step + 1]))
            lengths[ended] = step + 1
            running &= ~ended
            on_tokens(int(torch.where(running, step + 1, lengths).sum()))
            if not bool(running.any()):
                break
            step_ids = chosen[:, None]
        return [
            Response(
                ids=sampled[row, :length].cpu().numpy().astype(np.uint32),
                logprobs=logprobs[row, :length].cpu().numpy(),
                finish_reason="length" if bool(running[row]) else "stop",
            )
            for row, length in enumerate(lengths.tolist())
        ]

    def _at_string(self, sampled: torch.Tensor) -> torch.Tensor:
        """Which of the responses so far end with a stop string."""
        ended = [self._strings.end(ids) for ids in sampled.tolist()] if self._strings else [False] * len(sampled)
        return torch.tensor(ended, device=self._device)


def draw(
    logprobs: torch.Tensor,  # [rows, vocabulary], raw
    uniforms: torch.Tensor,  # [rows], float64 in [0, 1)
    temperature: float,
    top_p: float,
) -> torch.Tensor:
    """One id per row by inverse distribution function; temperature 0 takes the most likely id."""
    if temperature == 0:
        return logprobs.argmax(dim=-1)
    mass = torch.softmax(logprobs / temperature, dim=-1)
    if top_p < 1:
        ordered, order = mass.sort(dim=-1, descending=True, stable=True)
        outside = ordered.cumsum(dim=-1) - ordered >= top_p
        mass = mass.scatter(1, order, ordered.masked_fill(outside, 0))
    cumulative = mass.cumsum(dim=-1, dtype=torch.float64)
    targets = uniforms[:, None] * cumulative[:, -1:]
    # The first id whose cumulative mass exceeds the target has mass itself, so nothing outside top_p is drawn.
    return torch.searchsorted(cumulative, targets, right=True)[:, 0].clamp(max=logprobs.shape[1] - 1)
