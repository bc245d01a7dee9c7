"""Standard OPD, with the teacher in the loop, beside the offline kind: the same loss, prompts and number of rollouts.

    python benchmarks/live_opd.py                                         # SmolLM2 teaches its first 24 layers
    python benchmarks/live_opd.py --teacher T --student S --prompts FILE  # others
    python benchmarks/live_opd.py --small                                 # models of no size; keeps no results

Live, every step samples from the student of that moment and asks the teacher. Offline, the rollouts are sampled once,
from the student at the start, and scored once. Both are judged by whole distributions, on new rollouts of what came out
on prompts that neither was trained on, and both run several times: another seed draws other rollouts in another order.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt
import relatives
import torch
from distributions import MODEL, packaged, say, write_prompts
from measure import machine
from report import table, write_section
from steps import shrunk

import lopd_store
import lopd_train
from lopd_store import gate, identify, models
from lopd_store.prompts import read_prompts
from lopd_store.provenance import Sampling
from lopd_store.samplers.transformers import TransformersSampler
from lopd_train import TrainConfig, student
from lopd_train.batches import Batch, Record, collate
from lopd_train.head import Predictions, Sums
from lopd_train.opd import measure
from lopd_train.student import Student
from lopd_train.trainer import learning_rate, make_optimizer

HERE = Path(__file__).parent
JUDGED, JUDGE_SEED = 32, 1_000  # rollouts, and a seed that no training has
OURS = "Teacher SmolLM2-135M-Instruct, student its first 24 layers after sft on its answers"
AT_ONCE = 4  # rollouts in a forward pass
Ids = npt.NDArray[np.uint32]


@dataclass(frozen=True, kw_only=True)
class Task:
    """Who learns what from whom."""

    who: str
    teacher: Path
    student: Path
    prompts: Path
    held_out: Path  # other prompts
    tokens: int  # of a response
    runs: int  # each way
    config: TrainConfig


class Clock:
    """Seconds by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def on(self, what: str) -> Iterator[None]:
        """Count the time in here."""
        started = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - started


def main() -> None:
    """Train both ways, judge both, print, and keep the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--student", type=Path)
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rollouts", type=int, default=8, help="a step")
    parser.add_argument("--tokens", type=int, default=64, help="of a response, at most")
    parser.add_argument("--runs", type=int, default=3, help="each way, with a seed of its own")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--cache", type=Path, default=HERE / ".cache", help="where the models are kept")
    parser.add_argument("--results", type=Path, default=HERE / "RESULTS.md", help="the file whose section is rewritten")
    parser.add_argument("--small", action="store_true", help="models of no size, in a minute; keeps no results")
    options = parser.parse_args()
    config = TrainConfig(
        steps=options.steps,
        batch_rollouts=options.rollouts,
        learning_rate=options.learning_rate,
        warmup_steps=2,
        eval_fraction=0,
        device="cpu",
    )
    with tempfile.TemporaryDirectory() as scratch:
        if options.small:
            task = small_task(Path(scratch), replace(config, steps=2, batch_rollouts=2))
        else:
            cache = options.cache / "audit"
            cache.mkdir(parents=True, exist_ok=True)
            prompts, held_out = split(options.prompts or function_headers(Path(scratch)), Path(scratch))
            named = f"Teacher {options.teacher}, student {options.student}"
            task = Task(
                who=named if options.teacher and options.student else OURS,
                teacher=options.teacher or relatives.teacher(cache),
                student=options.student or taught(cache),
                prompts=prompts,
                held_out=held_out,
                tokens=options.tokens,
                runs=options.runs,
                config=config,
            )
        text = compare(task, Path(scratch))
    print(text)
    if not options.small:
        write_section(options.results, "Live baseline", text)


def compare(task: Task, scratch: Path) -> str:
    """Both ways beside the student that they start from."""
    config, teacher = task.config, student.load(task.teacher, task.config)
    lines = [["at the start", *["-"] * 4, judge(student.load(task.student, config), teacher, task)]]
    for name, train in (("offline", train_offline), ("live", train_live)):
        clocks, judged = [Clock() for _ in range(task.runs)], []
        for run, clock in enumerate(clocks):
            say(f"{name}, run {run + 1} of {task.runs}")
            (directory := scratch / f"{name}-{run}").mkdir()
            seeded = replace(task, config=replace(config, seed=run))
            judged.append(judge(train(seeded, teacher, clock, directory), teacher, task))
        spent = [median(clock.seconds[what] for clock in clocks) for what in ("sampling", "scoring", "updating")]
        lines.append([name, *(f"{seconds:.1f}" for seconds in [*spent, sum(spent)]), ", ".join(judged)])
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, {machine()}. {task.who}: "
        f"{config.steps} steps of {config.batch_rollouts} rollouts of up to {task.tokens} tokens, objective "
        f"`{config.objective}`, learning rate {config.learning_rate:g}. Seconds are medians of {task.runs} runs. "
        f"KL(student || teacher) is over the whole vocabulary, on {JUDGED} new rollouts of each student, on prompts "
        "held out, with its 95 % interval over those rollouts, for each run.\n\n"
    ) + table(["", "sampling, s", "scoring, s", "updating, s", "all, s", "reverse KL, nats/token"], lines)


def train_live(task: Task, teacher: Student, clock: Clock, scratch: Path) -> Student:
    """The loop: sample, score, update."""
    config, trained = task.config, student.load(task.student, task.config)
    optimizer = make_optimizer(trained.model, config)
    prompts = prompt_ids(task.prompts, trained)
    np.random.default_rng(config.seed).shuffle(prompts)  # as training from an artifact does
    for step in range(config.steps or 0):
        streams = range(step * config.batch_rollouts, (step + 1) * config.batch_rollouts)
        with clock.on("sampling"):
            records = sample(
                trained, [prompts[stream % len(prompts)] for stream in streams], streams, task, seed=config.seed
            )
        with clock.on("scoring"):
            records = [replace(record, sampled_logprobs=score(teacher, record)) for record in records]
        with clock.on("updating"):
            trained.model.train()
            tokens = sum(record.positions for record in records)
            for start in range(0, len(records), AT_ONCE):
                sums = measure(config, trained, collate(records[start : start + AT_ONCE], trained.device))
                (sums["loss"] / tokens).backward()  # type: ignore[no-untyped-call]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step + 1)
            torch.nn.utils.clip_grad_norm_(trained.model.parameters(), config.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
    return trained


def train_offline(task: Task, teacher: Student, clock: Clock, scratch: Path) -> Student:
    """The pipeline: rollouts, artifact, training; each rollout is read once."""
    config, rollouts, artifact = task.config, scratch / "rollouts.parquet", scratch / "artifact"
    prompts = len(prompt_ids(task.prompts, teacher))
    wanted = (config.steps or 0) * config.batch_rollouts
    with clock.on("sampling"):
        lopd_store.generate(
            model=task.student,
            prompts=task.prompts,
            output=rollouts,
            max_response_tokens=task.tokens,
            samples_per_prompt=-(-wanted // prompts),
            batch_size=config.batch_rollouts,
            seed=config.seed,
        )
    with clock.on("scoring"):
        lopd_store.build(teacher=task.teacher, rollouts=rollouts, output=artifact, workers=1)
    with clock.on("updating"):
        output = lopd_train.train(
            artifact=artifact,
            student=task.student,
            output=scratch / "offline",
            config=config,
            overrides=[gate.ALLOW_UNKNOWN, gate.ALLOW_INCONSISTENT],
        ).output
    return student.load(output, config)


def judge(judged: Student, teacher: Student, task: Task) -> str:
    """KL(student || teacher) in nats per token, along new rollouts of the student, with its interval."""
    prompts = prompt_ids(task.held_out, judged)
    chosen = [prompts[number % len(prompts)] for number in range(JUDGED)]
    sums, lengths = [], []
    for record in sample(judged, chosen, range(JUDGED), task, seed=JUDGE_SEED):
        batch = collate([record], judged.device)
        with torch.inference_mode():
            q, p = (
                torch.log_softmax(model.split.logits(model.states(batch)).double(), dim=-1)
                for model in (judged, teacher)
            )
            sums.append(float((q.exp() * (q - p)).sum()))
        lengths.append(record.positions)
    mean = sum(sums) / sum(lengths)
    error = np.linalg.norm(np.array(sums) - mean * np.array(lengths)) / sum(lengths)
    return f"{mean:.3f} ± {1.96 * error:.3f}"


def sample(model: Student, prompts: Sequence[Ids], streams: range, task: Task, *, seed: int) -> list[Record]:
    """One response to each prompt from the model as it is now, with its own log-probs as the reference's."""
    model.model.eval()
    sampling = Sampling(temperature=1.0, top_p=1.0, max_response_tokens=task.tokens, samples_per_prompt=1, seed=seed)
    stop_ids = models.stop_token_ids(model.model.generation_config, model.tokenizer)
    sampler = TransformersSampler(model.model, sampling, stop_ids, identify(task.student).vocab_size)
    responses = sampler.sample([*prompts], streams, lambda _: None)
    return [
        Record(
            row=row,
            token_ids=np.concatenate([prompt, response.ids]),
            prompt_length=len(prompt),
            loss_mask=np.ones(len(response.ids), np.bool_),
            reference_logprobs=response.logprobs,
        )
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
    ]


@torch.inference_mode()
def score(teacher: Student, record: Record) -> npt.NDArray[np.float32]:
    """The teacher's log-probs of the response."""
    found: list[torch.Tensor] = []

    def keep(predicted: Predictions, _: Batch) -> Sums:
        found.append(predicted.sampled)
        return {}

    batch = collate([record], teacher.device)
    teacher.sums(teacher.states(batch), batch, keep)
    return torch.cat(found).cpu().numpy()


def prompt_ids(prompts: Path, model: Student) -> list[Ids]:
    """The prompts as the model's tokenizer has them."""
    return [prompt.ids for prompt in read_prompts(prompts, model.tokenizer)]


def taught(cache: Path) -> Path:
    """The teacher's first layers after SFT on what the teacher wrote, as in the demo."""
    path = cache / "taught"
    if not path.is_dir():
        data, base = relatives.own_text(cache), relatives.truncated(cache)
        say("sft on what the teacher wrote")
        config = replace(
            lopd_train.SFT,
            steps=20,
            learning_rate=2e-4,
            warmup_steps=2,
            batch_rollouts=8,
            eval_fraction=0,
            device="cpu",
        )
        lopd_train.train_sft(model=base, data=data, output=path, config=config)
    return path


def function_headers(directory: Path) -> Path:
    """HumanEval's shortest functions, to be completed."""
    return write_prompts(directory / "prompts.jsonl", relatives.problems()[:80])


def split(prompts: Path, directory: Path) -> tuple[Path, Path]:
    """The prompts to train on, and the last fifth of them, which is held out."""
    lines = prompts.read_text(encoding="utf-8").splitlines(keepends=True)
    border = len(lines) - max(1, len(lines) // 5)
    paths = directory / "trained-on.jsonl", directory / "held-out.jsonl"
    for path, some in zip(paths, (lines[:border], lines[border:]), strict=True):
        path.write_text("".join(some), encoding="utf-8")
    return paths


def own_prompts(directory: Path) -> Path:
    """Small functions to write."""
    ask = [{"prompt": f"Write a Python function that adds {number} to its argument."} for number in range(8)]
    return write_prompts(directory / "prompts.jsonl", ask)


def small_task(directory: Path, config: TrainConfig) -> Task:
    """A teacher and a student of no size."""
    files = models.find(packaged(*MODEL))
    for seed, name in enumerate(("teacher", "student")):
        with models.without_bars():
            shrunk(models.load_config(files), seed=seed).save_pretrained(directory / name)
        models.load_tokenizer(files).save_pretrained(directory / name)
    prompts, held_out = split(own_prompts(directory), directory)
    return Task(
        who="Models of no size",
        teacher=directory / "teacher",
        student=directory / "student",
        prompts=prompts,
        held_out=held_out,
        tokens=8,
        runs=2,
        config=config,
    )


if __name__ == "__main__":
    main()
