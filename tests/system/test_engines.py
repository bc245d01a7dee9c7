"""The engines against each other: the same rollouts give the same artifact by transformers, vLLM and a vLLM server.

vLLM is run for real on the CPU, in the environment that `make test-system` makes for it.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import pytest

import lopd_store
from lopd_store.errors import InputError
from lopd_store.teachers import load
from lopd_store.teachers.http import HttpTeacher, check_server
from lopd_store.topk import TopK
from tests.artifacts import random_pairs, rollout, save_rollouts
from tests.commands import run_command
from tests.tiny import save_tiny_model

ROOT = Path(__file__).parents[2]
VLLM = ROOT / ".venv-vllm" / "bin"
TOLERANCE = 5e-4  # nat, in float32
CONTEXT, VOCAB_SIZE = 256, 300
LENGTHS = [(3, 9), (12, 1), (1, 20), (7, 0), (100, 155), (30, 6)]  # the longest leaves room for one token
ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(not VLLM.is_dir(), reason="`make .venv-vllm/installed` installs vLLM"),
]


class Server:
    """vLLM's own server with a model, which can be killed and started again at the same address."""

    def __init__(self, model: Path, log: Path, caching: str = "--no-enable-prefix-caching") -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self._model, self._log, self._caching = model, log, caching
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        options = ["--dtype", "float32", "--enforce-eager", "--max-logprobs", "-1", self._caching]
        command = [VLLM / "python", "-m", "vllm.entrypoints.openai.api_server", "--model", self._model, *options]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*map(str, command), "--host", "127.0.0.1", "--port", str(self._port)],
                stdout=log,
                stderr=log,
                env=ENVIRONMENT,
                start_new_session=True,
            )
        for _ in range(600):
            try:
                with urlopen(f"{self.url}/health", timeout=5):
                    return
            except (URLError, OSError):
                assert self._process.poll() is None, self._log.read_text(errors="replace")[-3000:]
                time.sleep(0.5)
        raise AssertionError("the server does not start")

    def stop(self) -> None:
        """Kill it with all its processes, as a machine that goes down does."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(60)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny teacher with a padded head, as wide as vLLM's kernels need."""
    directory = tmp_path_factory.mktemp("models") / "teacher"
    return save_tiny_model(directory, seed=1, output_width=VOCAB_SIZE + 20, width=128)


@pytest.fixture(scope="module")
def server(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that runs the teacher."""
    running = Server(teacher, tmp_path_factory.mktemp("server") / "log.txt")
    yield running
    running.stop()


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny reference policy with the teacher's tokenizer and another head."""
    directory = tmp_path_factory.mktemp("models") / "student"
    return save_tiny_model(directory, seed=2, output_width=VOCAB_SIZE + 4, width=128)


@pytest.fixture(scope="module")
def student_server(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that runs the reference policy, with the prefix cache that a server has unless told otherwise."""
    running = Server(student, tmp_path_factory.mktemp("server") / "log.txt", "--enable-prefix-caching")
    yield running
    running.stop()


@pytest.fixture(scope="module")
def sampled_path(student: Path, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rollouts that the reference policy has sampled."""
    path = tmp_path_factory.mktemp("rollouts") / "sampled.parquet"
    return lopd_store.generate(model=student, prompts=prompts_file, output=path, max_response_tokens=40).output


@pytest.fixture(scope="module")
def rollouts_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rollouts of mixed lengths, one as long as vLLM can score."""
    return save_rollouts(tmp_path_factory.mktemp("rollouts") / "rollouts.parquet", random_pairs(LENGTHS))


def run_build(
    teacher: Path, rollouts: Path, output: Path, *more: object, python: Path
) -> subprocess.CompletedProcess[str]:
    """Run the command in an environment."""
    command = ["build", "--teacher", teacher, "--rollouts", rollouts, "--output", output, *more]
    return subprocess.run(
        [str(python.parent / "lopd-store"), *map(str, command)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def build(teacher: Path, rollouts: Path, output: Path, *more: object, python: Path) -> lopd_store.Artifact:
    """An artifact made by the command in an environment."""
    ran = run_build(teacher, rollouts, output, *more, python=python)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return lopd_store.open(output)


def rows(topk: TopK) -> Iterator[dict[int, float]]:
    """{id: log-prob} of each position."""
    for start, stop in zip(topk.offsets[:-1], topk.offsets[1:], strict=True):
        yield dict(zip(topk.ids[start:stop].tolist(), topk.logprobs[start:stop].tolist(), strict=True))


@pytest.mark.parametrize(
    ("engine", "coverage", "tensor_parallel_size"), [("vllm", 1, 1), ("vllm", 0.9, 2), ("http", 1, 1), ("http", 0.9, 1)]
)
def test_an_engine_gives_the_artifact_of_the_embedded_one(
    engine: str,
    coverage: float,
    tensor_parallel_size: int,
    teacher: Path,
    rollouts_path: Path,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    stored = ["--exact", "--k-max", 40, "--coverage", coverage]
    more = ["--engine", engine, "--batch-tokens", 128, "--tensor-parallel-size", tensor_parallel_size]
    if engine == "http":
        more += ["--server", request.getfixturevalue("server").url]
    python = VLLM / "python" if engine == "vllm" else Path(sys.executable)
    found = build(teacher, rollouts_path, tmp_path / "found", *stored, *more, python=python)
    wanted = lopd_store.build(
        teacher=teacher, rollouts=rollouts_path, output=tmp_path / "wanted", exact=True, k_max=40, coverage=coverage
    )
    assert lopd_store.verify(found.path).ok
    assert found.manifest.inputs[0].scoring.engine == engine
    assert found.manifest.inputs[0].teacher == wanted.manifest.inputs[0].teacher
    ours, theirs = wanted.part(0), found.part(0)
    np.testing.assert_array_equal(theirs.token_ids, ours.token_ids)
    np.testing.assert_allclose(theirs.sampled_logprobs, ours.sampled_logprobs, atol=TOLERANCE)
    assert ours.topk is not None and theirs.topk is not None
    np.testing.assert_allclose(np.exp(theirs.topk.tail_logprobs), np.exp(ours.topk.tail_logprobs), atol=1e-4)
    large = ours.topk.tail_logprobs > np.log(0.02)
    np.testing.assert_allclose(theirs.topk.tail_logprobs[large], ours.topk.tail_logprobs[large], atol=TOLERANCE)
    np.testing.assert_array_equal(theirs.topk.counts, ours.topk.counts)
    np.testing.assert_allclose(theirs.topk.logprobs, ours.topk.logprobs, atol=TOLERANCE)
    same = [a.keys() == b.keys() for a, b in zip(rows(theirs.topk), rows(ours.topk), strict=True)]
    assert np.mean(same) > 0.98  # nearly tied ids at the border may change places


@pytest.mark.parametrize("engine", ["vllm", "http"])
@pytest.mark.parametrize("coverage", [1, 0.9])
def test_an_engine_gives_what_two_models_find_likely_as_the_embedded_one_does(
    engine: str,
    coverage: float,
    teacher: Path,
    student: Path,
    sampled_path: Path,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    more: list[object] = ["--reference", student, "--exact", "--k-max", 30, "--coverage", coverage, "--engine", engine]
    if engine == "http":
        more += ["--server", request.getfixturevalue("server").url]
        more += ["--reference-server", request.getfixturevalue("student_server").url]
    python = VLLM / "python" if engine == "vllm" else Path(sys.executable)
    found = build(teacher, sampled_path, tmp_path / "found", *more, python=python)
    wanted = lopd_store.build(
        teacher=teacher,
        reference=student,
        rollouts=sampled_path,
        output=tmp_path / "wanted",
        exact=True,
        k_max=30,
        coverage=coverage,
    )
    assert lopd_store.verify(found.path).ok
    assert found.manifest.encoding == wanted.manifest.encoding
    ours, theirs = wanted.part(0).topk, found.part(0).topk
    assert ours is not None and ours.reference_logprobs is not None and ours.reference_tail_logprobs is not None
    assert theirs is not None and theirs.reference_logprobs is not None and theirs.reference_tail_logprobs is not None
    same = [a.keys() == b.keys() for a, b in zip(rows(theirs), rows(ours), strict=True)]
    assert np.mean(same) > 0.98  # nearly tied ids at the border may change places
    kept_by_both = np.repeat(same, theirs.counts), np.repeat(same, ours.counts)
    for name in ("logprobs", "reference_logprobs"):
        a, b = (getattr(topk, name)[kept] for topk, kept in zip((theirs, ours), kept_by_both, strict=True))
        np.testing.assert_allclose(a, b, atol=TOLERANCE)
    for name in ("tail_logprobs", "reference_tail_logprobs"):
        a, b = (np.exp(getattr(topk, name)[same]) for topk in (theirs, ours))
        np.testing.assert_allclose(a, b, atol=1e-4)
    audits = [one.manifest.inputs[0].rollouts_audit for one in (found, wanted)]
    assert audits[0] is not None and audits[1] is not None
    assert audits[0].z == pytest.approx(audits[1].z, abs=0.01)


@pytest.mark.parametrize("engine", ["vllm", "http"])
def test_a_rollout_that_leaves_no_room_for_a_token_is_refused(
    engine: str, teacher: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    path = save_rollouts(tmp_path / "long.parquet", random_pairs([(CONTEXT - 10, 10)]))
    more: list[object] = ["--engine", engine]
    if engine == "http":
        more += ["--server", request.getfixturevalue("server").url]
    python = VLLM / "python" if engine == "vllm" else Path(sys.executable)
    ran = run_build(teacher, path, tmp_path / "artifact", *more, python=python)
    assert ran.returncode == 1
    assert "longer than the teacher's context" in ran.stderr and "at most 255 tokens" in ran.stderr
    assert not (tmp_path / "artifact").exists()


def test_a_build_by_a_server_is_planned_like_another(teacher: Path, rollouts_path: Path, server: Server) -> None:
    planned = ("--teacher", teacher, "--rollouts", rollouts_path, "--probe", 4, "--json")
    asked = run_command("lopd-store", "plan", *planned, "--engine", "http", "--server", server.url)
    assert (asked.code, asked.json["rollouts"]) == (0, len(LENGTHS)), asked.stderr
    wanted = run_command("lopd-store", "plan", *planned).json["choices"]
    assert [one["mean_k"] for one in asked.json["choices"]] == [one["mean_k"] for one in wanted]


def test_a_server_with_other_weights_is_refused(server: Server, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "other", seed=2, output_width=VOCAB_SIZE + 20, width=128)
    with pytest.raises(InputError, match=r"is not the teacher `.*other` in float32(?s:.)*the same log-probs"):
        check_server(server.url, str(other), vocab_size=VOCAB_SIZE, dtype="float32", device="cpu")
    check_server(server.url, str(other), vocab_size=VOCAB_SIZE, dtype="float32", device="cpu", weights=False)


def test_a_server_with_another_tokenizer_is_refused(server: Server, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "other", vocab_size=290, width=128)
    with pytest.raises(InputError, match=r"the tokenizer of `.*` at .* is not the teacher's"):
        check_server(server.url, str(other), vocab_size=290, dtype="float32", device="cpu")


def test_a_server_that_restarts_midway_loses_nothing(teacher: Path, server: Server) -> None:
    rollouts = [rollout(*pair) for pair in random_pairs([(20, 60)] * 150)]
    options = {"vocab_size": VOCAB_SIZE, "dtype": "float32"}
    scores = HttpTeacher(str(teacher), server.url, **options).score(rollouts, 10)  # type: ignore[arg-type]
    found = [next(scores)]
    server.stop()
    server.start()
    found += scores
    embedded = load("transformers", str(teacher), device="cpu", batch_tokens=4096, **options)  # type: ignore[arg-type]
    wanted = dict(embedded.score(rollouts, 10))
    assert [index for index, _ in found] == list(range(150))
    for index, score in found:
        np.testing.assert_allclose(score.sampled_logprobs, wanted[index].sampled_logprobs, atol=TOLERANCE)
