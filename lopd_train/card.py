"""The model card: README.md of a trained model, made from its run and its record by a template.

It says where the model comes from, what the gate found and what was overridden, so that nobody who gets the model
alone has to ask. Nothing in it is more than run.json, the record beside the weights and the artifact's manifest say.
"""

from __future__ import annotations

import json
import re
from functools import cache

from jinja2 import Template

from lopd_store import gate, lineage
from lopd_store.card import environment
from lopd_store.manifest import Manifest
from lopd_store.provenance import CheckpointRecord
from lopd_train.config import TrainConfig

MODEL_CARD = "README.md"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


def render_model_card(
    record: CheckpointRecord, config: TrainConfig, artifact: Manifest | None, mixed: str | None = None
) -> str:
    """The card of the model that the record speaks of.

    `artifact` is what an opd run was trained on, `mixed` the digest of the SFT data that it had besides.
    """
    verdict = None if artifact is None else gate.judge(artifact.inputs, record.base)
    settings = {name: value for name, value in config.to_json().items() if value is not None and name != "objective"}
    return _template().render(
        record=record,
        base_model=_base_model(record, artifact),
        inputs=() if artifact is None else artifact.inputs,
        mixed=mixed,
        verdict=verdict,
        links=lineage.of_checkpoint(record, record.model, artifact=artifact),
        objective=config.objective if record.method == "opd" else "cross-entropy",
        settings={name: json.dumps(value) for name, value in settings.items()},
    )


def _base_model(record: CheckpointRecord, artifact: Manifest | None) -> str | None:
    """The nearest ancestor with a name on the Hub; a local directory would link to a stranger's model there."""
    rollouts = [] if artifact is None else [one.rollouts for one in artifact.inputs]
    policies = [one.policy_checkpoint for one in rollouts if one is not None]
    bases = [record.base, *(policy.base for policy in policies if policy is not None)]
    return next((one.name for one in bases if one.revision and _HUB_ID.fullmatch(one.name)), None)


@cache
def _template() -> Template:
    return environment("lopd_train").get_template("model_card.md.jinja")
