"""Samplers: anything that draws responses from a policy, one file per engine behind one protocol; `load` picks by name.

    transformers    in this process, batch by batch, any model that transformers loads
    vllm            in this process, by vLLM's kernels and scheduler

Every response has a random stream of its own, made from the seed and its row. The engines draw by other random numbers:
one seed gives other responses in each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lopd_store.errors import InputError
from lopd_store.models import ModelFiles
from lopd_store.provenance import Sampling

BATCH_SIZES = {"transformers": 16, "vllm": 1024}  # responses at a time, by engine
OnTokens = Callable[[int], None]  # response tokens of a batch so far


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
        self._tokenizer, self.strings = tokenizer, tuple(strings)
        # A token has a byte at least, and the first one looked at may be the rest of a character.
        self._tokens = max((len(string.encode()) for string in strings), default=0) + 4

    def __bool__(self) -> bool:
        return bool(self.strings)

    def end(self, ids: list[int]) -> bool:
        """Whether one of them stands in what the last of these tokens say."""
        text = self._tokenizer.decode(ids[-self._tokens :], skip_special_tokens=False)
        return any(string in text for string in self.strings)


class Sampler(Protocol):
    """A policy loaded into an engine."""

    def sample(self, prompts: list[npt.NDArray[np.uint32]], streams: range, on_tokens: OnTokens) -> list[Response]:
        """One response per prompt; `streams` number their random streams.

        Log-probs are natural logs at temperature 1 over the full vocabulary, whatever was sampled with. Only ids below
        the tokenizer's `vocab_size` are drawn.
        """


def require_engine(engine: str, tensor_parallel_size: int) -> None:
    """Raise InputError where no engine of this name samples, or none over so many GPUs."""
    if engine not in BATCH_SIZES:
        raise InputError(f"the engine `{engine}` does not sample", expected=", ".join(BATCH_SIZES))
    if tensor_parallel_size < 1:
        raise InputError("`tensor_parallel_size` is out of range", expected="1 or more", actual=tensor_parallel_size)
    if tensor_parallel_size > 1 and engine != "vllm":
        raise InputError(
            f"the engine `{engine}` does not split a policy that samples",
            hint="use `--engine vllm`, or `--device auto`",
        )


def load(
    engine: str,
    files: ModelFiles,
    tokenizer: Any,
    sampling: Sampling,
    *,
    vocab_size: int,
    dtype: str,
    device: str,
    tensor_parallel_size: int,
    longest: int,
) -> Sampler:
    """Load a policy into an engine; `longest` is the most tokens of a prompt with its response."""
    strings = StopStrings(tokenizer, sampling.stop or ())
    if engine == "vllm":
        from lopd_store.samplers.vllm import VllmSampler

        return VllmSampler(
            files,
            tokenizer,
            sampling,
            strings,
            vocab_size=vocab_size,
            dtype=dtype,
            tensor_parallel_size=tensor_parallel_size,
            longest=longest,
        )
    from lopd_store.samplers.transformers import load_sampler

    return load_sampler(files, tokenizer, sampling, strings, vocab_size=vocab_size, dtype=dtype, device=device)
