"""`lopd-store generate --engine vllm`, for real on the CPU: whose samples they are, and that a run goes on."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

import lopd_store
from lopd_store import models
from lopd_store.rollouts import Rollout, RolloutsFile
from lopd_store.teachers import load
from tests.system.test_engines import ENVIRONMENT, TOLERANCE, VLLM, VOCAB_SIZE
from tests.tiny import save_tiny_model

OPTIONS: tuple[object, ...] = ("--max-response-tokens", 40, "--n", 8, "--batch-size", 12, "--seed", 3)

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(not VLLM.is_dir(), reason="`make .venv-vllm/installed` installs vLLM"),
]


def start(model: Path, prompts: Path, output: Path, *more: object) -> subprocess.Popen[str]:
    """The command in vLLM's environment."""
    command = [VLLM / "lopd-store", "generate", "--engine", "vllm", "--model", model, "--prompts", prompts]
    return subprocess.Popen(
        [*map(str, command), "--output", str(output), *map(str, more)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def generate(model: Path, prompts: Path, output: Path, *more: object) -> list[Rollout]:
    """What it writes."""
    running = start(model, prompts, output, *more)
    _, stderr = running.communicate(timeout=600)
    assert running.returncode == 0, stderr[-3000:]
    return RolloutsFile(output).read()


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a padded head, as wide as vLLM's kernels need."""
    directory = tmp_path_factory.mktemp("models") / "policy"
    return save_tiny_model(directory, seed=2, output_width=VOCAB_SIZE + 20, width=128)


@pytest.fixture(scope="module")
def sampled(policy: Path, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rollouts that vLLM has sampled, undisturbed."""
    path = tmp_path_factory.mktemp("rollouts") / "rollouts.parquet"
    generate(policy, prompts_file, path, *OPTIONS)
    return path


def sampled_logprobs(policy: Path, rollouts: list[Rollout]) -> list[np.ndarray]:
    """What the embedded engine says of them."""
    engine = load("transformers", str(policy), vocab_size=VOCAB_SIZE, dtype="float32", device="cpu", batch_tokens=4096)
    found = dict(engine.score(rollouts, 1))
    return [found[index].sampled_logprobs for index in range(len(rollouts))]


def test_what_vllm_samples_is_the_policys_with_its_log_probs_and_record(
    policy: Path, prompts_file: Path, sampled: Path, tmp_path: Path
) -> None:
    file = RolloutsFile(sampled)
    rollouts = file.read()
    for rollout, wanted in zip(rollouts, sampled_logprobs(policy, rollouts), strict=True):
        assert rollout.logprobs is not None and int(rollout.response_ids.max()) < VOCAB_SIZE
        np.testing.assert_allclose(rollout.logprobs, wanted, atol=TOLERANCE)
    audit = lopd_store.audit(model=policy, data=sampled).overall
    assert audit.positions > 1000 and abs(audit.z) < 4
    embedded = tmp_path / "embedded.parquet"
    lopd_store.generate(
        model=policy, prompts=prompts_file, output=embedded, max_response_tokens=40, samples_per_prompt=8, seed=3
    )
    other = RolloutsFile(embedded)
    assert file.record == other.record and file.columns == other.columns
    assert [one.prompt_ids.tolist() for one in rollouts] == [one.prompt_ids.tolist() for one in other.read()]
    assert len({tuple(one.response_ids.tolist()) for one in rollouts}) == len(rollouts)


def test_a_run_that_was_killed_goes_on_to_the_same_bytes(
    policy: Path, prompts_file: Path, sampled: Path, tmp_path: Path
) -> None:
    output, journal = tmp_path / "rollouts.parquet", tmp_path / "rollouts.parquet.generating"
    running = start(policy, prompts_file, output, *OPTIONS)
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 12):
        assert running.poll() is None
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.communicate(timeout=60)
    assert journal.exists() and not output.exists()
    generate(policy, prompts_file, output, *OPTIONS)
    assert output.read_bytes() == sampled.read_bytes() and not journal.exists()


def test_a_response_ends_with_the_token_that_completes_a_stop_string_or_with_a_stop_token(
    policy: Path, prompts_file: Path, sampled: Path, tmp_path: Path
) -> None:
    free = RolloutsFile(sampled).read()
    texts = [one.response or "" for one in free]
    stop = next(
        text[i : i + 2]
        for text in texts
        for i in range(3, len(text) - 4)
        if text[i : i + 2].isascii() and text[i : i + 2].isalpha()
    )
    found = generate(policy, prompts_file, tmp_path / "rollouts.parquet", *OPTIONS, "--stop", stop)
    ended = 0
    for one, whole in zip(found, free, strict=True):
        assert one.response is not None and whole.response is not None
        np.testing.assert_array_equal(one.response_ids, whole.response_ids[: len(one.response_ids)])
        assert (stop in one.response) == (stop in whole.response)
        assert one.finish_reason == ("stop" if stop in one.response else whole.finish_reason)
        ended += stop in one.response and len(one.response_ids) < len(whole.response_ids)
    assert ended
    model = models.find(policy)
    ids = models.stop_token_ids(models.load_generation_config(model), models.load_tokenizer(model))
    stopped = 0
    for one in free:
        *before, last = one.response_ids.tolist()
        assert not set(before) & set(ids)
        assert (one.finish_reason == "stop") == (last in ids)
        assert one.finish_reason == "stop" or len(one.response_ids) == 40
        stopped += last in ids
    assert stopped


@pytest.mark.parametrize("processes", [1, 2])
def test_at_another_temperature_the_samples_are_sharper_and_the_log_probs_still_the_models_own(
    processes: int, policy: Path, prompts_file: Path, tmp_path: Path
) -> None:
    output, options = tmp_path / "rollouts.parquet", ("--temperature", 0.5, "--tensor-parallel-size", processes)
    rollouts = generate(policy, prompts_file, output, *OPTIONS, *options)
    for rollout, wanted in zip(rollouts, sampled_logprobs(policy, rollouts), strict=True):
        assert rollout.logprobs is not None
        np.testing.assert_allclose(rollout.logprobs, wanted, atol=TOLERANCE)
    # As the record says: by the policy at this temperature, and not at 1.
    record = RolloutsFile(output).record
    assert record is not None and record.sampling is not None and record.sampling.temperature == 0.5
    assert abs(lopd_store.audit(model=policy, data=output).overall.z) < 4
    assert lopd_store.audit(model=policy, data=output, temperature=1).overall.z > 4
