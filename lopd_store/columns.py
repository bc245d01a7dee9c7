"""An artifact as a data set of Hugging Face's `datasets`: one row per rollout, with ragged columns for the top-k.

    rows = to_dataset(lopd_store.open("hf://acme/dapo-17k-qwen3-8b@lopd-0123456789ab"))
    next(iter(rows))["topk_ids"][0]         # the teacher's most likely ids at the first response token

Rows come as they are read, part by part; `datasets` is the extra of that name. What it gives is an iterable data set of
torch too, whose workers share the parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopd_store.errors import InputError
from lopd_store.hub import require_fingerprint
from lopd_store.reader import Artifact, StoredRollout, open, rollout_of_part

if TYPE_CHECKING:
    from datasets import IterableDataset


def to_dataset(artifact: Artifact | str | Path) -> IterableDataset:
    """Every rollout of an artifact that is here, in order, with a column for each of its arrays.

    `prompt_ids` [prompt], `response_ids`, `loss_mask`, `sampled_logprobs`, `tail_logprobs` and, where it has them,
    `reference_logprobs` [response]; `topk_ids` and `topk_logprobs` [response, k], where k varies. A copy without top-k
    lacks the last two and the tail. Log-probs are natural logs. Values are checked part by part as they are read, and
    one that breaks a rule of the format is an ArtifactError.
    """
    try:
        from datasets import Features, IterableDataset, LargeList, List, Value
    except ImportError as error:
        raise InputError("the package `datasets` is not installed", hint='pip install "lopd[datasets]"') from error
    opened = artifact if isinstance(artifact, Artifact) else open(artifact)
    ids, logprobs = List(Value("uint32")), List(Value("float32"))
    columns = {"prompt_ids": ids, "response_ids": ids, "loss_mask": List(Value("bool")), "sampled_logprobs": logprobs}
    if opened.manifest.reference_logprobs:
        columns["reference_logprobs"] = logprobs
    if opened.view.has_topk:
        # A batch of long rollouts has more entries than offsets of 32 bits can count.
        topk = {"topk_ids": List(LargeList(Value("uint32"))), "topk_logprobs": List(LargeList(Value("float32")))}
        columns |= {**topk, "tail_logprobs": logprobs}
    given = {"place": opened.place, "fingerprint": opened.fingerprint, "parts": list(opened.view.parts)}
    found: IterableDataset = IterableDataset.from_generator(_rows, features=Features(columns), gen_kwargs=given)
    return found


def _rows(place: str, fingerprint: str, parts: list[int]) -> Iterator[dict[str, Any]]:
    """The rows of some parts; what a worker is given is names and numbers, which travel anywhere."""
    artifact = open(place)
    require_fingerprint(artifact.fingerprint, place, wanted=fingerprint, revision=None)  # a branch may have moved
    for number in parts:
        part = artifact.part(number, check=True)
        for index in range(len(part.prompt_lengths)):
            yield _row(rollout_of_part(part, index))


def _row(rollout: StoredRollout) -> dict[str, Any]:
    arrays = {name: value for name, value in vars(rollout).items() if name != "topk" and value is not None}
    if (topk := rollout.topk) is None:
        return arrays
    edges = topk.offsets
    return {
        **arrays,
        "topk_ids": [topk.ids[start:stop] for start, stop in pairwise(edges)],
        "topk_logprobs": [topk.logprobs[start:stop] for start, stop in pairwise(edges)],
        "tail_logprobs": topk.tail_logprobs,
    }
