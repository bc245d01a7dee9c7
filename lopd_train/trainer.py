"""The loop: forward, backward, step, and what stands around them.

What a step minimises is a sum of terms, each of them a mean: sum_t w_t (1 / N_t) sum_j l_j, where N_t counts the
positions of all rollouts that the step has for the term. So how they are cut into micro-batches, and over how many
processes, changes no digit but the last.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from lopd_store.durable import alone
from lopd_store.errors import DataError, InputError
from lopd_train import checkpoint, measures
from lopd_train.batches import Batch, Record, collate, micro_batches
from lopd_train.checkpoint import Run
from lopd_train.config import TrainConfig
from lopd_train.data import Cursor, Feed
from lopd_train.head import Sums
from lopd_train.runlog import Metrics, OnProgress, Progress, RunLog
from lopd_train.student import Student, load
from lopd_train.world import joined


@dataclass(frozen=True, kw_only=True)
class Term:
    """A part of what a run minimises: the mean of a loss over rollouts of its own, times a weight."""

    measure: Callable[[Student, Batch], Sums]  # the loss and what there is to watch, summed over positions
    feed: Feed
    rollouts: int  # of a step
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What came out of a run; evaluations are means over the held-out positions, empty where there are none."""

    output: Path
    steps: int
    first_eval: Metrics
    last_eval: Metrics


def fit(run: Run, terms: Sequence[Term], output: Path, on_progress: OnProgress | None = None) -> RunResult:
    """Do a run, or what is left of it, and leave the trained model in `output`."""
    config, directory = run.config, output.with_name(output.name + ".training")
    assert config.device is not None
    with joined(config.device) as world, torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        if config.batch_rollouts % world.size:
            raise InputError(
                f"the rollouts of a step do not divide by {world.size} processes",
                expected=f"a multiple of {world.size}",
                actual=config.batch_rollouts,
                hint="`--batch-rollouts`, or another `--nproc-per-node`; a smaller data set makes smaller batches",
            )
        torch.manual_seed(config.seed)
        student = load(run.model, config, world)
        with alone(directory, wait=False) if world.is_first else nullcontext():
            checkpoint.begin(run, directory, world)
            trainer = Trainer(student, terms, directory, on_progress if world.is_first else None)
            trainer.train()
            checkpoint.finish(run, student, directory, output)
    evaluations = list(trainer.log.evaluations.values()) or [{}]
    return RunResult(output=output, steps=trainer.step, first_eval=evaluations[0], last_eval=evaluations[-1])


class Trainer:
    """A student, its optimiser, its data, and where the run is; the first of the terms is what it is judged by."""

    def __init__(
        self, student: Student, terms: Sequence[Term], directory: Path, on_progress: OnProgress | None = None
    ) -> None:
        self.student, self.config, self.world = student, student.config, student.world
        self.terms, self.held_out = terms, terms[0].feed.held_out
        self.directory, self._on_progress = directory, on_progress
        self.optimizer = make_optimizer(student.model, self.config)
        self.step, cursors = checkpoint.load_state(directory, student, self.optimizer)
        self.cursors = cursors or [Cursor()] * len(terms)
        self.log = RunLog(directory / checkpoint.METRICS_FILE, step=self.step, writes=self.world.is_first)
        self._metrics: Metrics = {}
        self._done = 0  # rollouts of the step in hand
        self._interrupted = False

    def train(self) -> None:
        """Train to the last step, from wherever the run is.

        Raises DataError where the loss or gradient is no number, and KeyboardInterrupt after Ctrl-C, once the step
        in hand is finished and saved.
        """
        config, left = self.config, (self.config.steps or 0) - self.step
        feeds = zip(self.terms, self.cursors, strict=True)
        steps = [term.feed.steps(cursor, batch=term.rollouts, count=left) for term, cursor in feeds]
        if not self.log.evaluations:
            self.evaluate_and_log()
        with self._finishing_the_step():
            for drawn in zip(*steps, strict=True):
                self.cursors = [cursor for _, cursor in drawn]
                self._metrics = self.train_step([records for records, _ in drawn])
                self.step += 1
                self._report("measured", line=self.log.write(self.step, self._metrics))
                last = self.step == config.steps
                if last or self.step % config.eval_every == 0:
                    self.evaluate_and_log()
                stop = not last and any(self.world.gather(self._interrupted))
                if stop or self.step % config.checkpoint_every == 0:
                    self.save()
                if stop:
                    raise KeyboardInterrupt(
                        f"stopped after step {self.step}; the same command again goes on from there"
                    )

    def train_step(self, records: Sequence[Sequence[Record]]) -> Metrics:
        """One optimiser step on the rollouts of each term; the weights change only where all numbers are finite."""
        started, number, config = time.perf_counter(), self.step + 1, self.config
        # What is random in a step, such as dropout, follows from the seed, the step and the process alone.
        random = np.random.default_rng([config.seed, number, 1 + self.world.rank])
        torch.manual_seed(int(random.integers(1 << 62)))
        means, *mixed = [self.backward(some, term) for some, term in zip(records, self.terms, strict=True)]
        norm = torch.nn.utils.clip_grad_norm_(self.student.model.parameters(), config.clip_norm)
        grad_norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if not math.isfinite(grad_norm):
            raise self._not_finite(f"gradient of step {number}", [record.row for record in records[0]])
        rate = learning_rate(config, number)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._done = 0
        metrics = {**means, "learning_rate": rate, "grad_norm": grad_norm}
        metrics |= {"sft_loss": mixed[0]["loss"]} if mixed else {}
        metrics |= {"dropped": self.cursors[0].dropped} if config.drop_long else {}
        tokens, seconds = sum(some["tokens"] for some in (means, *mixed)), time.perf_counter() - started
        return {**metrics, "tokens_per_second": tokens / seconds}

    def backward(self, records: Sequence[Record], term: Term) -> Metrics:
        """Add the gradient of a term on these rollouts; returns the means over all their positions."""
        tokens, pieces = sum(record.positions for record in records), []
        self.student.model.train()
        for batch, counts in self._micro_batches(records):
            self._report("stopping after this step" if self._interrupted else "training")
            sums = self.student.gathered(term.measure, self.student, batch)
            # Sharded gradients come out averaged over the processes, and it is their sum that is wanted.
            (sums["loss"] * (counts * term.weight * self.world.size / tokens)).backward()
            pieces.append((batch.rows, {name: counts * value.detach() for name, value in sums.items()}))
            self._done += len(batch.rows) * self.world.size if term is self.terms[0] else 0
        which = "loss" if term is self.terms[0] else "loss on SFT data"
        return self._means(pieces, tokens, f"{which} of step {self.step + 1}")

    @torch.no_grad()
    def evaluate(self) -> Metrics:
        """The measures on the held-out rollouts, as means over their positions."""
        tokens, pieces = sum(record.positions for record in self.held_out), []
        self.student.model.eval()
        for number, (batch, counts) in enumerate(self._micro_batches(self.held_out)):
            self._report(f"evaluating, micro-batch {number + 1}")
            sums = self.student.gathered(measures.of_batch, self.student, batch)
            pieces.append((batch.rows, {name: counts * value for name, value in sums.items()}))
        return self._means(pieces, tokens, f"evaluation after step {self.step}")

    def evaluate_and_log(self) -> None:
        """Evaluate, where anything is held out."""
        if self.held_out:
            self._report("measured", line=self.log.write_evaluation(self.step, self.evaluate()))

    def save(self) -> None:
        """Keep what it takes to go on from here, and the model where such are kept."""
        step, command = self.step, self.config.eval_command
        checkpoint.save_state(self.directory, step, self.cursors, self.student, self.optimizer)
        if self.config.keep_checkpoints:
            measured = self.log.evaluations.items()
            scores = {step: values.get("reverse_kl", values["cross_entropy"]) for step, values in measured}
            model = checkpoint.keep_model(self.directory, step, self.student, scores)
            if command and self.world.is_first:
                self._report("running the evaluation command")
                if code := checkpoint.run_command(command, model, step):
                    note = f"`{command}` left with exit code {code} after step {step}; training goes on"
                    self._report("training", note=note)

    def _micro_batches(self, records: Sequence[Record]) -> Iterator[tuple[Batch, int]]:
        """This process's share of the micro-batches, each with 1 where it counts.

        Sharded processes call the model in step, so that one without a micro-batch left does another's, which counts 0.
        """
        size, rank = self.world.size, self.world.rank
        cut = micro_batches(records, max_tokens=self.config.micro_batch_tokens, share=size)
        for number in range(rank, -(-len(cut) // size) * size, size):
            yield collate(cut[number % len(cut)], self.student.device), int(number < len(cut))

    def _means(self, pieces: Sequence[tuple[tuple[int, ...], Sums]], tokens: int, what: str) -> Metrics:
        """Sums over the micro-batches of all processes, divided; raises DataError where one is not finite."""
        own = {name: sum(float(sums[name]) for _, sums in pieces) for name in pieces[0][1]}
        every = self.world.gather(own)
        means = measures.finish({name: sum(sums[name] for sums in every) / tokens for name in own})
        if not all(map(math.isfinite, means.values())):
            bad = [row for rows, sums in pieces if not all(value.isfinite() for value in sums.values()) for row in rows]
            raise self._not_finite(what, [row for rows in self.world.gather(bad) for row in rows])
        return {**means, "tokens": tokens}

    def _not_finite(self, what: str, rows: Sequence[int]) -> DataError:
        named = [str(row) for row in sorted(set(rows))]
        listed = ", ".join(named[:8]) + (f" and {len(named) - 8} more" if len(named) > 8 else "")
        return DataError(
            f"the {what} is not finite, from the rollouts {listed}",
            hint="look at them with `lopd-store inspect --rollout`; to begin anew with a lower `--learning-rate`, "
            f"remove `{self.directory}`, which holds the last checkpoint",
        )

    def _report(self, activity: str, *, line: Metrics | None = None, note: str | None = None) -> None:
        if self._on_progress is not None:
            size, steps = self.config.batch_rollouts, self.config.steps or 0
            self._on_progress(
                Progress(
                    activity=activity,
                    done=self.step * size + self._done,
                    total=steps * size,
                    step=self.step,
                    steps=steps,
                    metrics=self._metrics,
                    line=line,
                    note=note,
                )
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
