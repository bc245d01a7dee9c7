"""The trainer in numbers: an opd step beside an sft step, the head beside full logits, and a bare loop beside both.

    python benchmarks/train.py          # all of it, in about eight minutes; `make bench-train`
    python benchmarks/train.py --small  # a model of no size, in a minute; keeps no results

It prints a table and writes it into RESULTS.md. Everything runs on the CPU, in processes of its own, so that peaks of
memory are those of whole processes.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path

import heads
import steps
import torch
from measure import in_new_process, machine
from report import Row, table, table_of_rows, write_section
from steps import Materials, Steps

from lopd_train import TrainConfig

HERE = Path(__file__).parent
SFT, SAMPLED, REVERSE_KL, BARE = "sft", "opd, sampled", "opd, reverse_kl", "bare transformers loop"
CASES: dict[str, Callable[[Materials], Steps]] = {
    SFT: partial(steps.ours, "sft", "sampled"),
    SAMPLED: partial(steps.ours, "opd", "sampled"),
    REVERSE_KL: partial(steps.ours, "opd", "reverse_kl"),
    BARE: steps.bare,
}


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is measured."""

    head: tuple[int, int, int, int]  # positions, vocabulary, width, k
    rounds: int  # in which every case runs once
    config: TrainConfig


FULL = Scale(
    head=(8192, 151_936, 576, 16),
    rounds=3,
    config=TrainConfig(steps=4, batch_rollouts=4, micro_batch_tokens=1024, eval_fraction=0, device="cpu"),
)
SMALL = Scale(
    head=(1024, 4096, 8, 4),
    rounds=1,
    config=TrainConfig(steps=3, batch_rollouts=2, micro_batch_tokens=64, eval_fraction=0, device="cpu"),
)


def main() -> None:
    """Measure, print, and keep the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, default=HERE / ".cache", help="where model and rollouts are kept")
    parser.add_argument("--results", type=Path, default=HERE / "RESULTS.md", help="the file whose section is rewritten")
    parser.add_argument("--positions", type=int, help="of the head; by default 8,192, or what has room")
    parser.add_argument("--small", action="store_true", help="a model of no size, in a minute; keeps no results")
    options = parser.parse_args()
    scale = SMALL if options.small else FULL
    size = (options.positions or heads.fitting(*scale.head[:2]), *scale.head[1:])
    with tempfile.TemporaryDirectory() if options.small else nullcontext(options.cache / "train-steps") as directory:
        Path(directory).mkdir(parents=True, exist_ok=True)
        materials = steps.make_materials(Path(directory), scale.config, tiny=options.small)
        found = measure_steps(materials, scale.rounds)
    rows = [*compare_steps(found), *measure_head(size, scale.rounds)]
    text = "\n\n".join([introduction(scale, size, found), table_of_rows(rows), table_of_steps(found)])
    print(text)
    if not options.small:
        write_section(options.results, "Training", text)


def measure_steps(materials: Materials, rounds: int) -> dict[str, tuple[Steps, float]]:
    """Steps and peak memory of every case; they take turns, so that a slow moment of the machine meets them all."""
    runs: dict[str, list[tuple[Steps, float]]] = {name: [] for name in CASES}
    for _ in range(rounds):
        for name, run in CASES.items():
            runs[name].append(in_new_process(run, materials))
    return {
        name: (
            Steps(
                seconds=statistics.median(taken.seconds for taken, _ in some),
                positions=some[0][0].positions,
                outside=statistics.median(taken.outside for taken, _ in some),
            ),
            statistics.median(peak for _, peak in some),
        )
        for name, some in runs.items()
    }


def compare_steps(found: dict[str, tuple[Steps, float]]) -> Iterator[Row]:
    """The cases beside each other and their targets."""
    (sft, sft_peak), (bare, _) = found[SFT], found[BARE]
    for name in (SAMPLED, REVERSE_KL):
        taken, peak = found[name]
        yield Row(
            what=f"step of {name}", value=taken.seconds / sft.seconds, unit="of sft's time", target=1.1, at_most=True
        )
        yield Row(what=f"peak memory of {name}", value=peak / sft_peak, unit="of sft's", target=1.05, at_most=True)
    yield Row(what="tokens/s of sft", value=bare.seconds / sft.seconds, unit="of a bare loop's", target=0.95)
    waiting = 100 * max(found[name][0].outside for name in (SFT, SAMPLED, REVERSE_KL))
    yield Row(what="time outside of steps: data, metrics", value=waiting, unit="%", target=1, at_most=True)


def measure_head(size: tuple[int, ...], rounds: int) -> Iterator[Row]:
    """Reverse KL over top-k and tail with its gradients, in chunks beside all logits at once, taking turns."""
    runs = [{how: in_new_process(heads.once, how, *size) for how in ("chunked", "full")} for _ in range(rounds)]
    _, base = in_new_process(heads.nothing, *size)
    chunked, full = (min(run[how][0] for run in runs) for how in ("chunked", "full"))
    peaks = {how: max(run[how][1] for run in runs) for how in ("chunked", "full")}
    yield Row(what="chunked head", value=chunked / full, unit="of full logits' time", target=1, at_most=True)
    share = peaks["chunked"] / peaks["full"]
    yield Row(what="peak memory of the chunked head", value=share, unit="of full logits'", target=0.25, at_most=True)
    added = [(peaks[how] - base) / 1e3 for how in ("chunked", "full")]
    yield Row(what="beyond inputs and weights: chunked", value=added[0], unit="GB")
    yield Row(what="beyond inputs and weights: full logits", value=added[1], unit="GB")


def table_of_steps(found: dict[str, tuple[Steps, float]]) -> str:
    """What was measured before it was divided."""
    lines = [
        [name, f"{taken.seconds:.2f}", f"{taken.positions / taken.seconds:,.0f}", f"{peak:,.0f}"]
        for name, (taken, peak) in found.items()
    ]
    return table(["case", "seconds/step", "positions/s", "peak MB"], lines)


def introduction(scale: Scale, size: tuple[int, ...], found: dict[str, tuple[Steps, float]]) -> str:
    """When, where, with what and on what."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("lopd", "torch", "transformers"))
    positions, vocabulary, width, k = size
    less = f" (of {scale.head[0]:,}: so many fit or were asked for)" if positions < scale.head[0] else ""
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, {machine()}, {torch.get_num_threads()} threads; Python "
        f"{platform.python_version()}, {versions}. Steps: SmolLM2-135M-Instruct in float32, "
        f"{scale.config.batch_rollouts} of its own rollouts with {found[SFT][0].positions:,} positions in the loss, "
        f"the same in every step; medians of {scale.rounds} runs of {scale.config.steps} steps, the first not "
        f"counted. Head: {positions:,} positions{less}, vocabulary {vocabulary:,}, width {width:,}, k = {k}, "
        f"reverse KL with its gradients, the best of {scale.rounds}."
    )


if __name__ == "__main__":
    main()
