"""vLLM in this process: its scheduler, its kernels, and several GPUs where it uses them.

It runs in an environment of its own beside lopd (`pip install vllm`). vLLM gives the k likeliest ids of every prompt
token; see `flat` for what that leaves unknown. Prefix caching is off, because cached tokens have no log-probs, and one
token is generated that nobody asked for: the longest rollout is one token shorter than the model's context.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lopd_store import models
from lopd_store.errors import InputError
from lopd_store.manifest import Scoring
from lopd_store.rollouts import Rollout
from lopd_store.teachers import RolloutScores
from lopd_store.teachers.flat import groups, listed, to_scores

_GROUP_TOKENS = 1 << 16  # handed to vLLM at a time: it lists log-probs as Python numbers, about 100 bytes each
_MEMORY = 0.8  # of a GPU; log-probs of prompts take some that vLLM does not plan for


class VllmTeacher:
    """A teacher run by vLLM's offline engine."""

    def __init__(self, model: str, *, vocab_size: int, dtype: str, batch_tokens: int) -> None:
        files = models.find(model)
        if files.gguf_file is not None or files.adapter is not None:
            raise InputError(
                f"the vllm engine does not load `{files.name}`",
                expected="a directory of safetensors or a Hub id of one",
                actual="a GGUF file" if files.gguf_file else "a PEFT adapter",
                hint="use `--engine transformers`",
            )
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process; it also makes vLLM repeatable
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        try:
            from vllm import LLM
        except ImportError as error:
            raise InputError("vLLM is not installed here", hint="pip install vllm") from error
        config = models.load_config(files)
        self._llm: Any = LLM(
            str(files.directory),
            dtype=dtype,
            seed=0,
            skip_tokenizer_init=True,
            enforce_eager=True,
            enable_prefix_caching=False,
            max_logprobs=-1,
            logprobs_mode="raw_logprobs",
            max_num_batched_tokens=batch_tokens,
            gpu_memory_utilization=_MEMORY,
        )
        self._vocab_size, self._output_width = vocab_size, int(config.get_text_config().vocab_size)
        self.scoring = Scoring(engine="vllm", dtype=dtype)
        self.context_length: int | None = int(self._llm.llm_engine.model_config.max_model_len) - 1

    def score(self, rollouts: Sequence[Rollout], k: int) -> Iterator[tuple[int, RolloutScores]]:
        """See `Teacher.score`."""
        from vllm import SamplingParams

        columns = listed(k, vocab_size=self._vocab_size, output_width=self._output_width)
        sampling = SamplingParams(max_tokens=1, prompt_logprobs=columns, flat_logprobs=True, detokenize=False)
        for rows in groups(rollouts, _GROUP_TOKENS):
            prompts = [{"prompt_token_ids": rollouts[row].token_ids.tolist()} for row in rows]
            outputs = self._llm.generate(prompts, sampling, use_tqdm=False)
            for row, output in zip(rows, outputs, strict=True):
                yield row, self._scores(rollouts[row], output.prompt_logprobs, columns, k)

    def _scores(self, rollout: Rollout, flat: Any, columns: int, k: int) -> RolloutScores:
        """A position has the token that is there in column 0 and the likeliest ids behind it."""
        first = len(flat.start_indices) - len(rollout.response_ids)
        start = flat.start_indices[first] if len(rollout.response_ids) else len(flat.logprobs)
        ids = np.array(flat.token_ids[start:], np.int64).reshape(-1, columns + 1)
        logprobs = np.array(flat.logprobs[start:], np.float32).reshape(-1, columns + 1)
        assert first == len(rollout.prompt_ids) and np.array_equal(ids[:, 0], rollout.response_ids)
        return to_scores(
            rollout,
            ids[:, 1:],
            logprobs[:, 1:],
            logprobs[:, 0],
            k=k,
            vocab_size=self._vocab_size,
            output_width=self._output_width,
        )
