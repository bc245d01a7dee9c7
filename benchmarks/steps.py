"""Training steps as users run them: ours, and a bare loop around the same model; each for a process of its own."""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from distributions import MODEL, packaged, say, write_prompts

import lopd_store
import lopd_train
from lopd_store import gate, models
from lopd_store.rollouts import RolloutsFile
from lopd_train import Progress, TrainConfig
from lopd_train.config import Loss


@dataclass(frozen=True, kw_only=True)
class Materials:
    """A student, rollouts of its own, and the artifact of a teacher, which is the same model: only cost is measured."""

    student: Path
    rollouts: Path
    artifact: Path
    config: TrainConfig


@dataclass(frozen=True, kw_only=True)
class Steps:
    """What some steps took; the first is not counted."""

    seconds: float  # median of a step
    positions: int  # that count in the loss
    outside: float  # share of the time between the first step and the last that passed outside of steps
    loss: float = math.nan  # of the first step


def make_materials(directory: Path, config: TrainConfig, *, tiny: bool) -> Materials:
    """Everything a run needs, kept in a directory."""
    student, rollouts, artifact = directory / "student", directory / "rollouts.parquet", directory / "artifact"
    if not student.is_dir():
        files = models.find(packaged(*MODEL))
        loaded = models.copy_without_quantization(models.load_model(files))
        with models.without_bars():
            (shrunk(loaded.config) if tiny else loaded).save_pretrained(student)
        models.load_tokenizer(files).save_pretrained(student)
    if not rollouts.is_file():
        say("sampling rollouts")
        ask = [{"prompt": f"Write a Python function that adds {number} to its argument."} for number in range(8)]
        prompts = write_prompts(directory / "prompts.jsonl", ask[: config.batch_rollouts])
        tokens = 16 if tiny else 128
        lopd_store.generate(model=student, prompts=prompts, output=rollouts, max_response_tokens=tokens)
    if not artifact.is_dir():
        say("scoring them")
        lopd_store.build(teacher=student, rollouts=rollouts, output=artifact)
    return Materials(student=student, rollouts=rollouts, artifact=artifact, config=config)


def shrunk(config: Any, seed: int = 0) -> Any:
    """A model of the same kind that takes no time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.random.manual_seed(seed)
    sizes = {"hidden_size": 36, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    ids = {name: getattr(config, name) for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **ids, tie_word_embeddings=True))


def ours(method: str, objective: Loss, materials: Materials) -> Steps:
    """A whole run of `sft` or `opd`, as its metrics tell it."""
    config = replace(materials.config, objective=objective)
    begun: dict[int, float] = {}

    def on_progress(progress: Progress) -> None:
        if progress.activity == "training":
            begun.setdefault(progress.step, time.perf_counter())

    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "trained"
        if method == "sft":
            lopd_train.train_sft(
                model=materials.student, data=materials.rollouts, output=output, config=config, on_progress=on_progress
            )
        else:
            lopd_train.train_opd(
                artifact=materials.artifact,
                student=materials.student,
                output=output,
                config=config,
                overrides=[gate.ALLOW_UNKNOWN],
                on_progress=on_progress,
            )
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds = [line["tokens"] / line["tokens_per_second"] for line in lines]
    between = begun[len(seconds) - 1] - begun[1]
    outside = max(0.0, 1 - sum(seconds[1:-1]) / between)
    return Steps(
        seconds=statistics.median(seconds[1:]), positions=lines[0]["tokens"], outside=outside, loss=lines[0]["loss"]
    )


def bare(materials: Materials) -> Steps:
    """What one writes with transformers in ten minutes: padded batches, labels, the model's own loss, AdamW."""
    from transformers import AutoModelForCausalLM

    config = materials.config
    model = AutoModelForCausalLM.from_pretrained(materials.student).train()
    rollouts = sorted(RolloutsFile(materials.rollouts).read(), key=lambda rollout: -len(rollout.token_ids))
    positions = sum(len(rollout.response_ids) for rollout in rollouts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=config.betas, fused=True)
    size = max(1, config.micro_batch_tokens // len(rollouts[0].token_ids))
    seconds = []
    for _ in range(config.steps or 1):
        started = time.perf_counter()
        for start in range(0, len(rollouts), size):
            some = rollouts[start : start + size]
            longest = len(some[0].token_ids)
            ids, mask, labels = (torch.full((len(some), longest), value) for value in (0, 0, -100))
            for row, rollout in enumerate(some):
                tokens, length = torch.from_numpy(rollout.token_ids.astype(np.int64)), len(rollout.token_ids)
                ids[row, :length], mask[row, :length] = tokens, 1
                labels[row, len(rollout.prompt_ids) : length] = tokens[len(rollout.prompt_ids) :]
            count = sum(len(rollout.response_ids) for rollout in some)
            loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
            (loss * count / positions).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    return Steps(seconds=statistics.median(seconds[1:]), positions=positions, outside=0.0)
