"""Sampling with vLLM in this process, many responses at a time.

The rules are those of the embedded engine: the same ids end a response, ids that the tokenizer does not know are never
drawn, and a response ends with the token that completes a stop string, as `StopStrings` finds it. Log-probs are vLLM's
raw ones, computed before temperature, top-p and bias.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lopd_store import models
from lopd_store.errors import InputError
from lopd_store.provenance import Sampling
from lopd_store.samplers import OnTokens, Response, StopStrings
from lopd_store.teachers.vllm import load_llm

_NEVER = -100.0  # the lowest bias that vLLM takes: a chance of e^-100
_LEAST_TEMPERATURE = 0.01  # vLLM raises what is lower to this, and would not do what the record says


class VllmSampler:
    """A policy run by vLLM's offline engine."""

    def __init__(
        self,
        files: models.ModelFiles,
        tokenizer: Any,
        sampling: Sampling,
        strings: StopStrings,
        *,
        vocab_size: int,
        dtype: str,
        tensor_parallel_size: int,
        longest: int,
    ) -> None:
        if sampling.temperature is not None and 0 < sampling.temperature < _LEAST_TEMPERATURE:
            raise InputError(
                "`temperature` is out of range for vLLM",
                expected=f"0, or {_LEAST_TEMPERATURE} and more",
                actual=sampling.temperature,
            )
        self._llm = load_llm(
            files,
            dtype=dtype,
            tensor_parallel_size=tensor_parallel_size,
            max_model_len=longest,
            skip_tokenizer_init=not strings,
        )
        output_width = int(models.load_config(files).get_text_config().vocab_size)
        self._seed, self._strings = sampling.seed, strings
        self._options = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_response_tokens,
            "stop_token_ids": list(models.stop_token_ids(models.load_generation_config(files), tokenizer)),
            "ignore_eos": True,  # those ids say all
            "stop": list(strings.strings),
            "skip_special_tokens": False,  # a stop string may be one
            "detokenize": bool(strings),
            "logprobs": 0,  # of the token that was drawn
            "flat_logprobs": True,
            "logit_bias": dict.fromkeys(range(vocab_size, output_width), _NEVER) or None,
        }

    def sample(self, prompts: list[npt.NDArray[np.uint32]], streams: range, on_tokens: OnTokens) -> list[Response]:
        """See `Sampler.sample`."""
        from vllm import SamplingParams

        sampling = [SamplingParams(seed=_seed(self._seed, stream), **self._options) for stream in streams]
        outputs = self._llm.generate(
            [{"prompt_token_ids": prompt.tolist()} for prompt in prompts], sampling, use_tqdm=False
        )
        responses = [self._response(output.outputs[0]) for output in outputs]
        on_tokens(sum(len(response.ids) for response in responses))
        return responses

    def _response(self, found: Any) -> Response:
        """A response as far as the token that completes a stop string, where there is one: vLLM may look later."""
        ids = list(found.token_ids)
        assert len(found.logprobs.logprobs) == len(ids)
        end = next((end for end in range(1, len(ids) + 1) if self._strings and self._strings.end(ids[:end])), None)
        return Response(
            ids=np.array(ids[:end], np.uint32),
            logprobs=np.minimum(np.array(found.logprobs.logprobs[:end], np.float32), 0),
            finish_reason="length" if end is None and found.finish_reason == "length" else "stop",
        )


def _seed(seed: int | None, stream: int) -> int:
    """A seed of its own for every response."""
    assert seed is not None  # who samples knows
    return int(np.random.SeedSequence([seed, stream]).generate_state(1, np.uint64)[0] >> np.uint64(1))
