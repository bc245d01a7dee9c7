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

from lopd_store import models
from lopd_store.digest import digest_file
from lopd_store.errors import DataError, InputError
from lopd_store.identity import identify
from lopd_store.journal import Journal
from lopd_store.prompts import Prompt, read_prompts
from lopd_store.provenance import (
    MAX_STOP_LENGTH,
    MAX_STOPS,
    RolloutsRecord,
    Sampling,
    read_checkpoint_record,
    require_sampling_ranges,
)
from lopd_store.rollouts import write_rollouts
from lopd_store.samplers import BATCH_SIZES, Response, load, require_engine


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
    engine: str = "transformers",
    batch_size: int | None = None,
    limit: int | None = None,
    dtype: str = "float32",
    device: str | None = None,
    tensor_parallel_size: int = 1,
    on_progress: Callable[[int, int, int], None] | None = None,
) -> Generated:
    """Sample responses to every prompt and write them with their provenance.

    A response that contains one of the strings of `stop` ends with the token that completes it. `batch_size` is the
    number of responses sampled at a time, None for what suits the engine; a run that was killed loses one batch.
    `tensor_parallel_size` is the number of GPUs over which the engine `vllm` splits the model.
    `on_progress` hears (responses finished, all responses, response tokens so far).
    """
    output, prompts = Path(output), Path(prompts)
    require_engine(engine, tensor_parallel_size)
    batch_size = BATCH_SIZES[engine] if batch_size is None else batch_size
    for name, number in (("batch_size", batch_size), ("limit", limit)):
        if number is not None and number < 1:
            raise InputError(f"`{name}` is out of range", expected="1 or more", actual=number)
    sampling = _sampling(temperature, top_p, max_response_tokens, samples_per_prompt, seed, stop)
    if output.exists():
        raise InputError(f"`{output}` exists", hint="choose another `--output`, or move it away")
    if output.suffix != ".parquet":
        raise InputError(f"`{output}` is not a name for rollouts", expected="a name that ends in .parquet")
    device = models.pick_device(device)
    files = models.find(model)
    tokenizer = models.load_tokenizer(files)
    rows = read_prompts(prompts, tokenizer, limit=limit)
    _check_lengths(rows, models.context_length(models.load_config(files)), max_response_tokens, prompts)
    policy = identify(model)
    record = RolloutsRecord(
        status="recorded",
        policy=policy,
        policy_checkpoint=read_checkpoint_record(files.adapter or files.directory),
        prompts=digest_file(prompts).sha256,
        sampling=sampling,
    )
    sampler = load(
        engine,
        files,
        tokenizer,
        sampling,
        vocab_size=policy.vocab_size,
        dtype=dtype,
        device=device,
        tensor_parallel_size=tensor_parallel_size,
        longest=max(len(row.ids) for row in rows) + max_response_tokens,
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
        "engine": engine,
        "batch_size": batch_size,
        "dtype": dtype,
        "device": device,
        "tensor_parallel_size": tensor_parallel_size,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    with Journal(output.with_name(f"{output.name}.generating"), settings) as journal:
        if output.exists():  # since the model was loaded: another run has just written it
            journal.remove()
            raise InputError(f"`{output}` exists", hint="choose another `--output`, or move it away")
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


def _sampling(
    temperature: float, top_p: float, max_response_tokens: int, samples: int, seed: int, stop: Sequence[str]
) -> Sampling:
    require_sampling_ranges(temperature, top_p)
    for name, value, fits, expected in (
        ("max_response_tokens", max_response_tokens, 1 <= max_response_tokens <= 1 << 20, f"1 to {1 << 20}"),
        ("samples_per_prompt", samples, 1 <= samples <= 1 << 16, f"1 to {1 << 16}"),
        ("seed", seed, 0 <= seed < 1 << 63, "0 to 2^63 - 1"),
    ):
        if not fits:
            raise InputError(f"`{name}` is out of range", expected=expected, actual=value)
    if len(stop) > MAX_STOPS or not all(1 <= len(text) <= MAX_STOP_LENGTH for text in stop):
        expected = f"at most {MAX_STOPS} texts of 1 to {MAX_STOP_LENGTH} characters"
        raise InputError("`stop` is out of range", expected=expected, actual=repr(list(stop))[:100])
    return Sampling(
        temperature=float(temperature),
        top_p=float(top_p),
        max_response_tokens=max_response_tokens,
        samples_per_prompt=samples,
        seed=seed,
        stop=tuple(stop),
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
