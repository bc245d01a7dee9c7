"""Sampling responses: SFT data when the model is the teacher, rollouts when it is the reference policy.

    generate(model="sft", prompts="prompts.jsonl", output="rollouts.parquet")

The ids are kept as they were sampled, the stop token among them, with the log-prob of each at temperature 1. A
response also ends with the token that completes a stop string; nothing of it is cut. Every response has a random stream
of its own, made from the seed and its row, so batches can be of any size.

What is finished is kept in `rollouts.parquet.generating` until all is, and a run that was killed goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lopd_store import models
from lopd_store.digest import digest_file
from lopd_store.errors import DataError, InputError
from lopd_store.identity import identify
from lopd_store.journal import Journal
from lopd_store.prompts import Prompt, read_prompts
from lopd_store.provenance import RolloutsRecord, Sampling, read_checkpoint_record
from lopd_store.rollouts import write_rollouts


@dataclass(frozen=True, kw_only=True)
class Generated:
    """What a run of `generate` wrote."""

    output: Path
    rollouts: int
    tokens: int  # response tokens
    stopped: int  # responses that ended with a stop token


def generate(
    *,
    model: str | Path,
    prompts: str | Path,
    output: str | Path,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_response_tokens: int = 512,
    samples_per_prompt: int = 1,
    seed: int = 0,
    stop: Sequence[str] = (),
    batch_size: int = 16,
    limit: int | None = None,
    dtype: str = "float32",
    device: str | None = None,
    on_progress: Callable[[int, int, int], None] | None = None,
) -> Generated:
    """Sample responses to every prompt and write them with their provenance.

    A response that contains one of the strings of `stop` ends with the token that completes it.
    `on_progress` hears (responses finished, all responses, response tokens so far).
    """
    output, prompts = Path(output), Path(prompts)
    for name, number in (("batch_size", batch_size), ("limit", limit)):
        if number is not None and number < 1:
            raise InputError(f"`{name}` is out of range", expected="1 or more", actual=number)
    if "" in stop:
        raise InputError("a stop string is empty")
    sampling = _sampling(temperature, top_p, max_response_tokens, samples_per_prompt, seed)
    if output.exists():
        raise InputError(f"`{output}` exists", hint="choose another `--output`, or move it away")
    if output.suffix != ".parquet":
        raise InputError(f"`{output}` is not a name for rollouts", expected="a name that ends in .parquet")
    device = models.pick_device(device)
    files = models.find(model)
    tokenizer = models.load_tokenizer(files)
    rows = read_prompts(prompts, tokenizer, limit=limit)
    loaded = models.load_model(files, dtype=dtype, device=device)
    _check_lengths(rows, models.context_length(loaded.config), max_response_tokens, prompts)
    policy = identify(model)
    record = RolloutsRecord(
        status="recorded",
        policy=policy,
        policy_checkpoint=read_checkpoint_record(files.adapter or files.directory),
        prompts=digest_file(prompts).sha256,
        sampling=sampling,
    )
    sampler = Sampler(
        loaded, sampling, models.stop_token_ids(loaded, tokenizer), policy.vocab_size, StopStrings(tokenizer, stop)
    )
    total = len(rows) * samples_per_prompt
    finished = tokens = stopped = 0

    def on_tokens(count: int) -> None:
        if on_progress is not None:
            on_progress(finished, total, tokens + count)

    def count(responses: Iterable[Response]) -> None:
        nonlocal finished, tokens, stopped
        for response in responses:
            finished += 1
            tokens += len(response.ids)
            stopped += response.finish_reason == "stop"
        on_tokens(0)

    settings = {
        "record": record.to_json(),
        "rows": total,
        "stop": list(stop),
        "batch_size": batch_size,
        "dtype": dtype,
        "device": device,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    with Journal(output.with_name(f"{output.name}.generating"), settings) as journal:
        # Whole batches only: the last bits of a log-prob depend on who else is in the batch.
        journal.keep(len(journal) if len(journal) == total else len(journal) // batch_size * batch_size)
        count(map(Response.from_json, journal.rows()))
        for start in range(finished, total, batch_size):
            batch = range(start, min(start + batch_size, total))
            prompt_ids = [rows[index // samples_per_prompt].ids for index in batch]
            sampled = sampler.sample(prompt_ids, batch, on_tokens)
            journal.append([response.to_json() for response in sampled])
            count(sampled)
        responses = map(Response.from_json, journal.rows())
        chosen = (rows[index // samples_per_prompt] for index in range(total))
        write_rollouts(output, map(partial(_row, tokenizer), chosen, responses), record)
        journal.remove()
    return Generated(output=output, rollouts=finished, tokens=tokens, stopped=stopped)


@dataclass(frozen=True, kw_only=True)
class Response:
    """One sampled response; where the reason is `stop` the last id is the stop token, or completes a stop string."""

    ids: npt.NDArray[np.uint32]
    logprobs: npt.NDArray[np.float32]
    finish_reason: str

    def to_json(self) -> dict[str, Any]:
        """A JSON object; its numbers read back bit by bit."""
        return {"ids": self.ids.tolist(), "logprobs": self.logprobs.tolist(), "finish_reason": self.finish_reason}

    @classmethod
    def from_json(cls, value: Any) -> Response:
        """Read what `to_json` gave."""
        return cls(
            ids=np.array(value["ids"], np.uint32),
            logprobs=np.array(value["logprobs"], np.float32),
            finish_reason=value["finish_reason"],
        )


class StopStrings:
    """Looks for strings at the end of responses that grow by a token at a time."""

    def __init__(self, tokenizer: Any, strings: Sequence[str]) -> None:
        self._tokenizer, self._strings = tokenizer, strings
        # A token has a byte at least, and the first one looked at may be the rest of a character.
        self._tokens = max((len(string.encode()) for string in strings), default=0) + 4

    def __bool__(self) -> bool:
        return bool(self._strings)

    def end(self, ids: list[int]) -> bool:
        """Whether one of them stands in what the last of these tokens say."""
        text = self._tokenizer.decode(ids[-self._tokens :], skip_special_tokens=False)
        return any(string in text for string in self._strings)


class Sampler:
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
    def sample(
        self, prompts: list[npt.NDArray[np.uint32]], streams: range, on_tokens: Callable[[int], None]
    ) -> list[Response]:
        """One response per prompt; `streams` number their random streams."""
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


def _row(tokenizer: Any, prompt: Prompt, response: Response) -> dict[str, Any]:
    return {
        "prompt": prompt.text,
        "response": tokenizer.decode(response.ids, skip_special_tokens=False),
        "prompt_ids": prompt.ids,
        "response_ids": response.ids,
        "loss_mask": np.ones(len(response.ids), np.bool_),
        "logprobs": response.logprobs,
        "finish_reason": response.finish_reason,
    }


def _sampling(temperature: float, top_p: float, max_response_tokens: int, samples: int, seed: int) -> Sampling:
    for name, value, fits in (
        ("temperature", temperature, 0 <= temperature <= 100),
        ("top_p", top_p, 0 < top_p <= 1),
        ("max_response_tokens", max_response_tokens, 1 <= max_response_tokens <= 1 << 20),
        ("samples_per_prompt", samples, 1 <= samples <= 1 << 16),
        ("seed", seed, 0 <= seed < 1 << 63),
    ):
        if not fits:
            raise InputError(f"`{name}` is out of range", actual=value)
    return Sampling(
        temperature=float(temperature),
        top_p=float(top_p),
        max_response_tokens=max_response_tokens,
        samples_per_prompt=samples,
        seed=seed,
    )


def _check_lengths(rows: list[Prompt], context: int | None, max_response_tokens: int, path: Path) -> None:
    if context is None:
        return
    for number, prompt in enumerate(rows):
        if len(prompt.ids) + max_response_tokens > context:
            raise DataError(
                f"`{path}`, row {number}: prompt and response do not fit the model's context",
                expected=f"at most {context} tokens",
                actual=f"{len(prompt.ids)} prompt tokens + up to {max_response_tokens} response tokens",
                hint="a prompt is never cut; leave it out, or lower `--max-response-tokens`",
            )
