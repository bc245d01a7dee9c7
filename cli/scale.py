"""`lopd-store plan` and `merge`: before and after a build by many; and what `build` itself shows."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

import lopd_store
from lopd_store.builder import Published, ScoredShare
from lopd_store.errors import InputError
from lopd_store.handout import Progress
from lopd_store.reader import Artifact
from lopd_store.remote import is_remote

from . import console, facts

app = typer.Typer()

Json = Annotated[bool, typer.Option("--json", help="Answer in JSON.")]


@app.command()
def merge(
    output: Annotated[str, typer.Option(metavar="DIR", help="The artifact to make; also an address, s3://….")],
    sources: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[DIR.building]...", help="Where other machines have left parts, copied here."),
    ] = None,
    json: Json = False,
) -> None:
    """Seal the parts that `build --part I/N` jobs have scored as one artifact."""
    if not is_remote(output):
        answer(lopd_store.merge(*(sources or []), output=output), json)
    elif sources:
        raise InputError(f"parts for `{output}` are there already", hint="leave the directories out")
    else:
        answer(lopd_store.merge_remote(output), json)


@app.command()
def plan(
    teacher: Annotated[str, typer.Option(metavar="MODEL", help="As for `build`.")],
    rollouts: Annotated[Path, typer.Option(metavar="FILE", help="As for `build`.")],
    probe: Annotated[int, typer.Option(metavar="N", min=2, help="Rollouts to score, spread over the file.")] = 32,
    reference: Annotated[str | None, typer.Option(metavar="MODEL", help="As for `build`.")] = None,
    k_max: Annotated[int, typer.Option(metavar="K", help="As for `build`; others are shown beside it.")] = 64,
    coverage: Annotated[float, typer.Option(metavar="P", help="As for `build`.")] = 0.99,
    exact: Annotated[bool, typer.Option("--exact", help="As for `build`.")] = False,
    no_text: Annotated[bool, typer.Option("--no-text", help="As for `build`.")] = False,
    engine: Annotated[str, typer.Option(metavar="ENGINE", help="As for `build`.")] = "transformers",
    dtype: Annotated[str, typer.Option(metavar="DTYPE", help="As for `build`.")] = "float32",
    device: Annotated[str | None, typer.Option(metavar="DEVICE", help="As for `build`.")] = None,
    threads: Annotated[int, typer.Option(metavar="N", min=1, help="As for `build`.")] = 1,
    batch_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="As for `build`.")] = 4096,
    on_bad_rollout: Annotated[str, typer.Option(metavar="fail|skip", help="As for `build`.")] = "skip",
    json: Json = False,
) -> None:
    """Say from a few rollouts what a build will cost and give: hours, bytes, mass for each k."""
    found = lopd_store.estimate(
        teacher=teacher,
        rollouts=rollouts,
        probe=probe,
        reference=reference,
        k_max=k_max,
        coverage=coverage,
        exact=exact,
        text=not no_text,
        engine=engine,
        dtype=dtype,
        device=device,
        threads=threads,
        batch_tokens=batch_tokens,
        on_bad_rollout=on_bad_rollout,
    )
    if json:
        console.answer(asdict(found))
        return
    bad = f", {found.skipped:,} more cannot be scored" if found.skipped else ""
    rates = f"{found.tokens_per_second:,.0f} tokens/s, {found.positions_per_second:,.0f} positions/s"
    console.table(
        [
            ("rollouts", f"{found.rollouts:,}{bad}"),
            ("positions", f"{found.positions:,} of {found.tokens:,} tokens, in {found.parts:,} parts"),
            ("probed", f"{found.probed_rollouts:,} rollouts, {found.probed_positions:,} positions"),
            ("one worker", f"{found.hours:,.2f} hours: {rates}"),
        ]
    )
    console.say("")
    console.table(
        [
            (
                choice.k_max,
                f"{choice.mean_k:.1f}",
                f"{choice.mass:.3%}",
                f"{choice.reached:.1%}",
                f"{choice.bytes_per_position:.1f}",
                f"{choice.bytes / 1e6:,.1f} MB",
            )
            for choice in found.choices
        ],
        header=("k-max", "mean k", "mass", f"reach {found.coverage:g}", "bytes/position", "on disk and on the Hub"),
    )


def show_progress(meter: console.Meter, progress: Progress) -> None:
    """Positions with their rate and an estimate, and everything else that is counted."""
    words = f"{progress.rollouts:,} of {progress.all_rollouts:,} rollouts, {progress.bytes:,} bytes"
    meter.update(progress.positions, progress.all_positions, words, also=(progress.tokens, "tokens"))


def answer(built: Artifact | ScoredShare | Published, json: bool) -> None:
    """Say what was built: an artifact here or elsewhere, or the parts of one job."""
    if isinstance(built, Artifact):
        facts.answer(built, json)
    elif isinstance(built, Published):
        if json:
            console.answer({**vars(built), "counts": built.counts.to_json()})
        else:
            counts = f"{built.counts.rollouts:,} rollouts, {built.counts.positions:,} positions"
            console.say(f"{built.address}: {counts}\n{built.fingerprint}")
    elif json:
        console.answer({"building": str(built.building), "parts": built.parts, "missing": built.missing})
    else:
        left = f"{len(built.missing)} of other jobs are missing" if built.missing else "no part is missing"
        console.say(f"{built.building}: {len(built.parts)} parts scored; {left}")
        artifact = built.building.with_name(built.building.stem)
        console.note(f"when all are there: lopd-store merge --output {artifact}")
