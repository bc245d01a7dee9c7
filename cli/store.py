"""`lopd-store`: the commands, but for `record`, and for those of sign.py, share.py and scale.py."""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

import lopd_store
from lopd_store import sources
from lopd_store.errors import InputError
from lopd_store.remote import is_remote

from . import console, facts, record, scale, share, sign
from .lineage import show as show_lineage
from .share import OnlyOption, PartsOption, SignedByOption, parse_parts

app = typer.Typer(
    help="Teacher log-probs as a training artifact: make it, check it, share it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(record.app, name="record")
app.add_typer(sign.app)
app.add_typer(share.app)
app.add_typer(scale.app)


class Dtype(StrEnum):
    """Precision in which a model runs."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class OnBadRollout(StrEnum):
    """What to do with a rollout that cannot be scored."""

    fail = "fail"
    skip = "skip"


class Engine(StrEnum):
    """What runs the teacher."""

    transformers = "transformers"
    vllm = "vllm"
    http = "http"


def _choices(kind: type[StrEnum]) -> str:
    return ", ".join(kind)


SAMPLING, STORED, RUNNING = "Sampling", "What is stored", "How it runs"  # headings in the help

Json = Annotated[bool, typer.Option("--json", help="Answer in JSON.")]
_MODEL_HELP = "A directory of safetensors, a GGUF file, a PEFT adapter, or a Hub id."
ModelOption = Annotated[str, typer.Option(metavar="MODEL", help=_MODEL_HELP)]
ArtifactArgument = Annotated[
    str, typer.Argument(metavar="DIR", help="The artifact's directory, or its URL: hf://OWNER/NAME@TAG, s3://…")
]
DtypeOption = Annotated[Dtype, typer.Option(metavar="DTYPE", help=_choices(Dtype), rich_help_panel=RUNNING)]
DeviceOption = Annotated[
    str | None,
    typer.Option(metavar="DEVICE", help="cpu or cuda; by default cuda where there is one.", rich_help_panel=RUNNING),
]


@app.callback()
def lopd_store_command(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=console.show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Take the options that go before a command."""


@app.command()
def generate(
    model: ModelOption,
    prompts: Annotated[Path, typer.Option(metavar="FILE", help="JSONL, JSON or Parquet with `prompt` or `messages`.")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="The rollouts to write, NAME.parquet.")],
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Use only the first prompts.")] = None,
    n: Annotated[int, typer.Option("--n", metavar="N", help="Responses per prompt.", rich_help_panel=SAMPLING)] = 1,
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
    batch_size: Annotated[
        int, typer.Option(metavar="N", min=1, help="Responses sampled at a time.", rich_help_panel=RUNNING)
    ] = 16,
    dtype: DtypeOption = Dtype.float32,
    device: DeviceOption = None,
    json: Json = False,
) -> None:
    """Sample SFT data with the teacher, or rollouts with the student."""
    with console.progress("generate", "responses") as meter:
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
            batch_size=batch_size,
            limit=limit,
            dtype=dtype.value,
            device=device,
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
def build(
    teacher: ModelOption,
    rollouts: Annotated[Path, typer.Option(metavar="FILE", help="Rollouts of the reference policy, NAME.parquet.")],
    output: Annotated[str, typer.Option(metavar="DIR", help="The artifact to make, or s3://bucket/name.")],
    sft: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="SFT data, checkpoint or record, where the rollouts carry none."),
    ] = None,
    sft_data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The SFT data: audit it under the teacher, and keep what was found."),
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
        typer.Option(metavar="P", help="Stop once this much mass is stored; 1 keeps k-max.", rich_help_panel=STORED),
    ] = 0.99,
    exact: Annotated[
        bool, typer.Option("--exact", help="Keep float32 log-probs, unrounded.", rich_help_panel=STORED)
    ] = False,
    no_text: Annotated[
        bool, typer.Option("--no-text", help="Keep token ids only, no text.", rich_help_panel=STORED)
    ] = False,
    engine: Annotated[
        Engine, typer.Option(metavar="ENGINE", help=_choices(Engine), rich_help_panel=RUNNING)
    ] = Engine.transformers,
    server: Annotated[
        str | None,
        typer.Option(metavar="URL", help="A vLLM server, for the engine http.", rich_help_panel=RUNNING),
    ] = None,
    trust_server: Annotated[
        bool,
        typer.Option(
            "--trust-server", help="Do not compare its log-probs with the teacher's.", rich_help_panel=RUNNING
        ),
    ] = False,
    max_noise: Annotated[
        float | None,
        typer.Option(
            metavar="NATS",
            help="Refuse an engine whose log-probs change by more in other batches; 0.01 in float32, else 1.",
            rich_help_panel=RUNNING,
        ),
    ] = None,
    dtype: DtypeOption = Dtype.float32,
    device: DeviceOption = None,
    workers: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Processes; by default one per processor.", rich_help_panel=RUNNING),
    ] = None,
    threads: Annotated[
        int, typer.Option(metavar="N", min=1, help="CPU threads of each worker.", rich_help_panel=RUNNING)
    ] = 1,
    batch_tokens: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="Tokens per forward pass, padding included.", rich_help_panel=RUNNING),
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
            reference=reference,
            text=not no_text,
            exact=exact,
            k_min=k_min,
            k_max=k_max,
            coverage=coverage,
            engine=engine.value,
            server=server,
            trust_server=trust_server,
            max_noise=max_noise,
            dtype=dtype.value,
            device=device,
            workers=workers,
            threads=threads,
            batch_tokens=batch_tokens,
            part_positions=part_positions,
            ray=ray,
            on_bad_rollout=on_bad_rollout.value,
            on_progress=partial(scale.show_progress, meter),
            on_audited=audited.update,
            on_note=console.note,
        )
    scale.answer(built, json)


@app.command()
def verify(
    artifact: ArtifactArgument,
    quick: Annotated[bool, typer.Option("--quick", help="Sizes and xxh3 only; of a URL what is listed there.")] = False,
    student: Annotated[str | None, typer.Option(metavar="MODEL", help="Also ask the gate about this student.")] = None,
    signed_by: SignedByOption = None,
    rescore: Annotated[int, typer.Option(metavar="N", min=0, help="Also score this many random rollouts again.")] = 0,
    sft_data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The SFT data: also audit it under the teacher again.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The teacher, for --rescore and --sft-data.")
    ] = None,
    json: Json = False,
) -> None:
    """Check every byte, every structure and every value of an artifact."""
    identity = None
    if student is not None:
        with console.progress("identity", "bytes") as meter:
            identity = lopd_store.identify(student, on_bytes=meter.update)
    with (
        console.progress("verify", "bytes") as meter,
        console.progress("score again", "rollouts", at_once=False) as again,
        console.progress("audit", "positions", at_once=False) as audited,
    ):
        report = lopd_store.verify(
            artifact,
            quick=quick,
            student=identity,
            signed_by=signed_by,
            rescore=rescore,
            teacher=teacher,
            sft_data=sft_data,
            on_bytes=meter.update,
            on_rollouts=again.update,
            on_audited=audited.update,
        )
    if json:
        console.answer(report.to_json())
    elif report.ok:
        looked = "as it is listed there, no part read, " if sources.is_url(artifact) else "sizes and xxh3 only, "
        depth = (looked if quick else "") + ("a partial copy, " if report.partial else "")
        depth += "" if signed_by is None else f"signed by {signed_by}, "
        if report.rescored is not None:
            depth += f"{len(report.rescored.rollouts)} rollouts scored again, "
        if report.sft_audit is not None:
            depth += f"{report.sft_audit.found.positions:,} positions of SFT data audited again, "
        console.say(f"ok: {artifact}, {report.files} files, {report.bytes:,} bytes, {depth}{report.fingerprint}")
    else:
        for finding in report.findings:
            console.fail(finding.to_error())
    raise typer.Exit(0 if report.ok else 1)


@app.command()
def inspect(
    artifact: ArtifactArgument,
    rollout: Annotated[int | None, typer.Option(metavar="I", help="Show this rollout token by token.")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Whose tokenizer turns ids into text, for --rollout.")
    ] = None,
    lineage: Annotated[
        bool, typer.Option("--lineage", help="Draw the chain from the SFT teacher to an artifact or a checkpoint.")
    ] = False,
    json: Json = False,
) -> None:
    """Show what is in an artifact and where it came from."""
    if lineage:
        if rollout is not None or model is not None:
            raise InputError("`--lineage` goes with neither `--rollout` nor `--model`")
        show_lineage(Path(artifact), json=json)
        return
    if model is not None and rollout is None:
        raise InputError("`--model` goes with `--rollout`", hint=f"lopd-store inspect {artifact} --rollout 0")
    opened = lopd_store.open(artifact)
    if rollout is None:
        facts.answer(opened, json)
        return
    positions = facts.positions(opened, rollout, model)
    if json:
        console.answer({"rollout": rollout, "positions": positions})
        return
    console.table(
        [
            (p["position"], facts.shown(p), f"{p['sampled_logprob']:.3f}", "" if p["loss"] else "no", facts.top(p))
            for p in positions
        ],
        header=("position", "token", "teacher", "loss", "top-5 of the teacher"),
    )


@app.command()
def audit(
    model: ModelOption,
    data: Annotated[Path, typer.Option(metavar="FILE", help="Rollouts or SFT data, NAME.parquet.")],
    temperature: Annotated[
        float | None, typer.Option(metavar="T", help="By default as recorded in the file.", rich_help_panel=SAMPLING)
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(metavar="P", help="By default as recorded in the file.", rich_help_panel=SAMPLING)
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Use only the first rollouts.")] = None,
    positions: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Use about so many positions, spread over the file.")
    ] = None,
    dtype: DtypeOption = Dtype.float32,
    device: DeviceOption = None,
    json: Json = False,
) -> None:
    """Test whether responses were sampled from a model; exit code 1 if not, 3 if there is too little text to tell."""
    with console.progress("audit", "positions") as meter:
        found = lopd_store.audit(
            model=model,
            data=data,
            temperature=temperature,
            top_p=top_p,
            limit=limit,
            positions=positions,
            dtype=dtype.value,
            device=device,
            on_progress=meter.update,
        )
    if json:
        console.answer(found.to_json())
    else:
        overall, (low, high) = found.overall, found.overall.interval
        console.table(
            [
                ("verdict", f"{found.verdict} with samples of {found.model.name}"),
                ("z", f"{overall.z:.2f}  (p {overall.p_value:.2g})"),
                ("effect", f"{overall.effect:+.4f} nat per token  (95 %: {low:+.4f} to {high:+.4f})"),
                ("positions", f"{overall.positions:,}, of which {overall.outside:,} could not have been drawn"),
                ("sampling", f"temperature {found.temperature:g}, top-p {found.top_p:g}"),
            ]
        )
    raise typer.Exit({"consistent": 0, "inconsistent": 1, "too little": 3}[found.verdict])


@app.command()
def subset(
    artifact: ArtifactArgument,
    output: Annotated[Path, typer.Option(metavar="DIR", help="The copy to make.")],
    only: OnlyOption = None,
    parts: PartsOption = None,
    json: Json = False,
) -> None:
    """Copy a part of an artifact, which says that it is partial and can be verified by itself."""
    with console.progress("verify", "bytes") as meter:
        copy = lopd_store.subset(
            artifact,
            output=output,
            only=None if only is None else "sampled",
            parts=parse_parts(parts),
            on_bytes=meter.update,
        )
    facts.answer(copy, json)


@app.command()
def identity(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL_HELP)],
    other: Annotated[str | None, typer.Argument(metavar="[OTHER]", help="Say where this one differs.")] = None,
    json: Json = False,
) -> None:
    """Show the identity of a model; of two, whether they are the same (exit code 0) and where they differ (1)."""
    with console.progress("identity", "bytes") as meter:
        if other is None:
            answer = lopd_store.identify(model, on_bytes=meter.update).to_json()
        else:
            comparison = lopd_store.compare(model, other, on_bytes=meter.update)
            answer = comparison.to_json()
    if json:
        console.answer(answer)
    elif other is None:
        console.table([(name, "none" if value is None else value) for name, value in answer.items()])
    elif comparison.same:
        console.say(f"{model} and {other} are the same model")
    else:
        console.say(f"{model} and {other} differ in {', '.join(comparison.differences)}")
        console.table([(name, words) for name, all_words in comparison.differences.items() for words in all_words])
    if other is not None and not comparison.same:
        raise typer.Exit(1)


def main() -> None:
    """The entry point of `lopd-store`."""
    console.run(app)
