"""`lopd-train`: sft and opd. Each takes one option per setting of `TrainConfig`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

import lopd_train
from lopd_train import OPD, SFT, OnProgress, Progress, RunResult, TrainConfig, measures
from lopd_train.config import help_of
from lopd_train.world import from_environment

from . import console, settings
from .options import AllowInconsistentOption, AllowUnknownOption, overrides, parse_domains
from .track import OnMetrics, Tracker, tracking

app = typer.Typer(
    help="Training on teacher log-probs: SFT first, then offline on-policy distillation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ModelOption = Annotated[
    str, typer.Option(metavar="MODEL", help="A directory of safetensors, a GGUF file, or a Hub id.")
]
OutputOption = Annotated[Path, typer.Option(metavar="DIR", help="The model to make, as `save_pretrained` writes it.")]
_WATCHED = ("loss", "reverse_kl", "advantage", "entropy", "coverage", "grad_norm", "effective_sample_size")
ConfigOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="TOML with any of the settings below, a key each.")
]
Track = Annotated[
    Tracker | None,
    typer.Option(metavar="NAME", help=f"Where metrics go beside metrics.jsonl: {', '.join(get_args(Tracker))}."),
]
Json = Annotated[bool, typer.Option("--json", help="Answer in JSON.")]


@app.callback()
def lopd_train_command(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=console.show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Take the options that go before a command."""


def with_config(defaults: TrainConfig) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command `--config` and one option per setting in place of its parameter `config`; the options win."""
    names = [item.name for item in fields(TrainConfig)]
    kinds = get_type_hints(TrainConfig)

    def option(name: str) -> inspect.Parameter:
        metavar, help_text = settings.shown(kinds[name], help_of(name))
        option = typer.Option(metavar=metavar, help=help_text, rich_help_panel="Settings")
        return inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=getattr(defaults, name),
            annotation=Annotated[kinds[name], option],
        )

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def run(context: typer.Context, config: Path | None, **arguments: Any) -> None:
            flags = {name: arguments.pop(name) for name in names}
            sources = {name: context.get_parameter_source(name) for name in names}
            given = {name: flags[name] for name, source in sources.items() if source and source.name != "DEFAULT"}
            command(config=replace(settings.read(config, defaults) if config else defaults, **given), **arguments)

        signature = inspect.signature(command, eval_str=True)
        own = dict(signature.parameters)
        own["config"] = own["config"].replace(default=None, annotation=ConfigOption)
        context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
        parameters = [item.replace(kind=inspect.Parameter.KEYWORD_ONLY) for item in own.values()]
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = signature.replace(parameters=[context, *parameters, *map(option, names)])  # type: ignore[attr-defined]
        return run

    return decorate


@app.command()
@with_config(SFT)
def sft(
    model: ModelOption,
    data: Annotated[
        list[str],
        typer.Option(metavar="FILE", help="SFT data of `lopd-store generate`; once per domain as DOMAIN=FILE."),
    ],
    output: OutputOption,
    config: TrainConfig,
    track: Track = None,
    json: Json = False,
) -> None:
    """Train a model on the responses of a teacher, and record which teacher it was."""
    with tracking(track, output, config) as on_metrics, _shown("sft", on_metrics) as on_progress:
        result = lopd_train.train_sft(
            model=model,
            data=parse_domains(data, "--data"),
            output=output,
            config=config,
            on_progress=on_progress,
        )
    _answer(result, json)


@app.command()
@with_config(OPD)
def opd(
    artifact: Annotated[
        str, typer.Option(metavar="DIR", help="The teacher's log-probs on the student's rollouts; a URL will do.")
    ],
    student: ModelOption,
    output: OutputOption,
    config: TrainConfig,
    sft_data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="SFT data of the same teacher to mix in; see `--sft-weight`.")
    ] = None,
    allow_unknown_sft_teacher: AllowUnknownOption = False,
    allow_inconsistent_teacher: AllowInconsistentOption = False,
    track: Track = None,
    json: Json = False,
) -> None:
    """Train a student on a teacher's stored log-probs; refuses unless the teacher is the one of its SFT."""
    with tracking(track, output, config) as on_metrics, _shown("opd", on_metrics) as on_progress:
        result = lopd_train.train_opd(
            artifact=artifact,
            student=student,
            output=output,
            sft_data=sft_data,
            config=config,
            overrides=overrides(allow_unknown_sft_teacher, allow_inconsistent_teacher),
            on_progress=on_progress,
        )
    _answer(result, json)


@contextmanager
def _shown(description: str, on_metrics: OnMetrics | None) -> Iterator[OnProgress | None]:
    """Show the progress of a run, and how to go on after Ctrl-C; of many processes the first one speaks."""
    if not from_environment().is_first:
        yield None
        return

    def show(progress: Progress) -> None:
        if progress.note:
            console.note(progress.note)
        if progress.line and on_metrics:
            on_metrics(progress.line["step"], {name: value for name, value in progress.line.items() if name != "step"})
        metrics = progress.metrics
        words = [f"step {progress.step} of {progress.steps}", progress.activity]
        words += [f"{name.replace('_', ' ')} {metrics[name]:.3g}" for name in _WATCHED if name in metrics]
        words += [f"{metrics['tokens_per_second']:,.0f} tokens/s"] if "tokens_per_second" in metrics else []
        words += [gauged] if (gauged := measures.gauge(metrics)) else []
        meter.update(progress.done, progress.total, ", ".join(words))

    try:
        with console.progress(description, "rollouts") as meter:
            yield show
    except KeyboardInterrupt as stopped:
        if str(stopped):
            console.note(str(stopped))
        raise


def _answer(result: RunResult, json: bool) -> None:
    if not from_environment().is_first:
        return
    if json:
        console.answer({**vars(result), "output": str(result.output)})
        return
    console.say(f"{result.output}: {result.steps:,} steps")
    first, last = result.first_eval, result.last_eval
    if name := next((name for name in ("reverse_kl", "cross_entropy") if name in first), None):
        words = f"held-out {name.replace('_', ' ')}: {first[name]:.4f} -> {last[name]:.4f} nats per position"
        console.say(f"{words}, over {last['tokens']:,} positions")
    if gauged := measures.gauge(last):
        size = f"effective sample size {last['effective_sample_size']:.0%}"
        console.say(f"the student is {gauged} (held-out drift {last['drift']:.4f} nats per token, {size})")


def main() -> None:
    """The entry point of `lopd-train`."""
    # Gloo's threads may outlive the run and abort the interpreter's end, which torchrun takes for a failure.
    console.run(app, at_once=from_environment().size > 1)


if __name__ == "__main__":
    main()
