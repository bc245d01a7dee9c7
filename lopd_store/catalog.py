"""Finding artifacts on the Hub: what an owner has, and what a teacher or a tokenizer fits.

    search(owner="acme")
    search(teacher="Qwen/Qwen3-8B")          # whose teacher is the one that wrote my SFT data
    locate("sha256:…")                       # a repository that has this very artifact

A push writes the beginnings of three digests into the card as tags, and the Hub finds repositories by them. A tag is a
claim: the manifest of each is read, a few kilobytes, and has the last word.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lopd_store import gate, models
from lopd_store.card import search_tags
from lopd_store.digest import is_digest
from lopd_store.errors import InputError, LopdError
from lopd_store.hub import hub_errors, tag_of
from lopd_store.identity import identify, tokenizer_digest
from lopd_store.reader import Artifact, open_source
from lopd_store.sources import HubSource

_MOST_COPIES = 50  # of one artifact that are looked at, as anybody may claim to have it


@dataclass(frozen=True, kw_only=True)
class Found:
    """A repository that says it holds an artifact; `problem` where its manifest cannot be read."""

    repository: str
    artifact: Artifact | None
    problem: str | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON object; the facts are those of the manifest."""
        if self.artifact is None:
            return {"repository": self.repository, "problem": self.problem}
        inputs, counts = self.artifact.manifest.inputs, self.artifact.manifest.counts
        return {
            "repository": self.repository,
            "url": f"hf://{self.repository}@{tag_of(self.artifact.fingerprint)}",
            "fingerprint": self.artifact.fingerprint,
            "teachers": [
                {"domain": one.domain, "name": one.teacher.name, "weights": one.teacher.weights} for one in inputs
            ],
            "tokenizer": inputs[0].teacher.tokenizer,
            "rollouts": counts.rollouts,
            "positions": counts.positions,
            "consistency": gate.judge(inputs).state,
        }


def search(
    *, owner: str | None = None, teacher: str | Path | None = None, tokenizer: str | Path | None = None, limit: int = 50
) -> list[Found]:
    """Repositories of the Hub with an artifact: of this owner, by this teacher, with this tokenizer, at most so many.

    `teacher` and `tokenizer` are models, whose digests are computed, or digests themselves: of weights, of a tokenizer.
    """
    if owner is None and teacher is None and tokenizer is None:
        raise InputError("nothing to search for", hint="name an owner, a teacher or a tokenizer")
    weights = None if teacher is None else str(teacher) if is_digest(str(teacher)) else identify(teacher).weights
    vocabulary = None if tokenizer is None else _tokenizer_digest(str(tokenizer))
    tags = search_tags(teachers=[] if weights is None else [weights], tokenizer=vocabulary)
    every = [_read(repository) for repository in _repositories(owner, tags, limit)]
    return [one for one in every if one.artifact is None or _fits(one.artifact, weights, vocabulary)]


def locate(fingerprint: str) -> str:
    """A repository of the Hub whose artifact now is the one with this fingerprint; raises InputError where none is."""
    for repository in _repositories(None, search_tags(fingerprint=fingerprint), limit=_MOST_COPIES):
        found = _read(repository)
        if found.artifact is not None and found.artifact.fingerprint == fingerprint:
            return repository
    raise InputError(
        f"no repository on the Hub is known to hold `{fingerprint}`",
        hint="name the repository: an artifact that another one has replaced there is found by its tag alone",
    )


def _repositories(owner: str | None, tags: list[str], limit: int) -> list[str]:
    """The names of the repositories that have all these tags."""
    from huggingface_hub import HfApi

    with hub_errors(owner or "the Hub"):
        return [info.id for info in HfApi().list_datasets(author=owner, filter=tags, limit=limit)]


def _read(repository: str) -> Found:
    try:
        return Found(repository=repository, artifact=open_source(HubSource(repository=repository)))
    except LopdError as error:
        return Found(repository=repository, artifact=None, problem=error.message)


def _fits(artifact: Artifact, weights: str | None, tokenizer: str | None) -> bool:
    teachers = [one.teacher for one in artifact.manifest.inputs]
    return weights in (None, *(one.weights for one in teachers)) and tokenizer in (None, teachers[0].tokenizer)


def _tokenizer_digest(model: str) -> str:
    return model if is_digest(model) else tokenizer_digest(models.load_tokenizer(models.find(model)))
