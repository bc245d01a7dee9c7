"""The trainer beside DistillKit's own: forward KL from the same artifact, over the same batches.

    python benchmarks/peers.py --distillkit path/to/DistillKit --python path/to/its/python     # `make bench-peers`
    python benchmarks/peers.py --distillkit … --python … --small    # a model of no size, in a minute; keeps no results

DistillKit reads what `lopd-store export distillkit` makes of the artifact, in an environment of its own: none of its
code is here. Both run on the CPU, in processes of their own that take turns.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import steps
import torch
from measure import in_new_process, machine
from report import Row, table, table_of_rows, write_section
from steps import Materials, Steps

import lopd_store
from lopd_store import gate, models
from lopd_store.rollouts import RolloutsFile, write_rollouts
from lopd_train import TrainConfig

HERE = Path(__file__).parent
OURS, DISTILLKIT = "lopd-train opd, forward_kl", "DistillKit, kl"


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is measured."""

    prompt: int  # tokens
    response: int
    rounds: int
    config: TrainConfig


FULL = Scale(
    prompt=64,
    response=192,
    rounds=3,
    config=TrainConfig(steps=5, batch_rollouts=8, micro_batch_tokens=1024, eval_fraction=0, device="cpu"),
)
SMALL = Scale(
    prompt=8,
    response=24,
    rounds=1,
    config=TrainConfig(steps=3, batch_rollouts=2, micro_batch_tokens=32, eval_fraction=0, device="cpu"),
)


def main() -> None:
    """Measure, print, and keep the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--distillkit", type=Path, required=True, metavar="PATH", help="a checkout of it")
    parser.add_argument("--python", default=sys.executable, metavar="PATH", help="a Python that has what it wants")
    parser.add_argument("--cache", type=Path, default=HERE / ".cache", help="where model and rollouts are kept")
    parser.add_argument("--results", type=Path, default=HERE / "RESULTS.md", help="the file whose section is rewritten")
    parser.add_argument("--small", action="store_true", help="a model of no size, in a minute; keeps no results")
    options = parser.parse_args()
    scale = SMALL if options.small else FULL
    with tempfile.TemporaryDirectory() if options.small else nullcontext(options.cache / "train") as directory:
        Path(directory).mkdir(parents=True, exist_ok=True)
        materials = steps.make_materials(Path(directory), scale.config, tiny=options.small)
        materials = same_lengths(materials, Path(directory) / "peers", scale)
        runs: dict[str, list[tuple[Steps, float]]] = {OURS: [], DISTILLKIT: []}
        for _ in range(scale.rounds):
            runs[OURS].append(in_new_process(steps.ours, "opd", "forward_kl", materials))
            runs[DISTILLKIT].append(distillkit(materials, scale, options.distillkit.resolve(), options.python))
        wanted = first_losses(materials)
    found = {name: middle(some) for name, some in runs.items()}
    tables = [table_of_rows(compare(found)), table_of_runs(found, wanted)]
    text = "\n\n".join([introduction(scale, options.python), *tables])
    print(text)
    if not options.small:
        write_section(options.results, "Peers", text)


def same_lengths(materials: Materials, directory: Path, scale: Scale) -> Materials:
    """The same tokens as rollouts of one length, which is what DistillKit batches, scored and exported."""
    artifact, export = directory / "artifact", directory / "distillkit"
    if not export.is_dir():
        directory.mkdir(exist_ok=True)
        stream = np.concatenate([rollout.token_ids for rollout in RolloutsFile(materials.rollouts).read()])
        rows = np.resize(stream, (scale.config.batch_rollouts, scale.prompt + scale.response))
        halves = ({"prompt_ids": row[: scale.prompt], "response_ids": row[scale.prompt :]} for row in rows)
        rollouts, teacher = directory / "rollouts.parquet", directory / "teacher"
        write_rollouts(rollouts, [{**half, "finish_reason": "length"} for half in halves], None)
        if not artifact.is_dir():
            save_softer(materials.student, teacher)
            lopd_store.build(teacher=teacher, rollouts=rollouts, output=artifact)
        lopd_store.export(artifact, "distillkit", output=export, overrides=[gate.ALLOW_UNKNOWN])
    return replace(materials, artifact=artifact)


def save_softer(model: Path, path: Path) -> None:
    """The same model with smaller logits, so that there is something to learn."""
    files = models.find(model)
    loaded = models.load_model(files)
    loaded.model.norm.weight.data.mul_(0.8)
    with models.without_bars():
        loaded.save_pretrained(path)
    models.load_tokenizer(files).save_pretrained(path)


def distillkit(materials: Materials, scale: Scale, checkout: Path, python: str) -> tuple[Steps, float]:
    """Steps and peak memory of DistillKit's trainer."""
    config, tokens = scale.config, scale.prompt + scale.response
    rows = config.micro_batch_tokens // tokens  # of a micro-batch, as ours packs them
    job = {
        "distillkit": str(checkout),
        "student": str(materials.student),
        "export": str(materials.artifact.with_name("distillkit")),
        "tokens": tokens,
        "training_args": {
            "max_steps": config.steps,
            "per_device_train_batch_size": rows,
            "gradient_accumulation_steps": config.batch_rollouts // rows,
            "learning_rate": config.learning_rate,
            "adam_beta1": config.betas[0],
            "adam_beta2": config.betas[1],
            "weight_decay": config.weight_decay,
            "max_grad_norm": config.clip_norm,
            "lr_scheduler_type": "constant",
            "optim": "adamw_torch_fused",
            "logging_steps": 1,
            "logging_nan_inf_filter": False,
            "save_strategy": "no",
            "report_to": "none",
            "gradient_checkpointing": False,
            "bf16": False,
            "use_cpu": True,
        },
    }
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "job.json"
        file.write_text(json.dumps(job), encoding="utf-8")
        command = [python, str(HERE / "peer_distillkit.py"), str(file)]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        sys.exit(f"DistillKit's trainer failed:\n{ran.stderr[-4000:]}")
    answer = json.loads(ran.stdout.splitlines()[-1])
    if not math.isfinite(answer["loss"]):
        sys.exit("DistillKit's loss is not a number: what it took to get there is no measure")
    positions = config.batch_rollouts * scale.response
    seconds = statistics.median(answer["seconds"][1:])
    return Steps(seconds=seconds, positions=positions, outside=0.0, loss=answer["loss"]), answer["peak"]


def middle(runs: list[tuple[Steps, float]]) -> tuple[Steps, float]:
    """Medians of several runs."""
    seconds = statistics.median(taken.seconds for taken, _ in runs)
    return replace(runs[0][0], seconds=seconds), statistics.median(peak for _, peak in runs)


def compare(found: dict[str, tuple[Steps, float]]) -> list[Row]:
    """Ours as a share of theirs."""
    (ours, our_peak), (theirs, their_peak) = found[OURS], found[DISTILLKIT]
    return [
        Row(what="tokens/s beside DistillKit", value=theirs.seconds / ours.seconds, unit="of its speed"),
        Row(what="peak memory beside DistillKit", value=our_peak / their_peak, unit="of its memory"),
    ]


def first_losses(materials: Materials) -> dict[str, float]:
    """What the first loss of each trainer should be, in float64 from the artifact and all of the student's logits."""
    artifact, model = lopd_store.open(materials.artifact), models.load_model(models.find(materials.student))
    with_tail, renormalised = [], []
    for number in artifact.rollouts:
        rollout = artifact.rollout(number)
        topk, tokens = rollout.topk, np.concatenate([rollout.prompt_ids, rollout.response_ids]).astype(np.int64)
        assert topk is not None
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens)[None]).logits[0, len(rollout.prompt_ids) - 1 : -1]
        student = logits.double().log_softmax(-1).numpy()[topk.positions, topk.ids]
        teacher, tails = topk.logprobs.astype(np.float64), topk.tail_logprobs.astype(np.float64)
        mass, left = (np.bincount(topk.positions, np.exp(values)) for values in (teacher, student))
        kl = np.bincount(topk.positions, np.exp(teacher) * (teacher - student))
        with_tail.append(kl + np.exp(tails) * (np.maximum(tails, -1e30) - np.log(np.maximum(1 - left, 1e-12))))
        renormalised.append(kl / mass - np.log(mass))
    return {OURS: float(np.mean(with_tail)), DISTILLKIT: float(np.mean(renormalised))}


def table_of_runs(found: dict[str, tuple[Steps, float]], wanted: dict[str, float]) -> str:
    """What was measured before it was divided."""
    lines = [
        [
            *(name, f"{run.seconds:.2f}", f"{run.positions / run.seconds:,.0f}", f"{peak:,.0f}"),
            *(f"{run.loss:.5f}", f"{wanted[name]:.5f}"),
        ]
        for name, (run, peak) in found.items()
    ]
    return table(["trainer", "seconds/step", "positions/s", "peak MB", "first loss, nat", "in float64"], lines)


def introduction(scale: Scale, python: str) -> str:
    """When, where, with what and on what."""
    ask = "from importlib.metadata import version; print(*map(version, ['trl', 'transformers', 'torch']))"
    peer = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.split()
    ours = ", ".join(f"{name} {version(name)}" for name in ("lopd", "torch", "transformers"))
    theirs = ", ".join(f"{name} {number}" for name, number in zip(("trl", "transformers", "torch"), peer, strict=True))
    config = scale.config
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, {machine()}, {torch.get_num_threads()} threads; Python "
        f"{platform.python_version()}, {ours}; DistillKit with {theirs}. SmolLM2-135M-Instruct in float32, "
        f"{config.batch_rollouts} rollouts of {scale.prompt} and {scale.response} tokens in each step, micro-batches "
        f"of {config.micro_batch_tokens:,} tokens; medians of {scale.rounds} runs of {config.steps} steps, the first "
        "not counted. Forward KL over the stored entries: ours with one more term for the tail, DistillKit's with the "
        "entries renormalised, so the losses differ. Peaks are of whole processes."
    )


if __name__ == "__main__":
    main()
