"""vLLM in this process: its scheduler and its kernels, on GPUs or on the CPU.

It runs in an environment of its own beside lopd (`pip install vllm`). vLLM gives the k likeliest ids of every prompt
token; see `flat` for what that leaves unknown. Log-probs of prompts are never taken from a prefix cache, and a token is
generated that nobody asked for: the longest rollout is one token shorter than the model's context. With a reference
policy two models are loaded, and what one of them has not listed is asked for by name; see `union`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lopd_store import models
from lopd_store.errors import DataError, InputError
from lopd_store.manifest import Scoring
from lopd_store.rollouts import Rollout
from lopd_store.teachers import RolloutScores
from lopd_store.teachers.flat import Ids, Listing, groups, listed, to_listing, to_scores
from lopd_store.teachers.union import WIDER, Choice, Union, questions
from lopd_store.topk import Floats

_GROUP_TOKENS = 1 << 16  # handed to vLLM at a time: it lists log-probs as Python numbers, about 100 bytes each
_MEMORY = 0.8  # of a GPU; log-probs of prompts take some that vLLM does not plan for
_SAME = 1.0  # nat on average: two passes over the same tokens are far below, other positions far above


class VllmTeacher:
    """A teacher run by vLLM's offline engine, and beside it the reference policy where one is named."""

    def __init__(
        self,
        model: str,
        *,
        vocab_size: int,
        dtype: str,
        batch_tokens: int,
        reference: str | None = None,
        tensor_parallel_size: int = 1,
        choice: Choice | None = None,
    ) -> None:
        names = [name for name in (model, reference) if name is not None]
        self._models = [
            _Model(
                name,
                vocab_size=vocab_size,
                dtype=dtype,
                batch_tokens=batch_tokens,
                tensor_parallel_size=tensor_parallel_size,
                of=len(names),
                caches=len(names) > 1,
            )
            for name in names
        ]
        self._choice = choice or Choice()
        self._vocab_size = vocab_size
        self.scoring = Scoring(engine="vllm", dtype=dtype)
        self.context_length: int | None = min(one.context_length for one in self._models)

    def score(self, rollouts: Sequence[Rollout], k: int) -> Iterator[tuple[int, RolloutScores]]:
        """See `Teacher.score`."""
        k = min(k, self._vocab_size)
        for rows in groups(rollouts, _GROUP_TOKENS):
            some = [rollouts[row] for row in rows]
            if len(self._models) == 1:
                yield from (
                    (row, to_scores(one, k)) for row, one in zip(rows, self._models[0].likeliest(some, k), strict=True)
                )
                continue
            listings = [list(one.likeliest(some, WIDER * k)) for one in self._models]
            unions = [Union(*pair, k=k, choice=self._choice) for pair in zip(*listings, strict=True)]
            answers = [
                one.look_up(some, listings[index], [union.asked[index] for union in unions])
                for index, one in enumerate(self._models)
            ]
            yield from ((row, union.scores(given)) for row, union, *given in zip(rows, unions, *answers, strict=True))


class _Model:
    """One of `of` models that vLLM runs in this process."""

    def __init__(
        self,
        model: str,
        *,
        vocab_size: int,
        dtype: str,
        batch_tokens: int,
        tensor_parallel_size: int,
        of: int,
        caches: bool,
    ) -> None:
        files = models.find(model)
        self._llm = load_llm(
            files,
            dtype=dtype,
            memory=_MEMORY / of,
            enable_prefix_caching=caches,
            max_num_batched_tokens=batch_tokens,
            tensor_parallel_size=tensor_parallel_size,
        )
        self._vocab_size = vocab_size
        self._output_width = int(models.load_config(files).get_text_config().vocab_size)
        self.context_length = int(self._llm.llm_engine.model_config.max_model_len) - 1

    def likeliest(self, rollouts: Sequence[Rollout], k: int) -> Iterator[Listing]:
        """The likeliest ids at every position of each rollout, k of them and a few more."""
        from vllm import SamplingParams

        columns = listed(k, vocab_size=self._vocab_size, output_width=self._output_width)
        sampling = SamplingParams(max_tokens=1, prompt_logprobs=columns, flat_logprobs=True, detokenize=False)
        prompts = [{"prompt_token_ids": rollout.token_ids.tolist()} for rollout in rollouts]
        for rollout, output in zip(rollouts, self._llm.generate(prompts, sampling, use_tqdm=False), strict=True):
            yield self._listing(rollout, output.prompt_logprobs, columns, k)

    def look_up(self, rollouts: Sequence[Rollout], listings: Sequence[Listing], asked: Sequence[Ids]) -> list[Floats]:
        """The log-probs of the ids asked for by position, of each rollout that is listed.

        Where vLLM scores given ids of a prompt (its second model runner, on CUDA) that is one more pass over the
        rollout. Elsewhere every position is one request for the token behind its prefix, which the cache holds.
        """
        if self._llm.llm_engine.vllm_config.use_v2_model_runner:
            return self._look_up_rollouts(rollouts, listings, asked)
        from vllm import SamplingParams

        answers = [np.zeros(len(pairs), np.float32) for pairs in asked]
        prompts, sampling, places = [], [], []
        for row, (rollout, pairs) in enumerate(zip(rollouts, asked, strict=True)):
            tokens = rollout.token_ids.tolist()
            for some, position, ids in questions(pairs):
                prompts.append({"prompt_token_ids": tokens[: len(rollout.prompt_ids) + position]})
                sampling.append(SamplingParams(max_tokens=1, logprob_token_ids=ids, detokenize=False))
                places.append((row, some, ids))
        outputs = self._llm.generate(prompts, sampling, use_tqdm=False) if prompts else []
        for (row, some, ids), output in zip(places, outputs, strict=True):
            (found,) = output.outputs[0].logprobs
            answers[row][some] = [found[id].logprob for id in ids]
        return answers

    def _look_up_rollouts(
        self, rollouts: Sequence[Rollout], listings: Sequence[Listing], asked: Sequence[Ids]
    ) -> list[Floats]:
        """The same by whole rollouts; the response, whose log-probs are known, shows the rows to be right."""
        from vllm import SamplingParams

        answers = [np.zeros(0, np.float32) for _ in asked]
        rows = [row for row, pairs in enumerate(asked) if len(pairs)]
        grids = [to_grid(listings[row].response_ids, asked[row]) for row in rows]
        starts = [len(rollouts[row].prompt_ids) - 1 for row in rows]  # the row that predicts the first response token
        outputs = self._llm.generate(
            [{"prompt_token_ids": rollouts[row].token_ids.tolist()} for row in rows],
            [
                SamplingParams(
                    max_tokens=1, detokenize=False, prompt_logprob_token_ids=grid, prompt_logprob_start=start
                )
                for (grid, _), start in zip(grids, starts, strict=True)
            ],
            use_tqdm=False,
        )
        for row, (grid, columns), output in zip(rows, grids, outputs, strict=True):
            found = np.asarray(output.prompt_token_id_logprobs, np.float32)
            differs = np.abs(found[:, 0] - listings[row].sampled_logprobs) if found.shape == grid.shape else np.inf
            if not np.mean(differs) <= _SAME:
                raise DataError(
                    "vLLM gave the log-probs of other tokens than it was asked for",
                    expected=f"{grid.shape[0]} rows, the response among them",
                    actual=f"{len(found)} rows, a difference of {np.mean(differs):.3g} nat",
                    hint="use `--engine transformers`",
                )
            answers[row] = found[asked[row][:, 0], columns]
        return answers

    def _listing(self, rollout: Rollout, flat: Any, columns: int, k: int) -> Listing:
        """A position has the token that is there in column 0 and the likeliest ids behind it."""
        first = len(flat.start_indices) - len(rollout.response_ids)
        start = flat.start_indices[first] if len(rollout.response_ids) else len(flat.logprobs)
        ids = np.array(flat.token_ids[start:], np.int64).reshape(-1, columns + 1)
        logprobs = np.array(flat.logprobs[start:], np.float32).reshape(-1, columns + 1)
        assert first == len(rollout.prompt_ids) and np.array_equal(ids[:, 0], rollout.response_ids)
        return to_listing(
            rollout,
            ids[:, 1:],
            logprobs[:, 1:],
            logprobs[:, 0],
            k=k,
            vocab_size=self._vocab_size,
            output_width=self._output_width,
        )


def to_grid(response_ids: Ids, asked: Ids) -> tuple[npt.NDArray[np.int32], Ids]:
    """For vLLM, the ids asked for at each position behind the token that is there, and in which column each stands.

    Rows are filled with -1; [positions, 1 + most], [asked].
    """
    columns = 1 + np.arange(len(asked)) - np.searchsorted(asked[:, 0], asked[:, 0])
    grid = np.full((len(response_ids), int(columns.max(initial=0)) + 1), -1, np.int32)
    grid[:, 0] = response_ids
    grid[asked[:, 0], columns] = asked[:, 1]
    return grid, columns


def load_llm(files: models.ModelFiles, *, dtype: str, memory: float = _MEMORY, **options: Any) -> Any:
    """vLLM's `LLM` with a model; `memory` is the share of a GPU that it may use."""
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
    return LLM(
        str(files.directory),
        dtype=dtype,
        seed=0,
        max_logprobs=-1,
        logprobs_mode="raw_logprobs",
        gpu_memory_utilization=memory,
        **options,
    )
