"""Engines: which can do what, scores from the likeliest ids alone against the dense twin, and a server that fails."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import lopd_store
from lopd_store.errors import DataError, InputError, UnavailableError
from lopd_store.manifest import Scoring
from lopd_store.noise import MOST_NOISE, Noise, probe, score_twice
from lopd_store.rollouts import Rollout
from lopd_store.teachers import RolloutScores, load
from lopd_store.teachers.flat import groups, listed, to_listing, to_scores
from lopd_store.teachers.http import AT_ONCE, HttpTeacher, Server, check_server
from lopd_store.topk import Candidates
from tests.artifacts import rollout, save_rollouts
from tests.unit.dense import best, log_softmax, tail

WIDTH, VOCAB_SIZE, K = 120, 100, 10
RESPONSE = [3, 99, 50, 7]


# What an engine cannot do is said before anything is read


@pytest.mark.parametrize("half", [{"reference": "sft"}, {"reference_server": "http://localhost:2"}])
def test_a_reference_policy_over_http_needs_a_server_of_its_own(half: dict[str, Any], tmp_path: Path) -> None:
    nothing: dict[str, Any] = {"teacher": "no-model", "rollouts": "no-file", "output": tmp_path / "artifact"}
    with pytest.raises(InputError, match=r"a reference policy and its server, or neither(?s:.)*--reference-server"):
        lopd_store.build(**nothing, engine="http", server="http://localhost:1", **half)


def test_the_http_engine_needs_a_server_and_no_other_has_one(tmp_path: Path) -> None:
    nothing: dict[str, Any] = {"teacher": "no-model", "rollouts": "no-file", "output": tmp_path / "artifact"}
    with pytest.raises(InputError, match=r"the http engine needs a server(?s:.)*hint: name it"):
        lopd_store.build(**nothing, engine="http")
    with pytest.raises(InputError, match="the transformers engine has no server\n\nhint: add `--engine http`"):
        lopd_store.build(**nothing, server="http://localhost:1")
    with pytest.raises(InputError, match="the vllm engine has no server"):
        lopd_store.build(**nothing, engine="vllm", reference_server="http://localhost:1")


def test_the_http_engine_leaves_the_splitting_of_a_teacher_to_its_server(tmp_path: Path) -> None:
    nothing: dict[str, Any] = {"teacher": "no-model", "rollouts": "no-file", "output": tmp_path / "artifact"}
    with pytest.raises(InputError, match=r"does not split a teacher(?s:.)*`vllm serve --tensor-parallel-size N`"):
        lopd_store.build(**nothing, engine="http", server="http://localhost:1", tensor_parallel_size=2)


def test_the_vllm_engine_says_where_vllm_is_missing(teacher_dir: Path) -> None:
    with pytest.raises(InputError, match="vLLM is not installed here\n\nhint: pip install vllm"):
        load("vllm", str(teacher_dir), vocab_size=300, dtype="float32", device="cpu", batch_tokens=64)


# From the likeliest ids to scores


def random_rows(seed: int, scale: float) -> npt.NDArray[np.float64]:
    """Distributions with a padded head; [positions, WIDTH]."""
    logits = np.random.default_rng(seed).standard_normal((len(RESPONSE), WIDTH)) * scale
    logits[:, VOCAB_SIZE:] -= 2
    return np.array([log_softmax(row) for row in logits])


def scores_of(dense: npt.NDArray[np.float64], *, k: int = K, columns: int | None = None) -> RolloutScores:
    """What is made of the likeliest ids of dense rows, listed as an engine lists them."""
    columns = listed(k, vocab_size=VOCAB_SIZE, output_width=WIDTH) if columns is None else columns
    ids = np.array([best(row, columns, WIDTH) for row in dense], np.int64)
    listing = to_listing(
        rollout([1, 2], RESPONSE),
        ids,
        np.take_along_axis(dense, ids, axis=1).astype(np.float32),
        dense[np.arange(len(dense)), RESPONSE[: len(dense)]].astype(np.float32),
        k=k,
        vocab_size=VOCAB_SIZE,
        output_width=WIDTH,
    )
    return to_scores(listing, k)


@pytest.mark.parametrize("scale", [0.5, 3.0, 12.0])
@pytest.mark.parametrize("seed", range(5))
def test_scores_from_the_likeliest_ids_are_those_of_the_dense_twin(seed: int, scale: float) -> None:
    dense = random_rows(seed, scale)
    found = scores_of(dense)
    assert found.entropies is None
    for j, row in enumerate(dense):
        kept = found.candidates.ids[j].tolist()
        assert kept == best(row, K, VOCAB_SIZE)
        np.testing.assert_allclose(found.candidates.logprobs[j], row[kept], atol=1e-5)
        assert np.exp(found.candidates.tail_logprobs[j]) == pytest.approx(np.exp(tail(row, kept)), abs=2e-6)


def test_a_tail_below_the_precision_of_float32_stays_within_what_is_possible() -> None:
    dense = random_rows(0, 40.0)
    found = scores_of(dense)
    for j, row in enumerate(dense):
        wanted = tail(row, found.candidates.ids[j].tolist())
        assert wanted < -15 or wanted == pytest.approx(found.candidates.tail_logprobs[j], abs=0.1)
        assert -np.inf < found.candidates.tail_logprobs[j] < max(wanted + 5, -10)
        assert found.sampled_logprobs[j] <= found.candidates.tail_logprobs[j] or RESPONSE[j] in found.candidates.ids[j]


def test_when_every_id_is_listed_the_tail_is_the_mass_of_the_padding() -> None:
    dense = random_rows(1, 2.0)
    found = scores_of(dense, k=VOCAB_SIZE, columns=WIDTH)
    wanted = [tail(row, list(range(VOCAB_SIZE))) for row in dense]
    np.testing.assert_allclose(found.candidates.tail_logprobs, wanted, atol=1e-5)


def test_equal_log_probs_keep_the_lowest_ids() -> None:
    dense = np.tile(log_softmax(np.zeros(WIDTH)), (len(RESPONSE), 1))
    assert scores_of(dense).candidates.ids.tolist() == [list(range(K))] * len(RESPONSE)


def test_too_much_padding_among_the_likeliest_is_refused() -> None:
    logits = random_rows(0, 1.0)
    logits[:, VOCAB_SIZE:] += 10
    dense = np.array([log_softmax(row) for row in logits])
    with pytest.raises(DataError, match=r"too many ids that the tokenizer does not know\n  expected  10 ids below 100"):
        scores_of(dense, columns=15)


def test_logits_in_the_place_of_log_probs_are_refused() -> None:
    with pytest.raises(DataError, match=r"log-probs above 0(?s:.)*raw_logprobs"):
        scores_of(random_rows(0, 1.0) + 30)


def test_another_number_of_rows_is_refused() -> None:
    with pytest.raises(
        DataError, match="another number of rows than there are positions\n  expected  4\n  actual    3"
    ):
        scores_of(random_rows(0, 1.0)[:3])


def test_groups_hold_every_rollout_once_and_stay_within_their_tokens() -> None:
    rollouts = [rollout([1] * n, [2] * n) for n in (1, 2, 30, 1, 1, 4, 9)]
    found = list(groups(rollouts, 12))
    assert [row for rows in found for row in rows] == list(range(7))
    assert [len(rows) for rows in found] == [2, 1, 3, 1]


# A server that fails


class Script(ThreadingHTTPServer):
    """A server on this machine that answers from a list, and counts how many requests it has at a time."""

    daemon_threads = True

    def __init__(self, *answers: tuple[int, Any]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.asked = list(answers), list[Any]()
        self.at_once, self.most_at_once = 0, 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """Answers with the next of the list, the last for ever; (0, …) hangs up."""

    server: Script

    def do_GET(self) -> None:
        """See `_answer`."""
        self._answer(None)

    def do_POST(self) -> None:
        """See `_answer`."""
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body: Any) -> None:
        script = self.server
        with script.lock:
            script.at_once += 1
            script.most_at_once = max(script.most_at_once, script.at_once)
            script.asked.append((self.path, body))
            status, answer = script.answers.pop(0) if len(script.answers) > 1 else script.answers[0]
        if status:
            data = json.dumps(answer(body) if callable(answer) else answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
        with script.lock:
            script.at_once -= 1
        if status:
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def serve() -> Iterator[Any]:
    """Start a `Script`."""
    running: list[Script] = []

    def start(*answers: tuple[int, Any]) -> Script:
        running.append(Script(*answers))
        threading.Thread(target=running[-1].serve_forever, daemon=True).start()
        return running[-1]

    yield start
    for script in running:
        script.shutdown()
        script.server_close()


MODELS = {"data": [{"id": "teacher", "max_model_len": 64, "parent": None}]}


def test_a_server_that_is_busy_or_hangs_up_is_asked_again(serve: Any) -> None:
    script = serve((503, {}), (0, None), (200, {"data": 7}))
    assert Server(script.url, patience=30).ask("/x") == {"data": 7}
    assert len(script.asked) == 3


def test_a_refused_request_is_told_in_the_words_of_the_server(serve: Any) -> None:
    script = serve((400, {"error": "Requested prompt logprobs of 72, which is greater than max allowed: 20"}))
    with pytest.raises(
        InputError, match=r"/x refused the request \(400\)(?s:.)*max allowed: 20(?s:.)*--max-logprobs -1"
    ):
        Server(script.url).ask("/x")
    assert len(script.asked) == 1


def test_a_server_that_stays_away_could_not_be_told() -> None:
    with pytest.raises(UnavailableError, match=r"http://127.0.0.1:9 does not answer(?s:.)*the same command goes on"):
        Server("http://127.0.0.1:9", patience=0).ask("/x")


@pytest.mark.parametrize("url", ["localhost:8000", "file:///etc/passwd", "ftp://x", ""])
def test_what_is_not_the_address_of_a_server_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="is not a server\n  expected  a URL such as"):
        Server(url)


def test_a_server_of_several_models_is_refused(serve: Any) -> None:
    script = serve((200, {"data": [{"id": "a"}, {"id": "b"}]}))
    with pytest.raises(InputError, match="does not run one model\n  expected  one\n  actual    a, b"):
        Server(script.url).model()


@pytest.mark.parametrize("answer", [{}, {"data": None}, {"data": ["a"]}, {"data": [{"id": None}]}])
def test_a_server_of_something_else_runs_no_model(serve: Any, answer: Any) -> None:
    script = serve((200, answer))
    with pytest.raises(InputError, match="does not run one model\n  expected  one\n  actual    none"):
        Server(script.url).model()


def test_an_answer_that_is_no_object_is_refused(serve: Any) -> None:
    script = serve((200, [1, 2]))
    with pytest.raises(InputError, match="/x gave something else than an object\n  expected  a vLLM server"):
        Server(script.url).ask("/x")


def test_a_server_with_another_tokenizer_is_refused_before_anything_is_scored(serve: Any, teacher_dir: Path) -> None:
    script = serve((200, MODELS), (200, {"tokens": [1, 2, 3]}))
    with pytest.raises(InputError, match=r"the tokenizer of `teacher` at .* is not the teacher's(?s:.)*\[1, 2, 3\]…"):
        check_server(script.url, str(teacher_dir), vocab_size=300, dtype="float32", device="cpu")


def test_rollouts_are_asked_for_side_by_side_and_come_in_order(serve: Any, teacher_dir: Path) -> None:
    def completion(body: Any) -> Any:
        # After token t the ids t + 1, t + 2, … are the likeliest; a real server is in tests/system.
        rows: list[Any] = [None]
        for before, token in zip(body["prompt"], body["prompt"][1:], strict=False):
            row = {str(before + 1 + i): {"logprob": -1.0 - i, "rank": i + 1} for i in range(body["prompt_logprobs"])}
            rows.append({str(token): {"logprob": -30.0, "rank": 200}} | row)
        return {"choices": [{"prompt_logprobs": rows}]}

    script = serve((200, MODELS), (200, completion))
    teacher = HttpTeacher(str(teacher_dir), script.url, vocab_size=300, dtype="float32", patience=5)
    assert (teacher.context_length, teacher.scoring) == (63, Scoring(engine="http", dtype="float32"))
    rollouts = [rollout([10 + n], [11 + n, 5]) for n in range(3 * AT_ONCE)]
    found = list(teacher.score(rollouts, 4))
    assert [index for index, _ in found] == list(range(len(rollouts)))
    for n, scores in found:
        assert scores.sampled_logprobs.tolist() == [-1.0, -30.0]
        assert scores.candidates.ids.tolist() == [[11 + n + i for i in range(4)], [12 + n + i for i in range(4)]]
    assert 1 <= script.most_at_once <= AT_ONCE


@pytest.mark.parametrize("count", [3, 5])  # the first position left out, and one more for what was generated
def test_an_answer_with_another_number_of_rows_is_refused(serve: Any, teacher_dir: Path, count: int) -> None:
    rows: list[Any] = [{str(token): {"logprob": -1.0} for token in range(7, 20)}] * count
    script = serve((200, MODELS), (200, {"choices": [{"prompt_logprobs": rows}]}))
    teacher = HttpTeacher(str(teacher_dir), script.url, vocab_size=300, dtype="float32")
    with pytest.raises(DataError, match="gave no log-probs of the prompt"):
        list(teacher.score([rollout([7, 8], [9, 10])], 5))


def test_an_answer_without_log_probs_is_refused(serve: Any, teacher_dir: Path) -> None:
    script = serve((200, MODELS), (200, {"choices": [{"text": "hello"}]}))
    teacher = HttpTeacher(str(teacher_dir), script.url, vocab_size=300, dtype="float32")
    with pytest.raises(DataError, match="gave no log-probs of the prompt\n  expected  a vLLM server"):
        list(teacher.score([rollout([1], [2])], 4))


# The noise of an engine


class Shaky:
    """An engine whose log-probs change with the number of rollouts in a batch."""

    scoring = Scoring(engine="shaky", dtype="float32")
    context_length: int | None = None

    def __init__(self, step: float) -> None:
        self._step = step

    def score(self, rollouts: Sequence[Rollout], k: int) -> Iterator[tuple[int, RolloutScores]]:
        """See `lopd_store.teachers.Teacher`."""
        for index, one in enumerate(rollouts):
            sampled = np.full(len(one.response_ids), -1 - self._step * len(rollouts), np.float32)
            sampled[:1] = -np.inf
            none = np.zeros((len(sampled), 0))
            candidates = Candidates(
                ids=none.astype(np.uint32), logprobs=none.astype(np.float32), tail_logprobs=np.zeros_like(sampled)
            )
            yield index, RolloutScores(sampled_logprobs=sampled, candidates=candidates, entropies=None)


def test_the_noise_is_what_another_batch_changes() -> None:
    rollouts = [rollout([1], [2] * n) for n in (4, 1, 0)]
    scores, noise = score_twice(Shaky(0.25), rollouts, 1)
    assert [len(one.sampled_logprobs) for one in scores] == [4, 1, 0]
    assert noise == Noise(positions=5, largest=0.5, mean=0.3)  # two tokens are impossible both times


def test_a_single_rollout_is_scored_beside_a_copy_of_itself() -> None:
    _, noise = score_twice(Shaky(0.25), [rollout([1], [2, 3])], 1)
    assert noise.largest == 0.25


def test_an_engine_that_does_not_repeat_itself_is_refused_unless_that_is_accepted() -> None:
    rollouts = [rollout([1], [2, 3])]
    with pytest.raises(
        DataError, match=r"does not repeat itself(?s:.)*at most 0\.01 nat(?s:.)*0\.1 nat, 0\.05 on average"
    ):
        probe(Shaky(0.1), rollouts, 1, most=None)
    assert probe(Shaky(0.1), rollouts, 1, most=0.2).positions == 2
    assert MOST_NOISE["float32"] == 0.01


def test_a_build_notes_the_noise_of_its_engine_beside_the_artifact(teacher_dir: Path, tmp_path: Path) -> None:
    path = save_rollouts(tmp_path / "rollouts.parquet", [([1, 2], list(range(10, 40))), ([3], [4, 5])])
    artifact = lopd_store.build(teacher=teacher_dir, rollouts=path, output=tmp_path / "artifact")
    noise = json.loads((artifact.path / "build.json").read_text())["noise"]
    assert noise["positions"] == 32 and 0 <= noise["mean"] <= noise["largest"] < 1e-3
    assert sorted(found.name for found in artifact.path.iterdir()) == [
        "README.md",
        "build.json",
        "manifest.json",
        "parts",
    ]


def test_a_build_with_a_noisy_engine_stops_before_the_first_part(
    teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lopd_store.workers.load_teacher", lambda plan: Shaky(0.1))
    path = save_rollouts(tmp_path / "rollouts.parquet", [([1, 2], [3, 4])])
    with pytest.raises(DataError, match="the engine does not repeat itself"):
        lopd_store.build(teacher=teacher_dir, rollouts=path, output=tmp_path / "artifact")
    assert [found.name for found in tmp_path.iterdir()] == ["rollouts.parquet"]
