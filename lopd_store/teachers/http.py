"""A running vLLM server: `vllm serve MODEL --max-logprobs -1 --no-enable-prefix-caching`.

Rollouts go to /v1/completions as token ids, some at a time; each comes back with the k likeliest ids of every token
(see `flat` for what that leaves unknown). A server that is busy or restarts is asked again for some minutes. The
teacher's directory is needed all the same: it gives identity and tokenizer. `check_server` refuses a server that is
another model, as far as can be told from outside. With a reference policy there are two servers, and what one of them
has not listed is asked for by name; see `union`.
"""

from __future__ import annotations

import json
import random
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from http.client import HTTPException
from threading import Event
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import numpy as np
import numpy.typing as npt

from lopd_store import models
from lopd_store.errors import DataError, InputError, UnavailableError
from lopd_store.manifest import Scoring
from lopd_store.rollouts import Rollout
from lopd_store.teachers import RolloutScores
from lopd_store.teachers.flat import Ids, Listing, listed, to_listing, to_scores
from lopd_store.teachers.union import WIDER, Choice, Union, questions
from lopd_store.topk import Floats

AT_ONCE = 16  # rollouts that the server has at a time
_AHEAD = 4 * AT_ONCE  # rollouts that may be asked for before the first of them is taken
_PATIENCE = 300.0  # seconds that a server may be away, once it was there
_AT_FIRST = 10.0
_SECONDS_PER_CALL = 600.0
_MAX_BYTES = 4 << 30  # of one answer
_BUSY = (429, 500, 502, 503, 504)  # worth asking again
_FLOOR = -9999.0  # what the server says for -inf
_PROBE = "Déjà vu: 3 + 4 = 7,\n\tfor i in range(10): print(i)  # 你好 🙂"
_PROBED_TOKENS = 64
# The server's arithmetic is another than ours: what float32 gives is far below this, another model far above.
_MOST_DIFFERENCE = {"float32": 0.01, "bfloat16": 0.5, "float16": 0.5}


class HttpTeacher:
    """A teacher behind a vLLM server, and beside it the reference policy behind another where one is named."""

    def __init__(
        self,
        model: str,
        server: str,
        *,
        vocab_size: int,
        dtype: str,
        reference: str | None = None,
        reference_server: str | None = None,
        choice: Choice | None = None,
        patience: float = _PATIENCE,
    ) -> None:
        places = [(model, server), *([(reference, reference_server)] if reference and reference_server else [])]
        self._served = [_Served(name, url, vocab_size=vocab_size, patience=patience) for name, url in places]
        self._vocab_size = vocab_size
        self._choice = choice or Choice()
        self.scoring = Scoring(engine="http", dtype=dtype)
        lengths = [one.context_length for one in self._served if one.context_length is not None]
        self.context_length: int | None = min(lengths, default=None)

    def score(self, rollouts: Sequence[Rollout], k: int) -> Iterator[tuple[int, RolloutScores]]:
        """See `Teacher.score`."""
        waiting: deque[tuple[int, Future[RolloutScores]]] = deque()
        pool, given_up = ThreadPoolExecutor(AT_ONCE), Event()
        try:
            for index, rollout in enumerate(rollouts):
                if len(waiting) == _AHEAD:
                    first, scores = waiting.popleft()
                    yield first, scores.result()
                waiting.append((index, pool.submit(self._score, rollout, min(k, self._vocab_size), given_up)))
            while waiting:
                first, scores = waiting.popleft()
                yield first, scores.result()
        finally:
            given_up.set()
            pool.shutdown(cancel_futures=True)

    def _score(self, rollout: Rollout, k: int, given_up: Event) -> RolloutScores:
        if len(self._served) == 1:
            return to_scores(self._served[0].likeliest(rollout, k, given_up), k)
        teacher, reference = (one.likeliest(rollout, WIDER * k, given_up) for one in self._served)
        union = Union(teacher, reference, k=k, choice=self._choice)
        return union.scores(
            [one.look_up(rollout, asked, given_up) for one, asked in zip(self._served, union.asked, strict=True)]
        )


class _Served:
    """A model behind a server."""

    def __init__(self, model: str, url: str, *, vocab_size: int, patience: float) -> None:
        self._server = Server(url, patience=patience)
        self._vocab_size = vocab_size
        self._output_width = int(models.load_config(models.find(model)).get_text_config().vocab_size)
        served = self._server.model()
        self._name, longest = served["id"], served.get("max_model_len")
        # One token is generated that nobody asked for.
        self.context_length: int | None = longest - 1 if isinstance(longest, int) else None

    def likeliest(self, rollout: Rollout, k: int, given_up: Event) -> Listing:
        """The likeliest ids at every position of a rollout, k of them and a few more."""
        columns = listed(k, vocab_size=self._vocab_size, output_width=self._output_width)
        answer = self._complete(rollout.token_ids.tolist(), given_up, prompt_logprobs=columns)
        try:
            rows = answer["prompt_logprobs"][len(rollout.prompt_ids) :]
            ids, logprobs, sampled = _to_arrays(rows, rollout.response_ids.tolist(), columns)
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise DataError(f"{self._server.url} gave no log-probs of the prompt", expected="a vLLM server") from error
        return to_listing(
            rollout, ids, logprobs, sampled, k=k, vocab_size=self._vocab_size, output_width=self._output_width
        )

    def look_up(self, rollout: Rollout, asked: Ids, given_up: Event) -> Floats:
        """The log-probs of the ids asked for by position: each time of the token behind a prefix of the rollout."""
        found, tokens = np.zeros(len(asked), np.float32), rollout.token_ids.tolist()
        for some, position, ids in questions(asked):
            prefix = tokens[: len(rollout.prompt_ids) + position]
            by_id = {"logprobs": 1, "logprob_token_ids": ids, "return_tokens_as_token_ids": True}
            answer = self._complete(prefix, given_up, **by_id)
            try:
                (row,) = answer["logprobs"]["top_logprobs"]
                found[some] = [row[f"token_id:{id}"] for id in ids]
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(
                    f"{self._server.url} does not give the log-probs of given ids",
                    expected="a vLLM server that knows `logprob_token_ids`",
                    hint="upgrade it, or use `--engine transformers`",
                ) from error
        found[found <= _FLOOR] = -np.inf
        return found

    def _complete(self, prompt: Sequence[int], given_up: Event, **options: Any) -> Any:
        """One token behind a prompt, which nobody wants, with log-probs."""
        asked = {"model": self._name, "prompt": prompt, "max_tokens": 1, "temperature": 0, "add_special_tokens": False}
        answer = self._server.ask("/v1/completions", asked | options, given_up)
        try:
            return answer["choices"][0]
        except (KeyError, TypeError, IndexError) as error:
            raise DataError(f"{self._server.url} gave no completion", expected="a vLLM server") from error


def check_server(
    url: str, model: str, *, vocab_size: int, dtype: str, device: str, weights: bool = True, what: str = "teacher"
) -> None:
    """Refuse a server whose model or tokenizer is not the teacher's, or the reference policy's.

    It must make the same ids of a text that is hard to tokenise, and, where `weights` are to be looked at, give the
    same log-probs as the model's files do here, run by transformers over a few tokens. Ids and log-probs of other
    texts are not compared: a server with other weights that agree on this one, or that changes later, is not found.
    """
    tokenizer = models.load_tokenizer(models.find(model))
    server = Server(url, patience=_AT_FIRST)
    served = server.model()
    ours = tokenizer(_PROBE, add_special_tokens=False).input_ids[:_PROBED_TOKENS]
    answer = server.ask("/tokenize", {"model": served["id"], "prompt": _PROBE, "add_special_tokens": False})
    if (theirs := list(answer.get("tokens") or ())[:_PROBED_TOKENS]) != ours:
        raise InputError(
            f"the tokenizer of `{served['id']}` at {url} is not the {what}'s",
            expected=f"{ours[:8]}… for a text",
            actual=f"{theirs[:8]}…",
            hint=f"name the model that the server runs with `--{what.split()[0]}`",
        )
    if not weights:
        return
    from lopd_store.teachers.transformers import TransformersTeacher

    half = len(ours) // 2
    rollout = Rollout(
        prompt_ids=np.array(ours[:half], np.uint32),
        response_ids=np.array(ours[half:], np.uint32),
        loss_mask=np.ones(len(ours) - half, np.bool_),
        logprobs=None,
        prompt=None,
        response=None,
        finish_reason=None,
    )
    here = TransformersTeacher(model, vocab_size=vocab_size, dtype=dtype, device=device, batch_tokens=_PROBED_TOKENS)
    ((_, wanted),) = here.score([rollout], 1)
    ((_, found),) = HttpTeacher(model, url, vocab_size=vocab_size, dtype=dtype).score([rollout], 1)
    difference = float(np.abs(found.sampled_logprobs - wanted.sampled_logprobs).max())
    if not difference <= _MOST_DIFFERENCE[dtype]:
        raise InputError(
            f"`{served['id']}` at {url} is not the {what} `{model}` in {dtype}",
            expected=f"the same log-probs within {_MOST_DIFFERENCE[dtype]} nat",
            actual=f"a difference of {difference:.3g} nat",
            hint=f"name the model that the server runs with `--{what.split()[0]}`, and its `--dtype`",
        )


class Server:
    """A server that is asked for JSON, again where it does not answer."""

    def __init__(self, url: str, *, patience: float = _PATIENCE) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise InputError(f"`{url}` is not a server", expected="a URL such as http://localhost:8000")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._patience = patience

    def model(self) -> dict[str, Any]:
        """What the server says of the one model that it runs."""
        data = self.ask("/v1/models").get("data")
        running = [one for one in data if isinstance(one, dict)] if isinstance(data, list) else []
        names = [str(one["id"]) for one in running if one.get("id") and not one.get("parent")]  # adapters have a parent
        if len(names) != 1:
            raise InputError(f"{self.url} does not run one model", expected="one", actual=", ".join(names) or "none")
        return next(one for one in running if one.get("id") == names[0])

    def ask(self, path: str, body: dict[str, Any] | None = None, given_up: Event | None = None) -> dict[str, Any]:
        """The answer to a request. Raises InputError where it is refused, UnavailableError where none comes.

        Once `given_up` is set nothing is asked again.
        """
        given_up = given_up or Event()
        request = Request(
            self.url + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        away, pause = time.monotonic() + self._patience, 0.5
        while True:
            try:
                with urlopen(request, timeout=_SECONDS_PER_CALL) as response:
                    answer = json.loads(response.read(_MAX_BYTES))
                break
            except HTTPError as error:
                problem: Exception = error
                if error.code not in _BUSY:
                    raise InputError(
                        f"{self.url}{path} refused the request ({error.code})",
                        actual=error.read(2000).decode(errors="replace"),
                        hint="run the server with `--max-logprobs -1`, and name its model with `--teacher`",
                    ) from error
            except (OSError, HTTPException, ValueError) as error:
                problem = error
            # Waiting requests do not come back all at once.
            if time.monotonic() > away or given_up.wait(pause * random.uniform(0.5, 1.5)):
                raise UnavailableError(
                    f"{self.url} does not answer: {problem}",
                    hint="the same command goes on where this one stopped once the server is back",
                )
            pause = min(2 * pause, 15.0)
        if not isinstance(answer, dict):
            raise InputError(f"{self.url}{path} gave something else than an object", expected="a vLLM server")
        return answer


def _to_arrays(
    rows: list[dict[str, Any]], response: list[int], columns: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """(ids, log-probs, log-probs of the response) of JSON rows {id: {logprob}}.

    A row has the likeliest ids, and one more where the response token is none of them.
    """
    ids = np.zeros((len(rows), columns), np.int64)
    logprobs = np.zeros((len(rows), columns), np.float32)
    sampled = np.zeros(len(response), np.float32)
    for row, (entries, token) in enumerate(zip(rows, response, strict=True)):
        own = entries[str(token)] if len(entries) == columns else entries.pop(str(token))
        sampled[row] = own["logprob"]
        ids[row] = [int(token) for token in entries]
        logprobs[row] = [entry["logprob"] for entry in entries.values()]
    logprobs[logprobs <= _FLOOR] = -np.inf
    sampled[sampled <= _FLOOR] = -np.inf
    return ids, logprobs, sampled
