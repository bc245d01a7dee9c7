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

import torch

from lopd_store.errors import DataError
from lopd_store.models import context_length
from lopd_train import checkpoint, measures
from lopd_train.batches import Batch, Record, check_records, micro_batches, rollouts_of_step
from lopd_train.checkpoint import Run
from lopd_train.config import TrainConfig
from lopd_train.head import Sums
from lopd_train.runlog import Metrics, OnProgress, Progress, RunLog
from lopd_train.student import Student, load


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a method minimises, under the name `loss`, and what it is measured by."""

    train: Callable[[Student, Batch], Sums]
    evaluate: Callable[[Student, Batch], Sums]


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
    training: Sequence[Record],
    held_out: Sequence[Record],
    output: Path,
    on_progress: OnProgress | None = None,
) -> RunResult:
    """Do a run, or what is left of it, and leave the trained model in `output`."""
    student = load(run.model, run.config)
    check_records(
        [*training, *held_out],
        vocab_size=min(run.base.vocab_size, run.base.output_width),
        context_length=context_length(student.model.config),
    )
    directory = checkpoint.begin(run, output)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(run.config.seed)
        trainer = Trainer(
            config=run.config,
            objective=objective,
            student=student,
            training=training,
            held_out=held_out,
            directory=directory,
            on_progress=on_progress,
        )
        trainer.train()
    checkpoint.finish(run, student, directory, output)
    evaluations = trainer.log.evaluations or [{}]
    return RunResult(output=output, steps=trainer.step, first_eval=evaluations[0], last_eval=evaluations[-1])


@dataclass(kw_only=True)
class Trainer:
    """A student, its optimiser, its data, and where the run is."""

    config: TrainConfig  # resolved
    objective: Objective
    student: Student
    training: Sequence[Record]
    held_out: Sequence[Record]
    directory: Path
    on_progress: OnProgress | None = None

    def __post_init__(self) -> None:
        assert self.config.steps is not None
        self.steps = self.config.steps
        self.optimizer = make_optimizer(self.student.model, self.config)
        self.step = checkpoint.load_state(self.directory, student=self.student, optimizer=self.optimizer)
        self.log = RunLog(self.directory / checkpoint.METRICS_FILE, step=self.step)
        self._metrics: Metrics = {}
        self._interrupted = False

    def train(self) -> None:
        """Train to the last step, from wherever the run is.

        Raises DataError where the loss or gradient is no number, and KeyboardInterrupt after Ctrl-C, once the step
        in hand is finished and saved.
        """
        config = self.config
        if self.held_out and not self.log.evaluations:
            self.log.write_evaluation(self.step, self.evaluate())
        with self._finishing_the_step():
            while self.step < self.steps:
                self._metrics = self.train_step()
                self.step += 1
                self.log.write(self.step, self._metrics)
                if self.held_out and (self.step % config.eval_every == 0 or self.step == self.steps):
                    self.log.write_evaluation(self.step, self.evaluate())
                stop = self._interrupted and self.step < self.steps
                if stop or self.step % config.checkpoint_every == 0:
                    checkpoint.save_state(
                        self.directory, step=self.step, student=self.student, optimizer=self.optimizer
                    )
                if stop:
                    raise KeyboardInterrupt(
                        f"stopped after step {self.step}; the same command again goes on from there"
                    )

    def train_step(self) -> Metrics:
        """One optimiser step on the next rollouts; the weights change only where loss and gradient are finite."""
        started = time.perf_counter()
        config, number = self.config, self.step + 1
        rows = rollouts_of_step(number, len(self.training), batch=config.batch_rollouts, seed=config.seed)
        records = [self.training[row] for row in rows]
        means = self.backward(records)
        norm = float(torch.nn.utils.clip_grad_norm_(self.student.model.parameters(), config.clip_norm))
        if not math.isfinite(norm):
            raise self._not_finite(f"gradient of step {number}", [record.row for record in records])
        rate = learning_rate(config, number)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        seconds = time.perf_counter() - started
        return {**means, "learning_rate": rate, "grad_norm": norm, "tokens_per_second": means["tokens"] / seconds}

    def backward(self, records: Sequence[Record]) -> Metrics:
        """Add the gradient of the mean loss over all positions of these rollouts; returns the means."""
        tokens = sum(record.positions for record in records)
        self.student.model.train()
        done, rows, pieces = 0, [], []
        for batch in self._micro_batches(records):
            self._report("stopping after this step" if self._interrupted else "training", done)
            sums = self.objective.train(self.student, batch)
            (sums["loss"] / tokens).backward()  # type: ignore[no-untyped-call]
            pieces.append({name: value.detach() for name, value in sums.items()})
            rows.append(batch.rows)
            done += len(batch.rows)
        bad = [not bool(sums["loss"].isfinite()) for sums in pieces]
        if any(bad):
            named = [row for some, is_bad in zip(rows, bad, strict=True) if is_bad for row in some]
            raise self._not_finite(f"loss of step {self.step + 1}", named)
        return _means(pieces, tokens)

    @torch.inference_mode()
    def evaluate(self) -> Metrics:
        """The objective's measures on the held-out rollouts, as means over their positions."""
        self.student.model.eval()
        done, pieces = 0, []
        for batch in self._micro_batches(self.held_out):
            self._report(f"evaluating, {done} of {len(self.held_out)} rollouts")
            pieces.append(self.objective.evaluate(self.student, batch))
            done += len(batch.rows)
        means = _means(pieces, sum(record.positions for record in self.held_out))
        if not all(map(math.isfinite, means.values())):
            raise self._not_finite(f"evaluation after step {self.step}", [record.row for record in self.held_out])
        return means

    def _micro_batches(self, records: Sequence[Record]) -> Iterator[Batch]:
        return micro_batches(records, max_tokens=self.config.micro_batch_tokens, device=self.student.device)

    def _report(self, activity: str, done_of_step: int = 0) -> None:
        if self.on_progress is not None:
            self.on_progress(
                Progress(
                    activity=activity,
                    done=self.step * self.config.batch_rollouts + done_of_step,
                    total=self.steps * self.config.batch_rollouts,
                    step=self.step,
                    steps=self.steps,
                    metrics=self._metrics,
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


def _means(pieces: Sequence[Sums], tokens: int) -> dict[str, float]:
    means = {name: sum(float(sums[name]) for sums in pieces) / tokens for name in pieces[0]}
    return {**measures.finish(means), "tokens": tokens}
