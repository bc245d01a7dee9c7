"""Sampling: the drawing of one token against NumPy, and whole responses of tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import lopd_store
from lopd_store import models, sampler, samplers
from lopd_store.errors import DataError, InputError
from lopd_store.provenance import Sampling
from lopd_store.rollouts import Rollout, RolloutsFile
from lopd_store.samplers.transformers import draw
from tests.tiny import PROMPTS, save_tiny_model, tiny_tokenizer
from tests.unit.dense import DenseTeacher

LENGTH = 24


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return path


def generate(model: Path, prompts: Path, name: str = "rollouts.parquet", **options: Any) -> list[Rollout]:
    options = {"max_response_tokens": LENGTH} | options
    lopd_store.generate(model=model, prompts=prompts, output=prompts.with_name(name), **options)
    return RolloutsFile(prompts.with_name(name)).read()


def ids(rollouts: list[Rollout]) -> list[list[int]]:
    return [rollout.response_ids.tolist() for rollout in rollouts]


# One token


def draw_with_numpy(logprobs: np.ndarray, uniform: float, temperature: float, top_p: float) -> int:
    """The inverse distribution function, one row, in float64, step by step."""
    scaled = logprobs.astype(np.float64) / temperature
    mass = np.exp(scaled - scaled.max())
    mass /= mass.sum()
    kept, covered = set(), 0.0
    for id in sorted(range(len(mass)), key=lambda id: (-mass[id], id)):
        if covered >= top_p:
            break
        kept.add(id)
        covered += mass[id]
    total, reached = sum(mass[id] for id in kept), 0.0
    for id in sorted(kept):
        reached += mass[id]
        if reached > uniform * total:
            return id
    return max(kept)


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    return torch.log_softmax(3 * torch.randn(200, 40, generator=torch.Generator().manual_seed(0)), dim=-1)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.7, 1.0), (1.0, 0.9), (0.6, 0.5)])
def test_a_draw_is_the_inverse_distribution_function(rows: torch.Tensor, temperature: float, top_p: float) -> None:
    uniforms = np.random.default_rng(1).random(len(rows))
    found = draw(rows, torch.from_numpy(uniforms), temperature, top_p).tolist()
    wanted = [
        draw_with_numpy(row, uniform, temperature, top_p) for row, uniform in zip(rows.numpy(), uniforms, strict=True)
    ]
    assert found == wanted


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9])
def test_nothing_outside_top_p_is_drawn(rows: torch.Tensor, top_p: float) -> None:
    for uniform in (0.0, 0.5, np.nextafter(1, 0)):
        found = draw(rows, torch.full((len(rows),), uniform, dtype=torch.float64), 1.0, top_p)
        likelier = (rows > rows.gather(1, found[:, None])).double() * rows.double().exp()
        assert (likelier.sum(dim=1) < top_p).all()


def test_temperature_zero_takes_the_most_likely_id(rows: torch.Tensor) -> None:
    uniforms = torch.rand(len(rows), dtype=torch.float64)
    assert draw(rows, uniforms, 0.0, 1.0).tolist() == rows.argmax(dim=1).tolist()


@pytest.mark.parametrize("uniform", [0.0, np.nextafter(1, 0)])
def test_an_impossible_token_is_never_drawn(uniform: float) -> None:
    row = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    assert draw(row, torch.tensor([uniform], dtype=torch.float64), 1.0, 1.0).tolist() == [1]


def test_draws_have_the_frequencies_of_the_distribution() -> None:
    mass = torch.tensor([0.5, 0.3, 0.15, 0.05])
    uniforms = torch.from_numpy((np.arange(10_000) + 0.5) / 10_000)
    found = draw(mass.log().expand(10_000, 4), uniforms, 1.0, 1.0)
    np.testing.assert_allclose(torch.bincount(found).double() / 10_000, mass, atol=2e-4)


# Whole responses


def test_a_seed_repeats_a_run(student_dir: Path, prompts: Path) -> None:
    one, other, third = (generate(student_dir, prompts, f"{n}.parquet", seed=s) for n, s in enumerate((5, 5, 6)))
    assert ids(one) == ids(other) != ids(third)


def test_the_size_of_a_batch_changes_no_id(student_dir: Path, prompts: Path) -> None:
    runs = [
        ids(generate(student_dir, prompts, f"{size}.parquet", batch_size=size, samples_per_prompt=2))
        for size in (1, 5, 100)
    ]
    assert runs[0] == runs[1] == runs[2]


def test_samples_of_one_prompt_stand_together_and_differ(student_dir: Path, prompts: Path) -> None:
    rollouts = generate(student_dir, prompts, samples_per_prompt=3)
    assert [rollout.prompt for rollout in rollouts] == [prompt for prompt in PROMPTS for _ in range(3)]
    assert len({tuple(response) for response in ids(rollouts)}) == len(rollouts)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.8), (0.0, 1.0)])
def test_logprobs_are_those_at_temperature_one_whatever_was_sampled_with(
    student_dir: Path, prompts: Path, temperature: float, top_p: float
) -> None:
    dense = DenseTeacher(student_dir)
    for rollout in generate(student_dir, prompts, temperature=temperature, top_p=top_p):
        assert rollout.logprobs is not None
        wanted = [row[id] for row, id in zip(dense.logprobs(rollout), rollout.response_ids, strict=True)]
        np.testing.assert_allclose(rollout.logprobs, wanted, atol=1e-4)


def test_padding_on_the_left_moves_no_position(prompts: Path, tmp_path: Path) -> None:
    """On a GPT-2, which learns its positions: to a Llama only distances matter."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=128, initializer_range=0.8)
    with models.without_bars():
        GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    dense = DenseTeacher(tmp_path / "gpt2")
    for rollout in generate(tmp_path / "gpt2", prompts):
        assert rollout.logprobs is not None
        wanted = [row[id] for row, id in zip(dense.logprobs(rollout), rollout.response_ids, strict=True)]
        np.testing.assert_allclose(rollout.logprobs, wanted, atol=1e-4)


def test_greedy_responses_are_the_dense_twins_most_likely_ids(student_dir: Path, prompts: Path) -> None:
    dense = DenseTeacher(student_dir)
    for rollout in generate(student_dir, prompts, temperature=0.0):
        assert rollout.response_ids.tolist() == dense.logprobs(rollout).argmax(axis=1).tolist()


def test_the_stop_token_is_kept_and_ends_the_response(student_dir: Path, prompts: Path) -> None:
    stop = models.load_tokenizer(models.find(student_dir)).eos_token_id
    rollouts = generate(student_dir, prompts, samples_per_prompt=10, max_response_tokens=100, batch_size=60)
    stopped = [rollout for rollout in rollouts if rollout.finish_reason == "stop"]
    assert 0 < len(stopped) < len(rollouts), "this shows nothing unless some stop and some do not"
    for rollout in rollouts:
        found = rollout.response_ids.tolist()
        assert found.count(stop) == (rollout.finish_reason == "stop")
        assert found[-1] == stop if rollout.finish_reason == "stop" else len(found) == 100
        assert rollout.loss_mask.all() and len(rollout.loss_mask) == len(found)


def test_a_stop_token_at_the_limit_is_a_stop(student_dir: Path, prompts: Path) -> None:
    stop = models.load_tokenizer(models.find(student_dir)).eos_token_id
    rollouts = generate(student_dir, prompts, samples_per_prompt=100, max_response_tokens=1, temperature=3.0)
    assert {rollout.finish_reason for rollout in rollouts} == {"stop", "length"}
    assert all((rollout.response_ids[0] == stop) == (rollout.finish_reason == "stop") for rollout in rollouts)


def test_ids_of_padding_are_never_sampled(prompts: Path, tmp_path: Path) -> None:
    padded = save_tiny_model(tmp_path / "padded", seed=4, output_width=400)
    rollouts = generate(padded, prompts, temperature=5.0, samples_per_prompt=5)
    assert max(int(rollout.response_ids.max()) for rollout in rollouts) < 300


def test_the_record_says_who_sampled_from_what_and_how(student_dir: Path, prompts: Path) -> None:
    generate(student_dir, prompts, temperature=0.7, top_p=0.9, seed=3, samples_per_prompt=2)
    record = RolloutsFile(prompts.with_name("rollouts.parquet")).record
    assert record is not None and record.status == "recorded" and record.policy_checkpoint is None
    assert record.policy == lopd_store.identify(student_dir)
    assert record.sampling == Sampling(
        temperature=0.7, top_p=0.9, max_response_tokens=LENGTH, samples_per_prompt=2, seed=3, stop=()
    )


def test_progress_ends_with_every_response_and_token(student_dir: Path, prompts: Path) -> None:
    heard: list[tuple[int, int, int]] = []
    rollouts = generate(student_dir, prompts, batch_size=4, on_progress=lambda *numbers: heard.append(numbers))
    assert heard[-1] == (len(PROMPTS), len(PROMPTS), sum(len(response) for response in ids(rollouts)))
    assert heard == sorted(heard)


# Refusals


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"max_response_tokens": 0}, "max_response_tokens"),
        ({"samples_per_prompt": 0}, "samples_per_prompt"),
        ({"seed": -1}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 65}, "stop"),
        ({"batch_size": 0}, "batch_size"),
        ({"limit": 0}, "limit"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size"),
    ],
)
def test_an_option_out_of_range_is_named(student_dir: Path, prompts: Path, options: dict[str, Any], name: str) -> None:
    with pytest.raises(InputError, match=f"`{name}` is out of range\n  expected  .*1"):
        generate(student_dir, prompts, **options)


def test_the_embedded_engine_does_not_split_a_policy(student_dir: Path, prompts: Path) -> None:
    with pytest.raises(InputError, match=r"`transformers` does not split a policy(?s:.)*hint: use `--engine vllm`"):
        generate(student_dir, prompts, tensor_parallel_size=2)


def test_a_prompt_that_does_not_fit_the_context_is_named(student_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "short"}) + "\n" + json.dumps({"prompt": "for i in " * 100}) + "\n")
    with pytest.raises(
        DataError, match=r"row 1: prompt and response do not fit the model's context\n  expected  at most 256"
    ):
        generate(student_dir, path)


def test_an_output_that_exists_is_left_alone(student_dir: Path, prompts: Path) -> None:
    prompts.with_name("rollouts.parquet").write_text("mine")
    with pytest.raises(InputError, match=r"rollouts\.parquet` exists"):
        generate(student_dir, prompts)
    assert prompts.with_name("rollouts.parquet").read_text() == "mine"


def test_an_output_that_another_run_has_just_written_is_left_alone(
    student_dir: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*arguments: Any, **options: Any) -> Any:
        prompts.with_name("rollouts.parquet").write_text("another's")
        return samplers.load(*arguments, **options)

    monkeypatch.setattr(sampler, "load", load)
    with pytest.raises(InputError, match=r"rollouts\.parquet` exists"):
        generate(student_dir, prompts)
    assert prompts.with_name("rollouts.parquet").read_text() == "another's"
    assert sorted(path.name for path in prompts.parent.iterdir()) == ["prompts.jsonl", "rollouts.parquet"]


def test_an_output_of_another_kind_is_refused(student_dir: Path, prompts: Path) -> None:
    with pytest.raises(InputError, match=r"is not a name for rollouts\n  expected  a name that ends in \.parquet"):
        generate(student_dir, prompts, "rollouts.jsonl")


def test_an_interrupted_run_leaves_no_rollouts_and_what_it_needs_to_go_on(student_dir: Path, prompts: Path) -> None:
    def interrupt(*numbers: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(student_dir, prompts, on_progress=interrupt)
    assert sorted(path.name for path in prompts.parent.iterdir()) == ["prompts.jsonl", "rollouts.parquet.generating"]
    whole = ids(generate(student_dir, prompts, "whole.parquet"))
    assert ids(generate(student_dir, prompts)) == whole
