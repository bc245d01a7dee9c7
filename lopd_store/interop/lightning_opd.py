"""Lightning-OPD's Parquet, as slime reads it: prompts as text, responses as token ids, one log-prob for each.

slime encodes the prompt itself, so a prompt that comes back as other ids cannot be exported: the teacher would have
scored another context. It also takes the sum of a loss mask for the length of the response.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lopd_store.errors import DataError
from lopd_store.identity import load_tokenizer_of
from lopd_store.interop.target import Keep, Target, lists, prompt_ids
from lopd_store.part import Part, response_mask
from lopd_store.reader import Artifact
from lopd_store.survey import OnBad

_INTEGERS, _DOUBLES = pa.list_(pa.int64()), pa.list_(pa.float64())


def target(artifact: Artifact, tokenizer: str | Path, on_bad_rollout: OnBad) -> Target:
    """Raises InputError where the tokenizer of this model is another one than the artifact's."""
    loaded = load_tokenizer_of(tokenizer, artifact.manifest.inputs[0].teacher)
    fields = [
        ("is_lightning_opd", pa.bool_()),
        ("response_tokens", _INTEGERS),
        ("loss_mask", _INTEGERS),
        ("response", pa.string()),
        ("teacher_log_probs", _DOUBLES),
    ]
    if artifact.manifest.reference_logprobs:
        fields.append(("student_log_probs", _DOUBLES))
    metadata = pa.struct(fields)
    return Target(
        schema=pa.schema([("prompt", pa.string()), ("label", pa.string()), ("metadata", metadata)]),
        columns=partial(_columns, loaded, metadata),
        bytes_per_token=400,
        keep=partial(_keep, loaded, on_bad_rollout),
        zeros="slime takes the sum of a loss mask for the length of the response",
    )


def _keep(tokenizer: Any, on_bad: OnBad, part: Part, first: int) -> Keep:
    """The rollouts whose prompts survive as text; raises DataError at one that does not, unless it may be skipped."""
    ids = prompt_ids(part, response_mask(part.rollout_offsets, part.prompt_lengths)).to_pylist()
    again = tokenizer(_texts(tokenizer, ids), add_special_tokens=False)["input_ids"]
    survives = np.array([wanted == found for wanted, found in zip(ids, again, strict=True)], np.bool_)
    if on_bad == "fail" and not survives.all():
        row = int(np.argmin(survives))
        both = list(zip(ids[row], again[row], strict=False))
        differs = next((index for index, (wanted, found) in enumerate(both) if wanted != found), len(both))
        raise DataError(
            f"rollout {first + row}: its prompt, as text, is encoded to other ids",
            expected=f"{len(ids[row])} ids: {_near(ids[row], differs)}",
            actual=f"{len(again[row])} ids: {_near(again[row], differs)}",
            hint="leave such rollouts out with `--on-bad-rollout skip`, or export `trl`, which keeps ids",
        )
    return survives


def _columns(tokenizer: Any, metadata: pa.StructType, part: Part) -> list[pa.Array]:
    is_response, offsets = response_mask(part.rollout_offsets, part.prompt_lengths), part.position_offsets
    rollouts = len(part.prompt_lengths)
    responses = lists(part.token_ids[is_response].astype(np.int64), offsets)
    members = [
        pa.repeat(pa.scalar(True), rollouts),
        responses,
        lists(part.loss_mask.astype(np.int64), offsets),
        pa.array(_texts(tokenizer, responses.to_pylist()), pa.string()),
        lists(part.sampled_logprobs.astype(np.float64), offsets),
    ]
    if part.reference_logprobs is not None:
        members.append(lists(part.reference_logprobs.astype(np.float64), offsets))
    return [
        pa.array(_texts(tokenizer, prompt_ids(part, is_response).to_pylist()), pa.string()),
        pa.repeat(pa.scalar("0"), rollouts),
        pa.StructArray.from_arrays(members, fields=list(metadata)),
    ]


def _texts(tokenizer: Any, ids: list[list[int]]) -> list[str]:
    texts: list[str] = tokenizer.batch_decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return texts


def _near(ids: list[int], index: int) -> str:
    """The ids from the first that differs on."""
    return f"{'… ' if index else ''}{' '.join(map(str, ids[index : index + 4]))}{' …' if index + 4 < len(ids) else ''}"
