"""The loop: forward, backward, step, and what stands around them.

One denominator serves a whole optimiser step: each micro-batch's sum is divided by the positions of all of them, so
how rollouts are cut into micro-batches changes no digit but the last.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lopd_store.errors import DataError, InputError
from lopd_train import checkpoint, measures
from lopd_train.batches import Batch, Record, collate, micro_batches
from lopd_train.checkpoint import Run
from lopd_train.config import TrainConfig
from lopd_train.data import Feed
from lopd_train.head import Sums
from lopd_train.runlog import Metrics, OnMetrics, OnProgress, Progress, RunLog
from lopd_train.student import Student, load
from lopd_train.world import ALONE, World, joined


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a method minimises, under the name `loss`, and what it is measured by."""

    train: Callable[[Student, Batch], Sums]
    evaluate: Callable[[Student, Batch], Sums]
    best_by: str = "reverse_kl"  # the measure by which a checkpoint is better than another, the lower the better


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What came out of a run; evaluations are means over the held-out positions, empty where there are none."""

    output: Path
    steps: int
    first_eval: Metrics
    last_eval: Metrics


def fit(
    run: Run,
    *,
    objective: Objective,
    feed: Feed,
    output: Path,
    on_progress: OnProgress | None = None,
    on_metrics: OnMetrics | None = None,
) -> RunResult:
    """Do a run, or what is left of it, and leave the trained model in `output`."""
    config = run.config
    assert config.device is not None
    gpus = range(torch.cuda.device_count())
    with joined(config.device) as world, torch.random.fork_rng(devices=gpus):
        check_share(config, world)
        torch.manual_seed(config.seed)
        student = load(run.model, config, world)
        directory = checkpoint.begin(run, output, world)
        trainer = Trainer(
            config=config,
            objective=objective,
            student=student,
            feed=feed,
            directory=directory,
            world=world,
            on_progress=on_progress if world.is_first else None,
            on_metrics=on_metrics,
        )
        trainer.train()
        checkpoint.finish(run, student, directory, output, world)
    evaluations = trainer.log.evaluations or [{}]
    return RunResult(output=output, steps=trainer.step, first_eval=evaluations[0], last_eval=evaluations[-1])


@dataclass(kw_only=True)
class Trainer:
    """A student, its optimiser, its data, and where the run is."""

    config: TrainConfig  # resolved
    objective: Objective
    student: Student
    feed: Feed
    directory: Path
    world: World = ALONE
    on_progress: OnProgress | None = None
    on_metrics: OnMetrics | None = None

    def __post_init__(self) -> None:
        assert self.config.steps is not None
        self.steps = self.config.steps
        self.optimizer = make_optimizer(self.student.model, self.config)
        self.step, self.cursor = checkpoint.load_state(self.directory, student=self.student, optimizer=self.optimizer)
        self.log = RunLog(
            self.directory / checkpoint.METRICS_FILE,
            step=self.step,
            writes=self.world.is_first,
            on_metrics=self.on_metrics,
        )
        self._metrics: Metrics = {}
        self._interrupted = False

    def train(self) -> None:
        """Train to the last step, from wherever the run is.

        Raises DataError where the loss or gradient is no number, and KeyboardInterrupt after Ctrl-C, once the step
        in hand is finished and saved.
        """
        config = self.config
        upcoming = self.feed.steps(self.cursor, batch=config.batch_rollouts, count=self.steps - self.step)
        if self.feed.held_out and not self.log.evaluations:
            self.log.write_evaluation(self.step, self.evaluate())
        with self._finishing_the_step():
            for records, self.cursor in upcoming:
                self._metrics = self.train_step(records)
                self.step += 1
                self.log.write(self.step, self._metrics)
                if self.feed.held_out and (self.step % config.eval_every == 0 or self.step == self.steps):
                    self.log.write_evaluation(self.step, self.evaluate())
                stop = self.step < self.steps and self.world.any(self._interrupted)
                if stop or self.step % config.checkpoint_every == 0:
                    self.save()
                if stop:
                    raise KeyboardInterrupt(
                        f"stopped after step {self.step}; the same command again goes on from there"
                    )

    def train_step(self, records: Sequence[Record]) -> Metrics:
        """One optimiser step on these rollouts; the weights change only where loss and gradient are finite."""
        started = time.perf_counter()
        config, number = self.config, self.step + 1
        torch.manual_seed(seed_of_step(config.seed, number, self.world.rank))
        means = self.backward(records)
        norm = whole(torch.nn.utils.clip_grad_norm_(self.student.model.parameters(), config.clip_norm))
        if not math.isfinite(norm):
            raise self._not_finite(f"gradient of step {number}", [record.row for record in records])
        rate = learning_rate(config, number)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        seconds = time.perf_counter() - started
        metrics = {**means, "learning_rate": rate, "grad_norm": norm, "tokens_per_second": means["tokens"] / seconds}
        return metrics | ({"dropped": self.cursor.dropped} if config.drop_long else {})

    def backward(self, records: Sequence[Record]) -> Metrics:
        """Add the gradient of the mean loss over all positions of these rollouts; returns the means."""
        tokens = sum(record.positions for record in records)
        self.student.model.train()
        done, pieces = 0, []
        bad: list[int] = []  # rows
        for batch, weight in self._micro_batches(records):
            self._report("stopping after this step" if self._interrupted else "training", done)
            sums = self.student.gathered(self.objective.train, self.student, batch)
            # Sharded gradients come out averaged over the processes, and it is their sum that is wanted.
            (sums["loss"] * (weight * self.world.size / tokens)).backward()
            pieces.append({name: weight * value.detach() for name, value in sums.items()})
            bad += [] if bool(sums["loss"].isfinite()) else batch.rows
            done += len(batch.rows) * self.world.size
        means = self._means(pieces, tokens)
        if not math.isfinite(means["loss"]):
            raise self._not_finite(f"loss of step {self.step + 1}", self.world.gather(bad))
        return means

    @torch.no_grad()
    def evaluate(self) -> Metrics:
        """The objective's measures on the held-out rollouts, as means over their positions."""
        self.student.model.eval()
        held_out, done, pieces = self.feed.held_out, 0, []
        for batch, weight in self._micro_batches(held_out):
            self._report(f"evaluating, {done} of {len(held_out)} rollouts")
            sums = self.student.gathered(self.objective.evaluate, self.student, batch)
            pieces.append({name: weight * value for name, value in sums.items()})
            done += len(batch.rows) * self.world.size
        means = self._means(pieces, sum(record.positions for record in held_out))
        if not all(map(math.isfinite, means.values())):
            raise self._not_finite(f"evaluation after step {self.step}", [record.row for record in held_out])
        return means

    def save(self) -> None:
        """Keep what it takes to go on from here, and the model where such are kept."""
        step, student, world = self.step, self.student, self.world
        checkpoint.save_state(
            self.directory, step=step, cursor=self.cursor, student=student, optimizer=self.optimizer, world=world
        )
        if self.config.keep_checkpoints:
            scores = self.log.scores(self.objective.best_by)
            model = checkpoint.keep_model(
                self.directory, step=step, student=student, config=self.config, scores=scores, world=world
            )
            if self.config.eval_command and world.is_first:
                self._report("running the evaluation command")
                code = checkpoint.run_command(self.config.eval_command, model, step)
                note = f"`{self.config.eval_command}` left with exit code {code} after step {step}; training goes on"
                self._report("training", note=note if code else None)

    def _micro_batches(self, records: Sequence[Record]) -> Iterator[tuple[Batch, int]]:
        """This process's share of the micro-batches, each with its weight.

        Sharded processes call the model in step, so that one without a micro-batch left does another's, of weight 0.
        """
        size, rank = self.world.size, self.world.rank
        cut = micro_batches(records, max_tokens=self.config.micro_batch_tokens, share=size)
        for number in range(rank, -(-len(cut) // size) * size, size):
            yield collate(cut[number % len(cut)], self.student.device), int(number < len(cut))

    def _means(self, pieces: Sequence[Sums], tokens: int) -> dict[str, float]:
        sums = self.world.totals({name: sum(float(piece[name]) for piece in pieces) for name in pieces[0]})
        return {**measures.finish({name: value / tokens for name, value in sums.items()}), "tokens": tokens}

    def _report(self, activity: str, done_of_step: int = 0, note: str | None = None) -> None:
        if self.on_progress is not None:
            self.on_progress(
                Progress(
                    activity=activity,
                    done=self.step * self.config.batch_rollouts + done_of_step,
                    total=self.steps * self.config.batch_rollouts,
                    step=self.step,
                    steps=self.steps,
                    metrics=self._metrics,
                    note=note,
                )
            )

    def _not_finite(self, what: str, rows: Sequence[int]) -> DataError:
        named = [str(row) for row in sorted(set(rows))]
        listed = ", ".join(named[:8]) + (f" and {len(named) - 8} more" if len(named) > 8 else "")
        return DataError(
            f"the {what} is not finite, from the rollouts {listed}",
            hint="look at them with `lopd-store inspect --rollout`; to begin anew with a lower `--learning-rate`, "
            f"remove `{self.directory}`, which holds the last checkpoint",
        )

    @contextmanager
    def _finishing_the_step(self) -> Iterator[None]:
        """Let the first Ctrl-C wait for the end of the step; the second one stops at once."""
        if threading.current_thread() is not threading.main_thread():  # only the main thread hears signals
            yield
            return

        def on_interrupt(*_: object) -> None:
            self._interrupted = True
            signal.signal(signal.SIGINT, before)

        before = signal.signal(signal.SIGINT, on_interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def make_optimizer(model: torch.nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves norms, biases and other vectors alone."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of step 1, 2, …: a linear warm-up, then constant, or a half cosine that ends above 0."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    assert config.steps is not None
    progress = (step - 1 - config.warmup_steps) / (config.steps - config.warmup_steps)
    return config.learning_rate * (1 + math.cos(math.pi * progress)) / 2


def whole(norm: Tensor) -> float:
    """The norm of a gradient, sharded or not."""
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def seed_of_step(seed: int, step: int, rank: int) -> int:
    """What is random in a step, such as dropout, follows from the seed, the step and the process alone."""
    return int(np.random.default_rng([seed, step, 1 + rank]).integers(1 << 62))


def check_share(config: TrainConfig, world: World) -> None:
    """Refuse a batch that does not divide by the processes."""
    if config.batch_rollouts % world.size:
        raise InputError(
            f"the rollouts of a step do not divide by {world.size} processes",
            expected=f"a multiple of {world.size}",
            actual=config.batch_rollouts,
            hint="`--batch-rollouts`, or another `--nproc-per-node`; a smaller data set makes smaller batches",
        )
