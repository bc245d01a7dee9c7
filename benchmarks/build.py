"""The build in numbers: the embedded engine beside the bare forward pass, what follows the teacher, memory, workers.

    python benchmarks/build.py            # all of it, in a quarter of an hour; `make bench-build`
    python benchmarks/build.py --small    # the first few rollouts, one turn; keeps no results

The teacher is SmolLM2-135M-Instruct and its text HumanEval's solutions given as answers. Engine and forward pass take
turns over the same batches in one process, in one thread; what a build does behind the teacher's back is timed on the
same core.
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from distributions import MODEL, PROBLEMS, packaged, write_prompts
from measure import in_new_process, machine, medians, pin
from report import Row, table_of_rows, write_section

import lopd_store
from lopd_store import models
from lopd_store.encoding import make_encoding
from lopd_store.manifest import Scoring
from lopd_store.plan import make_plan
from lopd_store.prompts import read_prompts
from lopd_store.rollouts import Rollout, RolloutsFile, write_rollouts
from lopd_store.scoring import note_of, part_files, score_part, write_part
from lopd_store.teachers import RolloutScores
from lopd_store.teachers.transformers import TransformersTeacher, batches, score_logits

HERE = Path(__file__).parent
BATCH_TOKENS = 2048
K = 64
PART_ROLLOUTS = 2  # on average, of the artifact that workers build
WIDTHS = (49_152, 151_936)  # of SmolLM2 and of Qwen3


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is measured."""

    rollouts: int  # of what is timed outside of builds, in each turn
    built: int  # by one worker and by two, in each turn
    repeats: int


FULL, SMALL = Scale(rollouts=12, built=64, repeats=5), Scale(rollouts=2, built=8, repeats=1)


def main() -> None:
    """Measure, print, and keep the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=HERE / "RESULTS.md", help="the file whose section is rewritten")
    parser.add_argument("--small", action="store_true", help="a few rollouts, in a minute; keeps no results")
    options = parser.parse_args()
    scale = SMALL if options.small else FULL
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        model = save_model(Path(scratch) / "teacher")
        path = save_rollouts(Path(scratch), model, scale.built)
        rollouts = RolloutsFile(path).read(0, scale.rollouts)
        cores = os.sched_getaffinity(0)
        pin([min(cores)])
        rows = [
            *measure_engine(model, rollouts, path, Path(scratch), scale),
            *measure_memory(model, rollouts),
            *measure_logits(scale),
        ]
        pin(cores)
        rows += measure_workers(model, rollouts, path, Path(scratch), scale)
    text = f"{introduction(rollouts)}\n\n{table_of_rows(rows)}"
    print(text)
    if not options.small:
        write_section(options.results, "Build", text)


def save_model(directory: Path) -> Path:
    """The packaged model as safetensors, which load in a moment."""
    files = models.find(packaged(*MODEL))
    with models.without_bars():
        models.copy_without_quantization(models.load_model(files)).save_pretrained(directory)
        models.load_tokenizer(files).save_pretrained(directory)
    return directory


def save_rollouts(scratch: Path, model: Path, count: int) -> Path:
    """The chats that ask for HumanEval's functions, answered with its solutions."""
    tokenizer = models.load_tokenizer(models.find(model))
    with gzip.open(packaged(*PROBLEMS), "rt", encoding="utf-8") as lines:
        problems = [json.loads(line) for line in lines][:count]
    prompts = read_prompts(write_prompts(scratch / "prompts.jsonl", problems), tokenizer)
    answers = [f"```python\n{problem['prompt']}{problem['canonical_solution']}```" for problem in problems]
    rows = [
        {
            "prompt": prompt.text,
            "response": answer,
            "prompt_ids": prompt.ids,
            "response_ids": [*tokenizer(answer).input_ids, tokenizer.eos_token_id],
        }
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    path = scratch / "rollouts.parquet"
    write_rollouts(path, rows, None)
    return path


def measure_engine(model: Path, rollouts: list[Rollout], path: Path, scratch: Path, scale: Scale) -> Iterator[Row]:
    """Tokens per second beside the bare forward pass, and the share of what follows the teacher."""
    engine, loaded = load_engine(model), models.load_model(models.find(model))
    tokens, positions = sum(len(one.token_ids) for one in rollouts), sum(len(one.response_ids) for one in rollouts)
    scores = list(engine.score(rollouts, K))
    plan = make_plan(
        teacher=str(model),
        rollouts=path,
        sft=None,
        encoding=make_encoding(),
        scoring=Scoring(engine="transformers", dtype="float32"),
        part_positions=positions,
    )
    assert plan.parts[0].stop == len(rollouts)
    (scratch / "parts").mkdir()
    (scratch / "done").mkdir()

    def follow() -> None:
        scored = score_part(plan, Replay(scores, engine.scoring), 0, lambda tokens, positions: None)
        contents = part_files(plan, scored)
        write_part(scratch, 0, contents, note_of(plan, scored, contents))

    scoring, bare, after = medians(
        lambda: list(engine.score(rollouts, K)),
        partial(forward, loaded, rollouts),
        follow,
        repeats=scale.repeats,
    )
    yield Row(what="bare forward pass with its head", value=tokens / bare, unit="tokens/s")
    yield Row(what="transformers engine", value=tokens / scoring, unit="tokens/s")
    yield Row(what="engine beside the bare forward pass", value=bare / scoring, unit="of its speed", target=0.9)
    share = 100 * after / (scoring + after)
    yield Row(
        what="after the teacher, were it not overlapped", value=share, unit="% of the time", target=3, at_most=True
    )


def measure_memory(model: Path, rollouts: list[Rollout]) -> Iterator[Row]:
    """Most memory of a process that scores beside one that runs the bare forward pass."""
    _, bare = in_new_process(run_bare, model, rollouts)
    _, scoring = in_new_process(run_engine, model, rollouts)
    yield Row(what="peak memory, bare forward pass", value=bare, unit="MB")
    yield Row(what="peak memory, engine", value=scoring, unit="MB", target=1.1 * bare, at_most=True)


def measure_logits(scale: Scale) -> Iterator[Row]:
    """What the engine makes of logits, without the head that gives them."""
    for width in WIDTHS:
        logits = 2 * torch.randn(64, width, generator=torch.Generator().manual_seed(0))
        targets = torch.zeros(64, dtype=torch.long)
        rows = max(1, (1 << 19) // width)
        blocks = list(zip(torch.split(logits, rows), torch.split(targets, rows), strict=True))
        ours, plain = medians(partial(look, blocks), partial(look_plainly, blocks), repeats=3 * scale.repeats)
        yield Row(what=f"scores of {width:,} logits", value=ours / 64 * 1e6, unit="µs/position")
        yield Row(what="torch's log_softmax and topk alone", value=plain / 64 * 1e6, unit="µs/position")


def look(blocks: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """All that is stored of some logits."""
    for logits, targets in blocks:
        score_logits(logits, targets, K, logits.shape[1])


def look_plainly(blocks: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """The top-k alone, without entropy, tail or an order among ties."""
    for logits, _ in blocks:
        torch.topk(torch.log_softmax(logits, dim=-1), K)


def measure_workers(model: Path, rollouts: list[Rollout], path: Path, scratch: Path, scale: Scale) -> Iterator[Row]:
    """Builds by one worker on one core and by two on two, one thread each, in turn, and what a second core can add.

    The speed of a shared machine drifts from minute to minute, and so does what its second core adds. So a build by two
    is compared with those by one before and after it, and next to it two processes run nothing but forward passes.
    """
    cores = sorted(os.sched_getaffinity(0))
    ones, twos, limits = [time_build(model, path, scratch / "build-0", cores[:1])], [], []
    with Forwards(model, rollouts, cores[:2]) as forwards:
        for turn in range(1, scale.repeats + 1):
            limits.append(forwards.ratio())
            twos.append(time_build(model, path, scratch / f"build-{turn}-by-2", cores[:2]))
            ones.append(time_build(model, path, scratch / f"build-{turn}", cores[:1]))
    pin(cores)
    for workers, times in ((1, ones), (2, twos)):
        speed, seconds = map(median, zip(*times, strict=True))
        yield Row(what=f"build, workers: {workers}", value=speed, unit="positions/s")
        yield Row(what=f"the same from start to seal, workers: {workers}", value=seconds, unit="s")
    ratios = [
        2 * two / (before + after) for (before, _), (two, _), (after, _) in zip(ones, twos, ones[1:], strict=False)
    ]
    yield Row(what="two workers beside one", value=median(ratios), unit="times", target=1.8)
    yield Row(what="bare forward passes in two processes beside one", value=median(limits), unit="times")


def time_build(model: Path, path: Path, output: Path, cores: list[int]) -> tuple[float, float]:
    """Positions per second of a build with a worker for each core, and seconds from its start to its seal.

    The speed is that between a tenth and nine tenths of the positions, when every worker has parts to score: the rest,
    above all loading the teacher, takes as long in a build of hours.
    """
    pin(cores)
    heard: list[tuple[float, int]] = []
    lengths = RolloutsFile(path).response_lengths
    started = time.perf_counter()
    lopd_store.build(
        teacher=model,
        rollouts=path,
        output=output,
        workers=len(cores),
        batch_tokens=BATCH_TOKENS,
        part_positions=max(1, PART_ROLLOUTS * int(lengths.sum()) // len(lengths)),
        on_progress=lambda progress: heard.append((time.perf_counter(), progress.positions)),
    )
    seconds = time.perf_counter() - started
    times, positions = zip(*heard, strict=True)
    tenths = np.array([0.1, 0.9]) * int(lengths.sum())
    return float(np.diff(tenths)[0] / np.diff(np.interp(tenths, positions, times))[0]), seconds


class Forwards:
    """Bare forward passes over the same rollouts in two processes, each on a core of its own."""

    def __init__(self, model: Path, rollouts: list[Rollout], cores: list[int]) -> None:
        context = multiprocessing.get_context("spawn")
        together = context.Barrier(len(cores))
        told = [(core, model, rollouts, together) for core in cores]
        self._pools = [ProcessPoolExecutor(1, context, begin_forwards, one) for one in told]

    def __enter__(self) -> Forwards:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self._pools:
            pool.shutdown()

    def ratio(self) -> float:
        """Speed of both at once beside that of the first alone."""
        alone = self._pools[0].submit(time_forward, together=False).result()
        both = [pool.submit(time_forward, together=True) for pool in self._pools]
        return sum(alone / one.result() for one in both)


_process: dict[str, Any] = {}  # what a process of `Forwards` keeps


def begin_forwards(core: int, model: Path, rollouts: list[Rollout], together: Any) -> None:
    """Load the model into a process that has one core."""
    pin([core])
    torch.set_num_threads(1)
    models.keep_freed_memory("cpu")  # as the engine does
    _process.update(model=models.load_model(models.find(model)), rollouts=rollouts, together=together)


def time_forward(together: bool) -> float:
    """Seconds of the bare forward pass, begun with the other process where `together`."""
    if together:
        _process["together"].wait()
    started = time.perf_counter()
    forward(_process["model"], _process["rollouts"])
    return time.perf_counter() - started


@dataclass
class Replay:
    """A teacher that has said everything before: what is timed is what follows it."""

    scores: list[tuple[int, RolloutScores]]
    scoring: Scoring
    context_length: int | None = None

    def score(self, rollouts: Sequence[Rollout], k: int) -> Iterator[tuple[int, RolloutScores]]:
        """See `lopd_store.teachers.Teacher`."""
        yield from self.scores


def load_engine(model: Path) -> TransformersTeacher:
    """The embedded engine as a build loads it."""
    vocab_size = lopd_store.identify(model).vocab_size
    return TransformersTeacher(
        str(model), vocab_size=vocab_size, dtype="float32", device="cpu", batch_tokens=BATCH_TOKENS
    )


@torch.inference_mode()
def forward(model: Any, rollouts: list[Rollout]) -> None:
    """The model alone over the batches of the engine, logits and all."""
    for batch in batches(rollouts, BATCH_TOKENS):
        width = max(len(rollouts[index].token_ids) for index in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        for row, index in enumerate(batch):
            tokens = rollouts[index].token_ids
            ids[row, : len(tokens)] = torch.from_numpy(tokens.astype("int64"))
        model(input_ids=ids, use_cache=False)


def run_bare(model: Path, rollouts: list[Rollout]) -> None:
    """Load the model and run it."""
    torch.set_num_threads(1)
    forward(models.load_model(models.find(model)), rollouts)


def run_engine(model: Path, rollouts: list[Rollout]) -> None:
    """Load the engine and score."""
    torch.set_num_threads(1)
    list(load_engine(model).score(rollouts, K))


def introduction(rollouts: list[Rollout]) -> str:
    """When, where, with what and on what."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("lopd", "torch", "transformers", "numpy"))
    tokens, positions = sum(len(one.token_ids) for one in rollouts), sum(len(one.response_ids) for one in rollouts)
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, {machine()}; Python {platform.python_version()}, {versions}. "
        f"SmolLM2-135M-Instruct in float32 over {len(rollouts)} rollouts of {tokens:,} tokens, {positions:,} of them "
        f"positions, in batches of up to {BATCH_TOKENS:,} tokens; k = {K}. One thread; speeds are medians of turns."
    )


if __name__ == "__main__":
    main()
