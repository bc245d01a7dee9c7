"""What `lopd-store inspect --lineage` answers: the chain of an artifact or a checkpoint, with what lies around it."""

from __future__ import annotations

import itertools
from pathlib import Path

import lopd_store
from lopd_store import gate, layout, lineage, strictjson
from lopd_store.digest import digest_file
from lopd_store.errors import InputError
from lopd_store.identity import ModelIdentity
from lopd_store.lineage import Link
from lopd_store.models import PROVENANCE_FILE
from lopd_store.provenance import CheckpointRecord, RolloutsRecord, read_checkpoint_record
from lopd_store.reader import Artifact
from lopd_store.rollouts import read_record
from lopd_store.statistic import Statistic

from . import console

_RUN_FILE = "run.json"  # as lopd_train.checkpoint writes it; it says where the inputs of a run lay

_CONFIGS = ("config.json", "adapter_config.json")  # one of them is in the directory of a model


def show(path: Path, *, json: bool) -> None:
    """Draw the chain from the SFT teacher to what is at this path."""
    artifact, links = _chain(path)
    weakest = lineage.weakest(links)
    consistency = None if artifact is None else gate.judge(artifact.manifest.inputs).state
    if json:
        facts = {"path": str(path), "links": [link.to_json() for link in links]}
        console.answer({**facts, "weakest": weakest, "consistency": consistency})
        return
    of_one = len({link.domain for link in links} - {None}) < 2  # then all hang together
    for _, branch in itertools.groupby(links, key=lambda link: None if of_one else link.domain):
        console.chain([[_title(link), *(f"  {line}" for line in _details(link))] for link in branch])
    console.say(f"weakest link: {weakest}")
    if consistency is not None:
        console.say(f"teacher consistency: {consistency}")


def _chain(path: Path) -> tuple[Artifact | None, tuple[Link, ...]]:
    """The artifact of a chain, where it is at hand, and its links."""
    record = None if _is_artifact(path) else read_checkpoint_record(path)
    if record is not None:
        return _of_checkpoint(path, record)
    if not _is_artifact(path) and any((path / name).is_file() for name in _CONFIGS):
        raise InputError(
            f"nothing says how `{path}` was trained",
            expected=f"`{PROVENANCE_FILE}` beside its weights",
            hint=f"lopd-store record checkpoint {path} --base MODEL --sft-data FILE",
        )
    artifact = lopd_store.open(path)
    return artifact, lineage.of_manifest(artifact.manifest, artifact.fingerprint)


def _of_checkpoint(path: Path, record: CheckpointRecord) -> tuple[Artifact | None, tuple[Link, ...]]:
    with console.progress("identity", "bytes", at_once=False) as meter:
        model = lopd_store.identify(path, on_bytes=meter.update)
    inputs, artifact = _inputs(path), None
    if record.method == "opd":
        artifact = _artifact(inputs.get("data", []), record.data)
        inputs = _inputs(inputs["model"][0]) if inputs.get("model") else {}
    sft_data = _sft_data(inputs.get("data", []), record)
    manifest = None if artifact is None else artifact.manifest
    return artifact, lineage.of_checkpoint(record, model, artifact=manifest, sft_data=sft_data)


def _inputs(directory: Path) -> dict[str, list[Path]]:
    """Where the model and the data of a run lay; empty where the directory does not say."""
    path = directory / _RUN_FILE
    if not path.is_file():
        return {}
    run = strictjson.loads(path.read_bytes(), where=str(path))
    inputs = run.get("inputs") if isinstance(run, dict) else None
    found = {}
    for name, value in inputs.items() if isinstance(inputs, dict) else ():
        paths = value.get("path") if isinstance(value, dict) else None
        paths = paths if isinstance(paths, list) else [paths]
        found[name] = [Path(path) for path in paths if isinstance(path, str)]
    return found


def _artifact(paths: list[Path], fingerprint: str | None) -> Artifact | None:
    """The artifact that a student was trained on, if it is still there."""
    there = [path for path in paths if _is_artifact(path)]
    if not there or digest_file(there[0] / layout.MANIFEST).sha256 != fingerprint:
        return None
    return lopd_store.open(there[0])


def _sft_data(paths: list[Path], record: CheckpointRecord) -> dict[str, RolloutsRecord]:
    """The records of the SFT data by their digests, of those files that are still there."""
    there = {digest_file(path).sha256: path for path in paths if path.suffix == ".parquet" and path.is_file()}
    found = {sft.data: read_record(there[sft.data]) for sft in record.sft if sft.data in there}
    return {digest: record for digest, record in found.items() if digest is not None and record is not None}


def _is_artifact(path: Path) -> bool:
    return (path / layout.MANIFEST).is_file()


def _title(link: Link) -> str:
    name = "" if link.name is None else f" {link.name}"
    domain = "" if link.domain is None else f"{link.domain}: "
    return f"{domain}{link.thing}{name}: {link.mark} ({link.reason})"


def _details(link: Link) -> list[str]:
    lines = [f"{link.made} {'unknown' if link.model is None else _model(link.model)}"]
    what = {"artifact": "fingerprint", "SFT checkpoint": "weights", "student": "weights"}.get(link.thing, "file")
    lines += [] if link.digest is None else [f"{what} {link.digest}"]
    lines += [] if link.prompts is None else [f"prompts {link.prompts}"]
    audited = {"artifact": "the SFT data under the teacher"}.get(link.thing, "")
    return lines + ([] if link.audit is None else [_audit(link.audit, audited)])


def _audit(audit: Statistic, what: str) -> str:
    return f"audit{f' of {what}' if what else ''}: {audit.verdict}, {audit}"


def _model(identity: ModelIdentity) -> str:
    revision = f" @ {identity.revision[:12]}" if identity.revision else ""
    return f"{identity.name}{revision}  weights {identity.weights[7:19]}…"
