"""Teacher engines: anything that gives the distributions of a model over given token ids.

One file per engine behind one protocol; `load` picks by name:

    transformers    in this process: every quantity from the full distribution; or split over several, `tensor_parallel`
    vllm            in this process, by vLLM's kernels and scheduler
    http            a running vLLM server
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lopd_store.errors import InputError
from lopd_store.manifest import Scoring
from lopd_store.rollouts import Rollout
from lopd_store.topk import Candidates

ENGINES = ("transformers", "vllm", "http")


@dataclass(frozen=True, kw_only=True)
class RolloutScores:
    """The teacher on one rollout: row j speaks of response token j given everything before it."""

    sampled_logprobs: npt.NDArray[np.float32]  # [positions]
    candidates: Candidates  # k columns; with a reference policy the k of each
    entropies: npt.NDArray[np.float32] | None  # [positions], in nats, of the full distribution, where it is known
    reference_sampled_logprobs: npt.NDArray[np.float32] | None = None  # [positions], where there is a reference policy
    padding: npt.NDArray[np.float32] | None = None  # [positions], mass on ids beyond `vocab_size`, where it is known


class Teacher(Protocol):
    """An engine with a model loaded."""

    scoring: Scoring
    context_length: int | None

    def score(self, rollouts: Sequence[Rollout], k: int) -> Iterator[tuple[int, RolloutScores]]:
        """Scores of every rollout with its index, in any order, each once.

        Log-probs are natural logs at temperature 1 over the full vocabulary, in float32; the k ids are the most
        likely ones below the tokenizer's `vocab_size`, and of equally likely ones those with the lowest ids.
        """


def require_engine(
    engine: str,
    *,
    reference: str | None,
    server: str | None,
    reference_server: str | None = None,
    tensor_parallel_size: int = 1,
) -> None:
    """Raise InputError where there is no such engine, or it cannot do what is asked of it."""
    if engine not in ENGINES:
        raise InputError(f"there is no engine `{engine}`", expected=", ".join(ENGINES))
    if engine == "http" and server is None:
        raise InputError("the http engine needs a server", hint="name it: `--server http://localhost:8000`")
    if engine != "http" and (server or reference_server):
        raise InputError(f"the {engine} engine has no server", hint="add `--engine http`")
    if engine == "http" and tensor_parallel_size > 1:
        raise InputError(
            "the http engine does not split a teacher", hint="the server does: `vllm serve --tensor-parallel-size N`"
        )
    if (reference is None) != (reference_server is None) and engine == "http":
        raise InputError(
            "the http engine needs a reference policy and its server, or neither",
            hint="a vLLM server runs one model: `--reference MODEL --reference-server http://localhost:8001`",
        )


def load(
    engine: str,
    model: str,
    *,
    vocab_size: int,
    dtype: str,
    device: str,
    batch_tokens: int,
    reference: str | None = None,
    server: str | None = None,
    reference_server: str | None = None,
    tensor_parallel_size: int = 1,
    k_min: int = 1,
    coverage: float = 1.0,
) -> Teacher:
    """Load a teacher into an engine, and beside it the reference policy where one is named.

    Of what both models find likely, engines that can only ask for it id by id give no more than `k_min` and `coverage`
    will keep.
    """
    require_engine(
        engine,
        reference=reference,
        server=server,
        reference_server=reference_server,
        tensor_parallel_size=tensor_parallel_size,
    )
    if engine != "transformers":
        from lopd_store.teachers.union import Choice

        choice = Choice(k_min=k_min, coverage=coverage)
    if engine == "vllm":
        from lopd_store.teachers.vllm import VllmTeacher

        return VllmTeacher(
            model,
            vocab_size=vocab_size,
            dtype=dtype,
            batch_tokens=batch_tokens,
            reference=reference,
            tensor_parallel_size=tensor_parallel_size,
            choice=choice,
        )
    if engine == "http":
        from lopd_store.teachers.http import HttpTeacher

        assert server is not None
        return HttpTeacher(
            model,
            server,
            vocab_size=vocab_size,
            dtype=dtype,
            reference=reference,
            reference_server=reference_server,
            choice=choice,
        )
    if tensor_parallel_size > 1:
        from lopd_store.teachers.tensor_parallel import TensorParallelTeacher

        return TensorParallelTeacher(
            model,
            size=tensor_parallel_size,
            vocab_size=vocab_size,
            dtype=dtype,
            device=device,
            batch_tokens=batch_tokens,
            reference=reference,
        )
    from lopd_store.teachers.transformers import TransformersTeacher

    return TransformersTeacher(
        model, vocab_size=vocab_size, dtype=dtype, device=device, batch_tokens=batch_tokens, reference=reference
    )
