"""A teacher split over two processes, beside the same teacher in one."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import lopd_store
from lopd_store.errors import DataError, InputError, UnavailableError
from lopd_store.teachers import RolloutScores, load
from lopd_store.teachers.tensor_parallel import TensorParallelTeacher, require_tensor_parallel
from tests.artifacts import random_pairs, rollout, save_rollouts
from tests.gguf import save_tiny_gguf
from tests.tiny import save_tiny_model
from tests.unit.conftest import LENGTHS

ROOT = Path(__file__).parents[2]
VOCAB_SIZE, K = 300, 20
TOLERANCE = 1e-4  # nat, in float32: sums in another order
SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
FAMILIES: dict[str, tuple[Any, Any]] = {  # beside Llama with its head tied, which everything else here is
    "Qwen3": (Qwen3ForCausalLM, Qwen3Config(**SMALL, tie_word_embeddings=False)),
    "Qwen3 MoE": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(**SMALL, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2),
    ),
    "Gemma 3": (Gemma3ForCausalLM, Gemma3TextConfig(**SMALL, final_logit_softcapping=0.5)),
}
ROLLOUTS = [rollout(*pair) for pair in random_pairs(LENGTHS)]


def load_teacher(model: Path, size: int, **options: Any) -> Any:
    settings = {"vocab_size": VOCAB_SIZE, "dtype": "float32", "device": "cpu", "batch_tokens": 64, **options}
    return load("transformers", str(model), tensor_parallel_size=size, **settings)


@pytest.fixture(scope="module")
def split(teacher_dir: Path, student_dir: Path) -> Iterator[TensorParallelTeacher]:
    """A teacher and a reference policy, both over two processes; the last test kills one."""
    yield load_teacher(teacher_dir, 2, reference=str(student_dir))


def assert_same_scores(found: dict[int, RolloutScores], wanted: dict[int, RolloutScores]) -> None:
    assert found.keys() == wanted.keys()
    for index, one in found.items():
        other = wanted[index]
        np.testing.assert_allclose(one.sampled_logprobs, other.sampled_logprobs, atol=TOLERANCE)
        assert one.entropies is not None and other.entropies is not None
        np.testing.assert_allclose(one.entropies, other.entropies, atol=10 * TOLERANCE)
        np.testing.assert_allclose(np.sort(one.candidates.logprobs), np.sort(other.candidates.logprobs), atol=TOLERANCE)
        np.testing.assert_allclose(one.candidates.tail_logprobs, other.candidates.tail_logprobs, atol=10 * TOLERANCE)


def test_two_processes_give_the_scores_of_one(
    split: TensorParallelTeacher, teacher_dir: Path, student_dir: Path
) -> None:
    one = load_teacher(teacher_dir, 1, reference=str(student_dir))
    found, wanted = dict(split.score(ROLLOUTS, K)), dict(one.score(ROLLOUTS, K))
    assert_same_scores(found, wanted)
    for index in wanted:
        actual, expected = found[index].reference_sampled_logprobs, wanted[index].reference_sampled_logprobs
        assert actual is not None and expected is not None
        np.testing.assert_allclose(actual, expected, atol=TOLERANCE)
    assert (split.scoring, split.context_length) == (one.scoring, one.context_length)


def test_the_same_rollouts_give_the_same_bits_again(split: TensorParallelTeacher) -> None:
    first, second = (dict(split.score(ROLLOUTS, K)) for _ in range(2))
    for index, scores in first.items():
        assert scores.sampled_logprobs.tobytes() == second[index].sampled_logprobs.tobytes()
        assert scores.candidates.logprobs.tobytes() == second[index].candidates.logprobs.tobytes()


def test_a_process_that_is_killed_is_said_and_leaves_none_behind(split: TensorParallelTeacher) -> None:
    _, second = _children()
    os.kill(second, signal.SIGKILL)
    with pytest.raises(UnavailableError, match="one of the 2 processes of the teacher has ended"):
        list(split.score(ROLLOUTS, K))
    assert not _children()


@pytest.mark.system  # starts two processes
def test_an_interrupt_in_the_middle_of_a_step_leaves_no_process_behind(teacher_dir: Path) -> None:
    teacher = load_teacher(teacher_dir, 2)
    os.kill(_children()[0], signal.SIGSTOP)  # so that the other waits for it
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 1)
    with pytest.raises(KeyboardInterrupt):
        list(teacher.score(ROLLOUTS, K))
    assert not _children()


PARENT = """
import multiprocessing, os, signal, sys
from lopd_store.teachers import load
from tests.artifacts import rollout

if __name__ == "__main__":
    settings = {"vocab_size": 300, "dtype": "float32", "device": "cpu", "batch_tokens": 64}
    teacher = load("transformers", sys.argv[1], tensor_parallel_size=2, **settings)
    waits, stopped = (process.pid for process in multiprocessing.active_children())
    os.kill(stopped, signal.SIGSTOP)
    print(waits, stopped, flush=True)
    list(teacher.score([rollout([7] * 4, [8] * 8)], 20))
"""


@pytest.mark.system  # starts three processes
def test_the_processes_end_with_the_one_that_started_them_in_the_middle_of_a_step(
    teacher_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, tmp_path / "parent.py", teacher_dir],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None and parent.stderr is not None
        waits, stopped = map(int, parent.stdout.readline().split())
        time.sleep(1)  # until it is in the step
        parent.kill()
        deadline = time.monotonic() + 30
        while _runs(waits) and time.monotonic() < deadline:
            time.sleep(0.02)
        ended = not _runs(waits)
        for process in (waits, stopped):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        assert ended and parent.stderr.read() == ""


def test_what_a_process_finds_wrong_is_said_here(teacher_dir: Path, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "lacking", seed=1)
    weights = load_file(model / "model.safetensors")
    save_file(dict(list(weights.items())[1:]), model / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match="the weights of `lacking` are not those of its config"):
        load_teacher(model, 2)
    assert not _children()


@pytest.mark.system  # each starts two processes
@pytest.mark.parametrize("family", FAMILIES)
def test_families_give_in_two_processes_what_they_give_in_one(family: str, tmp_path: Path) -> None:
    kind, config = FAMILIES[family]
    torch.manual_seed(0)
    kind(config).save_pretrained(tmp_path / family)
    one, two = (dict(load_teacher(tmp_path / family, size).score(ROLLOUTS, K)) for size in (1, 2))
    assert_same_scores(two, one)


@pytest.mark.system  # each worker starts two processes
def test_one_worker_and_two_make_the_same_artifact_of_a_split_teacher(teacher_dir: Path, tmp_path: Path) -> None:
    rollouts = save_rollouts(tmp_path / "rollouts.parquet", random_pairs([(5, 20)] * 4), logprob=-1.5)
    build = partial(lopd_store.build, teacher=teacher_dir, rollouts=rollouts, part_positions=20)
    one, two = (
        build(output=tmp_path / str(workers), tensor_parallel_size=2, workers=workers).fingerprint for workers in (1, 2)
    )
    assert one == two
    assert json.loads((tmp_path / "1/build.json").read_text())["tensor_parallel_size"] == 2

    share = partial(lopd_store.build_share, "1/2", teacher=teacher_dir, rollouts=rollouts, part_positions=20)
    share(output=tmp_path / "begun", tensor_parallel_size=2)
    with pytest.raises(InputError, match="another plan\n  expected  `tensor_parallel_size` 2\n  actual    1"):
        build(output=tmp_path / "begun")


def gguf(tmp_path: Path, model: Path) -> Path:
    return save_tiny_gguf(tmp_path / "tiny.gguf", model)


def gpt2(tmp_path: Path, model: Path) -> Path:
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def itself(tmp_path: Path, model: Path) -> Path:
    return model


@pytest.mark.parametrize(
    ("make", "size", "device", "message"),
    [
        (gguf, 2, "cpu", r"`tiny.gguf` cannot be split over devices\n  expected  safetensors of a whole model"),
        (gpt2, 2, "cpu", "transformers has no tensor parallelism for a `gpt2`(?s:.)*hint: use `--device auto`"),
        (itself, 3, "cpu", "over 3 devices\n  expected  a number that divides its 2 key-value heads\n  actual    3"),
        (itself, 2, "auto", "split over the device `auto`\n  expected  cuda or cpu"),
        (itself, 1 + torch.cuda.device_count(), "cuda", "`tensor_parallel_size` is out of range\n  expected  at most"),
    ],
)
def test_what_cannot_be_split_is_refused_before_anything_is_loaded(
    make: Callable[[Path, Path], Path], size: int, device: str, message: str, teacher_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        require_tensor_parallel(str(make(tmp_path, teacher_dir)), size, device)


def _children() -> list[int]:
    """Processes that this one has started and that still run."""
    return [process.pid for process in multiprocessing.active_children() if process.pid is not None]


def _runs(process: int) -> bool:
    """Whether this process has not ended; a dead one that nobody has asked about has."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
