"""Whole runs: what they leave behind, how they are refused, and how they go on."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lopd_store
import lopd_train
from lopd_store.digest import digest_file
from lopd_store.errors import ConsistencyError, DataError, InputError
from lopd_store.identity import identify
from lopd_store.provenance import read_checkpoint_record
from lopd_store.rollouts import write_rollouts
from lopd_train import Progress, RunResult, TrainConfig
from tests.tiny import save_tiny_model, swap_ids
from tests.train.conftest import CONFIG, build, sample


@pytest.fixture(scope="module")
def opd(artifact: Path, reference: Path, config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """One undisturbed run."""
    output = tmp_path_factory.mktemp("runs") / "opd"
    return lopd_train.train(artifact=artifact, student=reference, output=output, config=config)


def metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what a clock decides."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


def weights(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


def test_sft_lowers_the_held_out_cross_entropy(student_dir: Path, sft_data: Path, tmp_path: Path) -> None:
    config = replace(lopd_train.SFT, steps=30, learning_rate=3e-3, batch_rollouts=16, eval_fraction=0.2, device="cpu")
    result = lopd_train.train_sft(model=student_dir, data=sft_data, output=tmp_path / "sft", config=config)
    assert result.last_eval["cross_entropy"] < result.first_eval["cross_entropy"]
    assert result.first_eval["tokens"] == result.last_eval["tokens"] > 0


def test_opd_moves_the_student_towards_the_teacher(artifact: Path, reference: Path, tmp_path: Path) -> None:
    config = TrainConfig(steps=15, learning_rate=1e-3, batch_rollouts=64, eval_fraction=0, device="cpu")
    lopd_train.train(artifact=artifact, student=reference, output=tmp_path / "opd", config=config)
    lines = metrics(tmp_path / "opd")
    assert lines[-1]["advantage"] > lines[0]["advantage"] + 0.5


def test_the_reverse_kl_objective_lowers_the_reverse_kl(artifact: Path, reference: Path, tmp_path: Path) -> None:
    settings = replace(CONFIG, objective="reverse_kl", steps=10, batch_rollouts=100, learning_rate=1e-2)
    result = lopd_train.train(artifact=artifact, student=reference, output=tmp_path / "opd", config=settings)
    losses = [line["loss"] for line in metrics(result.output) if "loss" in line]
    assert losses[-1] < 0.9 * losses[0]


def test_the_metrics_have_a_line_per_step_and_per_evaluation(opd: RunResult) -> None:
    lines = metrics(opd.output)
    assert [line["step"] for line in lines] == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]
    steps = [line for line in lines if "loss" in line]
    watched = {
        "loss",
        "reverse_kl",
        "advantage",
        "cross_entropy",
        "entropy",
        "grad_norm",
        "drift",
        "effective_sample_size",
    }
    assert all(set(line) == {"step", "tokens", "learning_rate"} | watched for line in steps)
    assert [line["step"] for line in lines if "eval_reverse_kl" in line] == [0, 2, 4, 6]
    assert opd.steps == 6
    of_evaluation = (watched | {"tokens", "coverage", "teacher_coverage"}) - {"loss", "grad_norm"}
    assert opd.first_eval == {name: lines[0][f"eval_{name}"] for name in of_evaluation}
    assert opd.last_eval == {name: lines[-1][f"eval_{name}"] for name in of_evaluation}


def test_the_output_is_a_model_that_transformers_loads(opd: RunResult, reference: Path) -> None:
    model, before = (AutoModelForCausalLM.from_pretrained(path) for path in (opd.output, reference))
    tokenizer = AutoTokenizer.from_pretrained(opd.output)
    ids = torch.tensor([tokenizer("def add(a, b):").input_ids])
    assert bool(model(input_ids=ids).logits.isfinite().all())
    assert not torch.equal(model(input_ids=ids).logits, before(input_ids=ids).logits)
    assert identify(opd.output).tokenizer == identify(reference).tokenizer
    assert sorted(path.name for path in opd.output.parent.iterdir()) == ["opd"]
    assert {path.name for path in opd.output.iterdir()} >= {"run.json", "metrics.jsonl", "lopd-provenance.json"}
    assert not list(opd.output.glob("state*"))


def test_a_bfloat16_run_writes_a_bfloat16_model(
    artifact: Path, reference: Path, config: TrainConfig, tmp_path: Path
) -> None:
    run = replace(config, steps=1, dtype="bfloat16")
    output = lopd_train.train(artifact=artifact, student=reference, output=tmp_path / "opd", config=run).output
    assert AutoModelForCausalLM.from_pretrained(output).dtype == torch.bfloat16


def test_the_record_of_an_sft_checkpoint_names_the_teacher_of_its_data(
    reference: Path, sft_data: Path, teacher_dir: Path, student_dir: Path
) -> None:
    record = read_checkpoint_record(reference)
    assert record is not None
    assert (record.method, record.status, record.overrides) == ("sft", "recorded", ())
    assert record.model == identify(reference)
    assert record.base == identify(student_dir)
    assert record.data == record.sft[0].data == digest_file(sft_data).sha256
    assert record.sft[0].teacher == identify(teacher_dir)


def test_the_record_of_an_opd_checkpoint_carries_the_sft_of_its_artifact(
    opd: RunResult, artifact: Path, reference: Path
) -> None:
    record, opened = read_checkpoint_record(opd.output), lopd_store.open(artifact)
    assert record is not None
    assert (record.method, record.overrides) == ("opd", ())
    assert record.model == identify(opd.output)
    assert record.base == identify(reference)
    assert record.data == opened.fingerprint
    assert record.sft[0] == opened.manifest.inputs[0].sft


def test_run_json_says_everything_that_it_takes_to_repeat_the_run(
    opd: RunResult, artifact: Path, reference: Path, config: TrainConfig
) -> None:
    run = json.loads((opd.output / "run.json").read_text())
    assert run["method"] == "opd"
    assert run["config"] == {**config.to_json(), "device": "cpu"}
    assert run["inputs"]["model"] == {"path": str(reference), "identity": identify(reference).to_json()}
    assert run["inputs"]["data"] == {"path": str(artifact), "digest": lopd_store.open(artifact).fingerprint}
    assert (run["verdict"], run["overrides"]) == ("consistent", [])
    assert set(run["versions"]) == {"python", "lopd", "torch", "transformers"}


# Refusals


def test_an_artifact_scored_by_another_teacher_is_refused_unless_overridden(
    other_teacher_dir: Path, rollouts: Path, reference: Path, config: TrainConfig, tmp_path: Path
) -> None:
    artifact = build(other_teacher_dir, rollouts, tmp_path / "artifact")

    def train(*overrides: str) -> RunResult:
        run = replace(config, steps=1)
        return lopd_train.train(
            artifact=artifact, student=reference, output=tmp_path / "opd", config=run, overrides=overrides
        )

    for overrides in ((), ("allow-unknown-sft-teacher",)):
        with pytest.raises(ConsistencyError, match="teacher consistency is inconsistent"):
            train(*overrides)
    assert not list(tmp_path.glob("opd*"))
    output = train("allow-inconsistent-teacher", "allow-unknown-sft-teacher").output
    run, record = json.loads((output / "run.json").read_text()), read_checkpoint_record(output)
    assert (run["verdict"], run["overrides"]) == ("inconsistent", ["allow-inconsistent-teacher"])
    assert record is not None
    assert record.overrides == ("allow-inconsistent-teacher",)


def test_an_artifact_without_sft_provenance_is_refused_unless_overridden(
    teacher_dir: Path, student_dir: Path, prompts: Path, config: TrainConfig, tmp_path: Path
) -> None:
    rollouts = sample(student_dir, prompts, tmp_path / "rollouts.parquet")
    arguments: dict[str, Any] = {
        "artifact": build(teacher_dir, rollouts, tmp_path / "artifact"),
        "student": student_dir,
        "output": tmp_path / "opd",
        "config": replace(config, steps=1),
    }
    with pytest.raises(ConsistencyError, match="teacher consistency is unknown"):
        lopd_train.train(**arguments)
    lopd_train.train(**arguments, overrides=["allow-unknown-sft-teacher"])
    record = read_checkpoint_record(tmp_path / "opd")
    assert record is not None
    assert (record.overrides, record.sft[0].status) == (("allow-unknown-sft-teacher",), "unknown")


def test_a_student_that_did_not_sample_the_rollouts_is_refused(
    artifact: Path, student_dir: Path, config: TrainConfig, tmp_path: Path
) -> None:
    with pytest.raises(ConsistencyError, match="the student is not the reference policy"):
        lopd_train.train(artifact=artifact, student=student_dir, output=tmp_path / "opd", config=config)


@pytest.mark.parametrize("same_size", [False, True])
def test_another_tokenizer_is_refused_whatever_is_overridden(
    artifact: Path, sft_data: Path, config: TrainConfig, tmp_path: Path, same_size: bool
) -> None:
    other = save_tiny_model(tmp_path / "other", seed=3, vocab_size=300 if same_size else 290)
    if same_size:
        swap_ids(other, "a", "b")
    with pytest.raises(ConsistencyError, match="the student's tokenizer is not the teacher's"):
        lopd_train.train(
            artifact=artifact,
            student=other,
            output=tmp_path / "opd",
            config=config,
            overrides=["allow-inconsistent-teacher", "allow-unknown-sft-teacher"],
        )
    with pytest.raises(DataError, match="has ids of another tokenizer than that of the model"):
        lopd_train.train_sft(model=other, data=sft_data, output=tmp_path / "sft", config=config)


def test_a_rollout_longer_than_the_context_is_refused_and_leaves_nothing_behind(
    student_dir: Path, config: TrainConfig, tmp_path: Path
) -> None:
    rows = [{"prompt_ids": [9], "response_ids": [8] * length} for length in (4, 300)]
    write_rollouts(tmp_path / "long.parquet", rows, None)
    with pytest.raises(DataError, match=r"rollout 1 is longer than the student's context\n  expected  at most 256"):
        lopd_train.train_sft(model=student_dir, data=tmp_path / "long.parquet", output=tmp_path / "sft", config=config)
    assert [path.name for path in tmp_path.iterdir()] == ["long.parquet"]


def test_an_artifact_without_topk_trains_but_is_not_evaluated(
    artifact: Path, reference: Path, config: TrainConfig, tmp_path: Path
) -> None:
    sampled = tmp_path / "sampled"
    lopd_store.subset(artifact, output=sampled, only="sampled")
    arguments: dict[str, Any] = {"artifact": sampled, "student": reference, "output": tmp_path / "opd"}
    with pytest.raises(InputError, match=r"without top-k.*\n\nhint: .*--eval-fraction 0`"):
        lopd_train.train(**arguments, config=config)
    result = lopd_train.train(**arguments, config=replace(config, steps=1, eval_fraction=0))
    assert result.first_eval == result.last_eval == {}


def test_an_output_that_exists_is_refused_and_a_finished_run_with_a_hint(
    opd: RunResult, artifact: Path, reference: Path, config: TrainConfig, tmp_path: Path
) -> None:
    with pytest.raises(
        InputError, match="opd` exists\n\nhint: choose another `--output`; to train a finished run further"
    ):
        lopd_train.train(artifact=artifact, student=reference, output=opd.output, config=config)
    with pytest.raises(InputError, match=f"`{tmp_path}` exists"):
        lopd_train.train(artifact=artifact, student=reference, output=tmp_path, config=config)


def test_a_second_run_to_the_same_output_is_refused_and_disturbs_nothing(
    artifact: Path, reference: Path, config: TrainConfig, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"artifact": artifact, "student": reference, "output": tmp_path / "opd"}

    def begin_another() -> None:
        with pytest.raises(InputError, match=r"another run works on `.*opd\.training`\n\nhint: wait for it"):
            lopd_train.train(**arguments, config=config)

    lopd_train.train(**arguments, config=config, on_progress=at_step(1, begin_another))
    steps = [line["step"] for line in metrics(tmp_path / "opd")]
    assert steps == sorted(steps) and [path.name for path in tmp_path.iterdir()] == ["opd"]


# Resuming


def at_step(number: int, do: Callable[[], object]) -> Callable[[Progress], None]:
    """Do something once, while the step after `number` is computed."""
    done: list[object] = []

    def on_progress(progress: Progress) -> None:
        if progress.step == number and progress.activity == "training" and not done:
            done.append(do())

    return on_progress


def crash() -> None:
    raise RuntimeError("crash")


def press_ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.fixture
def dropping(reference: Path, tmp_path: Path) -> Path:
    """The reference policy with dropout, so that the random state matters."""
    directory = Path(shutil.copytree(reference, tmp_path / "dropping"))
    settings = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**settings, "attention_dropout": 0.1}))
    return directory


@pytest.mark.parametrize(("stop", "error"), [(press_ctrl_c, KeyboardInterrupt), (crash, RuntimeError)])
def test_a_resumed_run_gives_the_metrics_and_weights_of_an_undisturbed_one(
    artifact: Path,
    dropping: Path,
    config: TrainConfig,
    tmp_path: Path,
    stop: Callable[[], None],
    error: type[BaseException],
) -> None:
    arguments: dict[str, Any] = {
        "artifact": artifact,
        "student": dropping,
        "config": replace(config, checkpoint_every=2, schedule="cosine", warmup_steps=2),
        "overrides": ["allow-inconsistent-teacher"],
    }
    undisturbed = lopd_train.train(**arguments, output=tmp_path / "undisturbed")
    torch.manual_seed(1234)  # a run neither reads nor disturbs the random state of its caller
    expected = torch.get_rng_state()
    with pytest.raises(error):
        lopd_train.train(**arguments, output=tmp_path / "stopped", on_progress=at_step(3, stop))
    assert [path.name for path in tmp_path.glob("stopped*")] == ["stopped.training"]
    resumed = lopd_train.train(**arguments, output=tmp_path / "stopped")
    assert torch.equal(torch.get_rng_state(), expected)
    assert metrics(resumed.output) == metrics(undisturbed.output)
    assert weights(resumed.output) == weights(undisturbed.output)
    assert (resumed.first_eval, resumed.last_eval) == (undisturbed.first_eval, undisturbed.last_eval)
    assert [path.name for path in tmp_path.glob("stopped*")] == ["stopped"]


def test_ctrl_c_finishes_the_step_saves_it_and_says_how_to_go_on(
    artifact: Path, reference: Path, config: TrainConfig, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"artifact": artifact, "student": reference, "output": tmp_path / "opd"}
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 4; the same command again goes on from there"):
        lopd_train.train(**arguments, config=config, on_progress=at_step(3, press_ctrl_c))
    assert signal.getsignal(signal.SIGINT) is before
    assert metrics(tmp_path / "opd.training")[-1]["step"] == 4
    assert [path.name for path in (tmp_path / "opd.training").glob("state*")] == ["state-4"]


def test_an_interrupted_run_is_not_resumed_with_other_settings_or_data(
    artifact: Path, reference: Path, teacher_dir: Path, rollouts: Path, config: TrainConfig, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"student": reference, "output": tmp_path / "opd"}
    with pytest.raises(KeyboardInterrupt):
        lopd_train.train(**arguments, artifact=artifact, config=config, on_progress=at_step(1, press_ctrl_c))
    with pytest.raises(
        InputError, match=r"another `config.learning_rate`\n  expected  0.001\n  actual    0.5\n\nhint: "
    ):
        lopd_train.train(**arguments, artifact=artifact, config=replace(config, learning_rate=0.5))
    other = lopd_store.build(teacher=teacher_dir, rollouts=rollouts, output=tmp_path / "other", workers=1, coverage=0.5)
    with pytest.raises(InputError, match=r"another `inputs.data.digest`\n  expected  sha256:.*\n  actual    sha256:"):
        lopd_train.train(**arguments, artifact=other.path, config=config)


def test_an_interrupted_run_goes_on_with_other_memory_settings_versions_and_places(
    artifact: Path, reference: Path, config: TrainConfig, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"student": reference, "output": tmp_path / "opd"}
    with pytest.raises(KeyboardInterrupt):
        lopd_train.train(**arguments, artifact=artifact, config=config, on_progress=at_step(1, press_ctrl_c))
    path = tmp_path / "opd.training" / "run.json"
    path.write_text(path.read_text().replace(torch.__version__, "2.0.0"))
    moved = Path(shutil.copytree(artifact, tmp_path / "moved"))
    result = lopd_train.train(**arguments, artifact=moved, config=replace(config, micro_batch_tokens=64))
    run = json.loads((result.output / "run.json").read_text())
    assert run["versions"]["torch"] == torch.__version__
    assert (run["config"]["micro_batch_tokens"], run["inputs"]["data"]["path"]) == (64, str(moved))


def test_a_line_that_a_crash_cut_short_is_dropped(
    artifact: Path, reference: Path, config: TrainConfig, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"artifact": artifact, "student": reference, "output": tmp_path / "opd"}
    with pytest.raises(KeyboardInterrupt):
        lopd_train.train(**arguments, config=config, on_progress=at_step(1, press_ctrl_c))
    with (tmp_path / "opd.training" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "los')
    lopd_train.train(**arguments, config=config)
    assert [line["step"] for line in metrics(tmp_path / "opd")] == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]


def test_progress_counts_rollouts_up_to_the_end(
    artifact: Path, reference: Path, config: TrainConfig, tmp_path: Path
) -> None:
    heard: list[Progress] = []
    lopd_train.train(
        artifact=artifact, student=reference, output=tmp_path / "opd", config=config, on_progress=heard.append
    )
    assert {progress.total for progress in heard} == {30}
    done = [progress.done for progress in heard]
    assert done == sorted(done)
    assert done[0] == 0
    assert done[-1] == 30  # the last evaluation
    assert heard[0].activity == "evaluating, micro-batch 1"


def test_the_data_of_a_run_is_in_no_order_that_its_micro_batches_decide(
    artifact: Path, reference: Path, config: TrainConfig, tmp_path: Path
) -> None:
    losses = []
    for max_tokens in (64, 8192):
        output = tmp_path / str(max_tokens)
        run = replace(config, micro_batch_tokens=max_tokens)
        lopd_train.train(artifact=artifact, student=reference, output=output, config=run)
        losses.append([line["loss"] for line in metrics(output) if "loss" in line])
    assert np.allclose(losses[0], losses[1], rtol=1e-3)
