"""What the commands say of an artifact: its facts, and the positions of one of its rollouts."""

from __future__ import annotations

from typing import Any

from lopd_store import gate, layout
from lopd_store.building import SKIPPED
from lopd_store.errors import ConsistencyError
from lopd_store.identity import load_tokenizer_of
from lopd_store.license import License
from lopd_store.manifest import Manifest
from lopd_store.reader import Artifact

from . import console


def answer(artifact: Artifact, json: bool) -> None:
    """Say what is in an artifact, and on stderr whether training will refuse it."""
    facts = _facts(artifact)
    if json:
        console.answer(facts)
    else:
        _say_facts(facts)
    verdict = gate.judge(artifact.manifest.inputs)
    for finding in verdict.findings:
        if finding.audit is not None:
            console.warn(f"{finding.reason}: {finding.audit}")
    try:
        gate.enforce(verdict)
    except ConsistencyError as error:
        console.note(f"note: training will refuse this artifact: {error}")


def _facts(artifact: Artifact) -> dict[str, Any]:
    """What `inspect --json` answers."""
    manifest = artifact.manifest
    counts = manifest.counts
    size = sum(file.size for part in manifest.parts for file in part.files.values())
    return {
        "path": artifact.place,
        "fingerprint": artifact.fingerprint,
        "version": manifest.version,
        "counts": counts.to_json(),
        "skipped_rollouts": artifact.manifest.annotations.get(SKIPPED, 0),
        "parts": len(manifest.parts),
        "view": {"kinds": list(artifact.view.kinds), "parts": [artifact.view.parts.start, artifact.view.parts.stop]},
        "text": manifest.text,
        "bytes": size,
        "bytes_per_position": round(size / max(counts.positions, 1), 2),
        "mean_k": round(counts.entries / max(counts.positions, 1), 2),
        "encoding": manifest.encoding.to_json(),
        "reference_logprobs": manifest.reference_logprobs,
        "inputs": [_input_facts(manifest, index) for index in range(len(manifest.inputs))],
        "consistency": gate.judge(manifest.inputs).state,
    }


def _input_facts(manifest: Manifest, index: int) -> dict[str, Any]:
    """What one teacher scored, and what the audits found."""
    one = manifest.inputs[index]
    sft_audit = None if one.sft_audit is None else one.sft_audit.to_json() | one.sft_audit.found.to_json()
    rollouts_audit = None if one.rollouts_audit is None else one.rollouts_audit.to_json()
    counts = manifest.counts_of(index).to_json()
    return one.to_json() | {"counts": counts, "sft_audit": sft_audit, "rollouts_audit": rollouts_audit}


def _say_facts(facts: dict[str, Any]) -> None:
    counts, selection = facts["counts"], facts["encoding"]["selection"]
    console.table(
        [
            ("artifact", facts["path"]),
            ("fingerprint", facts["fingerprint"]),
            ("format", f"lopd {facts['version']}, {facts['encoding']['profile']}"),
            ("rollouts", f"{counts['rollouts']:,}{_skipped(facts['skipped_rollouts'])}"),
            ("positions", f"{counts['positions']:,} of {counts['tokens']:,} tokens"),
            ("parts", _parts(facts)),
            ("top-k", f"mean k {facts['mean_k']}; {_selection(selection)}"),
            ("size", f"{facts['bytes']:,} bytes, {facts['bytes_per_position']} per position"),
            *(row for one in facts["inputs"] for row in _input_rows(one)),
            ("consistency", facts["consistency"]),
        ]
    )


def _input_rows(one: dict[str, Any]) -> list[tuple[str, str]]:
    sft, rollouts, counts = one["sft"], one["rollouts"], one["counts"]
    size = f"{counts['rollouts']:,} rollouts, {counts['positions']:,} positions"
    return [
        *([] if one["domain"] is None else [("domain", f"{one['domain']}: {size}")]),
        ("teacher", _model(one["teacher"])),
        ("licence", str(License(**one["license"]))),
        ("SFT teacher", f"{_model(sft['teacher'])} ({sft['status']})" if sft["teacher"] else "unknown"),
        ("SFT data audit", _audit(one["sft_audit"])),
        ("reference policy", _model(rollouts["policy"]) if rollouts else "unknown"),
        ("rollouts audit", _audit(one["rollouts_audit"])),
    ]


def _audit(facts: dict[str, Any] | None) -> str:
    if facts is None:
        return "none"
    low, high = facts["interval"]
    effect = f"{facts['effect']:+.4f} nat per token (95 %: {low:+.4f} to {high:+.4f})"
    return f"{facts['verdict']}: z {facts['z']:.2f}, {effect}, {facts['positions']:,} positions"


def _selection(selection: dict[str, Any]) -> str:
    whose = "" if selection["rule"] == "teacher" else " of each model"
    return f"at most {selection['k_max']}{whose}, coverage {selection['coverage']:g}"


def _skipped(count: Any) -> str:
    """What the annotations say was left out; they are free-form, so it may be anything."""
    return f"; {count} of the file could not be scored" if count else ""


def _parts(facts: dict[str, Any]) -> str:
    kinds, (first, stop) = facts["view"]["kinds"], facts["view"]["parts"]
    if (first, stop) == (0, facts["parts"]) and len(kinds) == len(layout.FILE_KINDS):
        return f"{facts['parts']:,}"
    return f"partial copy: parts {first} to {stop - 1} of {facts['parts']:,}, {' and '.join(kinds)} files"


def _model(identity: dict[str, Any]) -> str:
    revision = f" @ {identity['revision'][:12]}" if identity["revision"] else ""
    return f"{identity['name']}{revision}  weights {identity['weights'][7:19]}…"


def positions(artifact: Artifact, rollout: int, model: str | None) -> list[dict[str, Any]]:
    """Each position of a rollout with the teacher's log-prob and its five most likely ids."""
    decode = _decoder(artifact, model)
    stored = artifact.rollout(rollout)
    topk = stored.topk
    offsets = None if topk is None else topk.offsets
    rows = []
    for position, token in enumerate(stored.response_ids.tolist()):
        likely = []
        if topk is not None and offsets is not None:
            entries = slice(int(offsets[position]), int(offsets[position + 1]))
            likely = list(zip(topk.ids[entries].tolist()[:5], topk.logprobs[entries].tolist()[:5], strict=True))
        rows.append(
            {
                "position": position,
                "id": token,
                "token": decode(token),
                "loss": bool(stored.loss_mask[position]),
                "sampled_logprob": float(stored.sampled_logprobs[position]),
                "top": [{"id": id, "token": decode(id), "logprob": logprob} for id, logprob in likely],
            }
        )
    return rows


def _decoder(artifact: Artifact, model: str | None) -> Any:
    """Turns an id into text with the tokenizer of `model`, which must be the artifact's; without one, into None."""
    if model is None:
        return lambda id: None
    tokenizer = load_tokenizer_of(model, artifact.manifest.inputs[0].teacher)  # all have one tokenizer
    return lambda id: tokenizer.decode([id])


def shown(entry: dict[str, Any]) -> str:
    """A token in quotes; one without text, or a piece of a character, by its id."""
    token = entry["token"]
    return f"#{entry['id']}" if token is None or "\N{REPLACEMENT CHARACTER}" in token else repr(token)


def top(position: dict[str, Any]) -> str:
    """The likely tokens of a position with their log-probs, in one line."""
    return "  ".join(f"{shown(entry)} {entry['logprob']:.2f}" for entry in position["top"])
