"""`lopd-store generate`, `plan`, `build` and `merge`: from prompts to an artifact."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from functools import partial
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
from .options import (
    RUNNING,
    SAMPLING,
    STORED,
    DeviceOption,
    Dtype,
    DtypeOption,
    Json,
    ModelOption,
    OnBadRollout,
    choices,
)

app = typer.Typer()


class Engine(StrEnum):
    """What runs the teacher."""

    transformers = "transformers"
    vllm = "vllm"
    http = "http"


class SamplingEngine(StrEnum):
    """What runs the policy."""

    transformers = "transformers"
    vllm = "vllm"


@app.command()
def generate(
    model: ModelOption,
    prompts: Annotated[Path, typer.Option(metavar="FILE", help="JSONL, JSON or Parquet with `prompt` or `messages`.")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="The rollouts to write, NAME.parquet.")],
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Use only the first prompts.")] = None,
    n: Annotated[
        int, typer.Option("--n", metavar="N", min=1, help="Responses per prompt.", rich_help_panel=SAMPLING)
    ] = 1,
    temperature: Annotated[
        float, typer.Option(metavar="T", help="1 is the model itself; 0 is greedy.", rich_help_panel=SAMPLING)
    ] = 1.0,
    top_p: Annotated[
        float, typer.Option(metavar="P", help="Draw from this much of the mass.", rich_help_panel=SAMPLING)
    ] = 1.0,
    max_response_tokens: Annotated[
        int, typer.Option(metavar="N", help="Stop a response here.", rich_help_panel=SAMPLING)
    ] = 512,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="End a response with the token that completes this; may be repeated.",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the random numbers.", rich_help_panel=SAMPLING)] = 0,
    engine: Annotated[
        SamplingEngine, typer.Option(metavar="ENGINE", help=choices(SamplingEngine), rich_help_panel=RUNNING)
    ] = SamplingEngine.transformers,
    batch_size: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Responses sampled at a time; 16, or 1024 with vllm.", rich_help_panel=RUNNING
        ),
    ] = None,
    dtype: DtypeOption = Dtype.float32,
    device: DeviceOption = None,
    tensor_parallel_size: Annotated[
        int, typer.Option(metavar="N", min=1, help="GPUs that vllm splits the model over.", rich_help_panel=RUNNING)
    ] = 1,
    json: Json = False,
) -> None:
    """Sample SFT data with the teacher, or rollouts with the student."""
    with console.libraries_on_stderr(), console.progress("generate", "responses") as meter:
        result = lopd_store.generate(
            model=model,
            prompts=prompts,
            output=output,
            temperature=temperature,
            top_p=top_p,
            max_response_tokens=max_response_tokens,
            samples_per_prompt=n,
            seed=seed,
            stop=stop or (),
            engine=engine.value,
            batch_size=batch_size,
            limit=limit,
            dtype=dtype.value,
            device=device,
            tensor_parallel_size=tensor_parallel_size,
            on_progress=lambda done, total, tokens: meter.update(done, total, f"{tokens:,} tokens"),
        )
    if json:
        console.answer({**vars(result), "output": str(result.output)})
        return
    console.say(
        f"{result.output}: {result.rollouts:,} rollouts, {result.tokens:,} response tokens, "
        f"{result.stopped:,} ended with a stop token"
    )


@app.command()
def plan(
    teacher: Annotated[str, typer.Option(metavar="MODEL", help="As for `build`.")],
    rollouts: Annotated[Path, typer.Option(metavar="FILE", help="As for `build`.")],
    domain: Annotated[str | None, typer.Option(metavar="NAME", help="As for `build`.")] = None,
    probe: Annotated[int, typer.Option(metavar="N", min=2, help="Rollouts to score, spread over the file.")] = 32,
    reference: Annotated[str | None, typer.Option(metavar="MODEL", help="As for `build`.")] = None,
    k_max: Annotated[int, typer.Option(metavar="K", help="As for `build`; others are shown beside it.")] = 64,
    coverage: Annotated[float, typer.Option(metavar="P", help="As for `build`.")] = 0.99,
    exact: Annotated[bool, typer.Option("--exact", help="As for `build`.")] = False,
    no_text: Annotated[bool, typer.Option("--no-text", help="As for `build`.")] = False,
    engine: Annotated[Engine, typer.Option(metavar="ENGINE", help="As for `build`.")] = Engine.transformers,
    server: Annotated[str | None, typer.Option(metavar="URL", help="As for `build`.")] = None,
    reference_server: Annotated[str | None, typer.Option(metavar="URL", help="As for `build`.")] = None,
    dtype: Annotated[Dtype, typer.Option(metavar="DTYPE", help="As for `build`.")] = Dtype.float32,
    device: Annotated[str | None, typer.Option(metavar="DEVICE", help="As for `build`.")] = None,
    threads: Annotated[int, typer.Option(metavar="N", min=1, help="As for `build`.")] = 1,
    tensor_parallel_size: Annotated[int, typer.Option(metavar="N", min=1, help="As for `build`.")] = 1,
    batch_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="As for `build`.")] = 4096,
    on_bad_rollout: Annotated[
        OnBadRollout, typer.Option(metavar="fail|skip", help="As for `build`.")
    ] = OnBadRollout.skip,
    json: Json = False,
) -> None:
    """Say from a few rollouts what a build will cost and give: hours, bytes, mass for each k."""
    with console.progress("read", "rollouts", at_once=False) as surveyed:
        found = lopd_store.estimate(
            teacher=teacher,
            rollouts=rollouts,
            domain=domain,
            probe=probe,
            reference=reference,
            k_max=k_max,
            coverage=coverage,
            exact=exact,
            text=not no_text,
            engine=engine.value,
            server=server,
            reference_server=reference_server,
            dtype=dtype.value,
            device=device,
            threads=threads,
            tensor_parallel_size=tensor_parallel_size,
            batch_tokens=batch_tokens,
            on_bad_rollout=on_bad_rollout.value,
            on_surveyed=surveyed.update,
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


@app.command()
def build(
    teacher: ModelOption,
    rollouts: Annotated[Path, typer.Option(metavar="FILE", help="The policy's rollouts, NAME.parquet.")],
    output: Annotated[str, typer.Option(metavar="DIR", help="The artifact to make, or s3://bucket/name.")],
    sft: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="SFT data, checkpoint or record, where the rollouts carry none."),
    ] = None,
    sft_data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The SFT data, to audit under the teacher."),
    ] = None,
    domain: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Name of what the rollouts are of."),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The policy that sampled the rollouts: audit them, keep its top-k.",
            rich_help_panel=STORED,
        ),
    ] = None,
    k_max: Annotated[
        int, typer.Option(metavar="K", help="At most this many ids per position.", rich_help_panel=STORED)
    ] = 64,
    k_min: Annotated[int, typer.Option(metavar="K", help="At least this many.", rich_help_panel=STORED)] = 1,
    coverage: Annotated[
        float,
        typer.Option(metavar="P", help="Stop at this mass; 1 keeps k-max.", rich_help_panel=STORED),
    ] = 0.99,
    exact: Annotated[
        bool, typer.Option("--exact", help="Keep float32 log-probs, unrounded.", rich_help_panel=STORED)
    ] = False,
    no_text: Annotated[
        bool, typer.Option("--no-text", help="Keep token ids only, no text.", rich_help_panel=STORED)
    ] = False,
    engine: Annotated[
        Engine, typer.Option(metavar="ENGINE", help=choices(Engine), rich_help_panel=RUNNING)
    ] = Engine.transformers,
    server: Annotated[
        str | None,
        typer.Option(metavar="URL", help="A vLLM server, for the engine http.", rich_help_panel=RUNNING),
    ] = None,
    reference_server: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Another, for the reference policy.", rich_help_panel=RUNNING),
    ] = None,
    trust_server: Annotated[
        bool,
        typer.Option("--trust-server", help="Take its log-probs on trust.", rich_help_panel=RUNNING),
    ] = False,
    max_noise: Annotated[
        float | None,
        typer.Option(
            metavar="NATS",
            help="Most that other batches may change a log-prob: 0.01 in float32, else 1.",
            rich_help_panel=RUNNING,
        ),
    ] = None,
    dtype: DtypeOption = Dtype.float32,
    device: DeviceOption = None,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Processes; by default one per GPU or processor.", rich_help_panel=RUNNING
        ),
    ] = None,
    threads: Annotated[
        int, typer.Option(metavar="N", min=1, help="CPU threads of each worker.", rich_help_panel=RUNNING)
    ] = 1,
    tensor_parallel_size: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="GPUs of each worker.", rich_help_panel=RUNNING),
    ] = 1,
    batch_tokens: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="Tokens per forward pass, padded.", rich_help_panel=RUNNING),
    ] = 4096,
    part_positions: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Positions per part; by default up to 2^20.", rich_help_panel=RUNNING),
    ] = None,
    on_bad_rollout: Annotated[
        OnBadRollout,
        typer.Option(metavar="fail|skip", help="A bad rollout: stop, or leave it out.", rich_help_panel=STORED),
    ] = OnBadRollout.fail,
    part: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Score every N-th part only, for `merge`.", rich_help_panel=RUNNING),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="A Ray cluster; `local` starts one.", rich_help_panel=RUNNING),
    ] = None,
    json: Json = False,
) -> None:
    """Score rollouts with the teacher and seal them as an artifact."""
    with (
        console.libraries_on_stderr(),
        console.progress("read", "rollouts", at_once=False) as surveyed,
        console.progress("audit", "positions", at_once=False) as audited,
        console.progress("build", "positions", at_once=False) as meter,
    ):
        whole = lopd_store.publish if is_remote(output) else lopd_store.build
        run = partial(whole) if part is None else partial(lopd_store.build_share, part)
        built = run(
            teacher=teacher,
            rollouts=rollouts,
            output=output,
            sft=sft,
            sft_data=sft_data,
            domain=domain,
            reference=reference,
            text=not no_text,
            exact=exact,
            k_min=k_min,
            k_max=k_max,
            coverage=coverage,
            engine=engine.value,
            server=server,
            reference_server=reference_server,
            trust_server=trust_server,
            max_noise=max_noise,
            dtype=dtype.value,
            device=device,
            workers=workers,
            threads=threads,
            tensor_parallel_size=tensor_parallel_size,
            batch_tokens=batch_tokens,
            part_positions=part_positions,
            ray=ray,
            on_bad_rollout=on_bad_rollout.value,
            on_progress=partial(_show_progress, meter),
            on_surveyed=surveyed.update,
            on_audited=audited.update,
            on_note=console.note,
        )
    _answer(built, json)


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
        _answer(lopd_store.merge(*(sources or []), output=output), json)
    elif sources:
        raise InputError(f"parts for `{output}` are there already", hint="leave the directories out")
    else:
        _answer(lopd_store.merge_remote(output), json)


def _show_progress(meter: console.Meter, progress: Progress) -> None:
    """Positions with their rate and an estimate, and everything else that is counted."""
    words = f"{progress.rollouts:,} of {progress.all_rollouts:,} rollouts, {progress.bytes:,} bytes"
    meter.update(progress.positions, progress.all_positions, words, also=(progress.tokens, "tokens"))


def _answer(built: Artifact | ScoredShare | Published, json: bool) -> None:
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
