"""Building an artifact: plan, score part by part, seal.

    build(teacher="teacher", rollouts="rollouts.parquet", output="artifact")

Until it is sealed the build lives in `artifact.building`, where plan.json says what is to be made and `done/` which
parts are. Killed at any moment, the same call goes on with the next part. Part boundaries and batches follow from the
rollouts alone, and every worker uses the same number of threads, so any number of workers makes the same bytes.
"""

from __future__ import annotations

import platform
import shutil
import time
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from lopd_store import layout, reader, strictjson
from lopd_store.audit import audit_sft
from lopd_store.card import render_card
from lopd_store.digest import digest_bytes, digest_json
from lopd_store.durable import sync_directory, write_durably
from lopd_store.encoding import Rule, make_encoding
from lopd_store.errors import InputError, LopdError
from lopd_store.manifest import Counts, Manifest, Scoring, render
from lopd_store.plan import Plan, make_plan
from lopd_store.scoring import DONE, read_note
from lopd_store.statistic import SftAudit, add_up
from lopd_store.workers import OnProgress, count_workers, score_parts, torch_threads

_PLAN = "plan.json"
_SFT_AUDIT = "sft-audit.json"


def build(
    *,
    teacher: str | Path,
    rollouts: str | Path,
    output: str | Path,
    sft: str | Path | None = None,
    sft_data: str | Path | None = None,
    reference: str | Path | None = None,
    exact: bool = False,
    k_min: int = 1,
    k_max: int = 64,
    coverage: float = 0.99,
    text: bool = True,
    engine: str = "transformers",
    dtype: str = "float32",
    device: str | None = None,
    workers: int | None = 1,
    threads: int = 1,
    batch_tokens: int = 4096,
    part_positions: int | None = None,
    on_progress: OnProgress | None = None,
    on_audited: OnProgress | None = None,
) -> reader.Artifact:
    """Score rollouts with the teacher and seal the result as an artifact, which is returned opened.

    `sft` names the SFT data, checkpoint or record where the rollouts do not carry it. `sft_data` is the file of SFT
    data: given it, some of it is audited under the teacher (`on_audited` hears how far), and `sft` may be left out.
    `reference` is the policy that sampled the rollouts: given it, its own most likely ids are stored too, with the
    log-probs of both models, and the rollouts are audited under it.
    Without `text` the artifact has token ids and log-probs only. `workers` is the number of processes, None for one
    per processor (a script that asks for several needs `if __name__ == "__main__":`); `threads` is the number of
    CPU threads of each, which unlike `workers` can change the last bits of a log-prob.
    """
    output = Path(output)
    if output.exists():
        raise InputError(f"`{output}` exists", hint="choose another `--output`, or move it away")
    rule: Rule = "teacher" if reference is None else "teacher+reference"
    encoding = make_encoding(exact=exact, rule=rule, k_min=k_min, k_max=k_max, coverage=coverage)
    plan = make_plan(
        teacher=str(teacher),
        rollouts=Path(rollouts),
        sft=None if sft is None else Path(sft),
        sft_data=None if sft_data is None else Path(sft_data),
        encoding=encoding,
        scoring=Scoring(engine=engine, dtype=dtype),
        reference=None if reference is None else str(reference),
        text=text,
        device=device,
        threads=threads,
        batch_tokens=batch_tokens,
        part_positions=part_positions,
    )
    building = layout.building_directory(output)
    _start_or_resume(building, plan)
    started = time.monotonic()
    count = count_workers(workers, plan)
    try:
        sft_audit = _audit_sft(plan, building, on_audited)
        score_parts(plan, building, count, on_progress)
    except LopdError:
        _discard_if_nothing_is_done(building)
        raise
    _seal(plan, building, output, sft_audit, seconds=time.monotonic() - started, workers=count)
    return reader.open(output)


def _start_or_resume(building: Path, plan: Plan) -> None:
    """Make the directory of the build in progress, or check that the one there follows the same plan."""
    path, wanted = building / _PLAN, plan.to_json()
    (building / layout.PARTS).mkdir(parents=True, exist_ok=True)
    (building / DONE).mkdir(exist_ok=True)
    if path.is_file():
        found = strictjson.loads(path.read_bytes(), where=str(path))
        changed = [name for name in wanted if found.get(name) != wanted[name]]
        if not changed:
            return
        if any((building / DONE).iterdir()):
            raise InputError(
                f"`{building}` was begun with another plan",
                expected="the same " + ", ".join(f"`{name}`" for name in changed),
                actual="they changed since",
                hint=f"go on with the old settings, or remove `{building}` to begin anew",
            )
    (building / _SFT_AUDIT).unlink(missing_ok=True)
    write_durably(path, strictjson.pretty(wanted))


def _audit_sft(plan: Plan, building: Path, on_audited: OnProgress | None) -> SftAudit | None:
    """What the audit of the SFT data found, now or before an interruption; None where there is none to audit."""
    if plan.sft_data_path is None:
        return None
    path = building / _SFT_AUDIT
    if not path.is_file():
        with torch_threads(plan.threads):
            found = audit_sft(
                teacher=plan.teacher_path,
                data=plan.sft_data_path,
                dtype=plan.inputs.scoring.dtype,
                device=plan.device,
                batch_tokens=plan.batch_tokens,
                on_progress=on_audited,
            )
        write_durably(path, strictjson.pretty(found.to_json()))
    return SftAudit.from_json(strictjson.loads(path.read_bytes(), where=str(path)), where=str(path))


def _discard_if_nothing_is_done(building: Path) -> None:
    """Leave nothing behind when the inputs turn out to be wrong at the first part."""
    if not any((building / DONE).iterdir()):
        for name in (_PLAN, _SFT_AUDIT):
            (building / name).unlink(missing_ok=True)
        shutil.rmtree(building / DONE)
        shutil.rmtree(building / layout.PARTS)
        with suppress(OSError):  # not empty: somebody else's files
            building.rmdir()


def _seal(
    plan: Plan, building: Path, output: Path, sft_audit: SftAudit | None, *, seconds: float, workers: int
) -> None:
    entries, audits = zip(*(read_note(building, number) for number in range(len(plan.parts))), strict=True)
    audited = [audit for audit in audits if audit is not None]
    total = {name: sum(getattr(entry.counts, name) for entry in entries) for name in entries[0].counts.to_json()}
    manifest = Manifest(
        counts=Counts(**total),
        encoding=plan.encoding,
        inputs=replace(plan.inputs, sft_audit=sft_audit, rollouts_audit=add_up(audited) if audited else None),
        parts=entries,
        reference_logprobs=plan.reference_logprobs,
        text=plan.text,
    )
    data = render(manifest)
    happened = {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "positions_per_second": round(manifest.counts.positions / max(seconds, 1e-9), 1),
        "workers": workers,
        "threads": plan.threads,
        "device": plan.device,
        "plan": digest_json(plan.to_json()),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("lopd", "torch", "transformers", "zarr", "numcodecs", "pyarrow")},
    }
    write_durably(building / layout.BUILD_RECORD, strictjson.pretty(happened))
    write_durably(building / layout.CARD, render_card(manifest, digest_bytes(data)).encode())
    write_durably(building / layout.MANIFEST, data)
    building.rename(output)
    sync_directory(output.parent)
    # What a resumed build needs goes last: killed before this, the same call finds every part done and seals again.
    for name in (_PLAN, _SFT_AUDIT):
        (output / name).unlink(missing_ok=True)
    shutil.rmtree(output / DONE)
