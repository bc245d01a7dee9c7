"""Building an artifact: plan, score part by part, seal.

    build(teacher="teacher", rollouts="rollouts.parquet", output="artifact")

Until it is sealed the build lives in `artifact.building`, where plan.json says what is to be made and `done/` which
parts are. Killed at any moment, the same call goes on with the next part. Part boundaries and batches follow from the
rollouts alone, and every worker uses the same number of threads, so any number of workers makes the same bytes.

    build_share("2/4", teacher="teacher", rollouts="rollouts.parquet", output="artifact")    # on each of four nodes
    merge(output="artifact")
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from lopd_store import building as in_progress
from lopd_store import layout, models, reader, strictjson
from lopd_store.audit import audit_sft
from lopd_store.building import Share
from lopd_store.digest import digest_bytes, digest_contents
from lopd_store.durable import write_durably
from lopd_store.encoding import Encoding, Rule, make_encoding
from lopd_store.errors import DataError, InputError
from lopd_store.handout import OnNote, OnProgress, check_servers, torch_threads
from lopd_store.manifest import Counts, Scoring, parse
from lopd_store.plan import Plan, make_plan
from lopd_store.processes import require_main_guard
from lopd_store.remote import Remote, is_remote
from lopd_store.scoring import DONE, is_done, note_path
from lopd_store.survey import OnBad, OnSurveyed
from lopd_store.teachers import require_engine
from lopd_store.verifier import verify
from lopd_store.workers import count_workers, score_parts

OnAudited = Callable[[int, int], None]  # positions of SFT data, positions in all
_NAMED_BAD_ROLLOUTS = 10  # on stderr; build.json has them all


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `build` takes, but for where the artifact goes and who listens."""

    teacher: str | Path
    rollouts: str | Path
    sft: str | Path | None = None
    sft_data: str | Path | None = None
    domain: str | None = None
    reference: str | Path | None = None
    exact: bool = False
    k_min: int = 1
    k_max: int = 64
    coverage: float = 0.99
    text: bool = True
    on_bad_rollout: OnBad = "fail"
    engine: str = "transformers"
    server: str | None = None
    reference_server: str | None = None
    trust_server: bool = False
    max_noise: float | None = None
    dtype: str = "float32"
    device: str | None = None
    workers: int | None = 1
    threads: int = 1
    tensor_parallel_size: int = 1
    batch_tokens: int = 4096
    part_positions: int | None = None
    ray: str | None = None

    def plan(self, on_surveyed: OnSurveyed | None = None) -> Plan:
        """Read the inputs and settle what is to be made."""
        reference = None if self.reference is None else str(self.reference)
        require_engine(
            self.engine,
            reference=reference,
            server=self.server,
            reference_server=self.reference_server,
            tensor_parallel_size=self.tensor_parallel_size,
        )
        return make_plan(
            teacher=str(self.teacher),
            rollouts=Path(self.rollouts),
            sft=None if self.sft is None else Path(self.sft),
            sft_data=None if self.sft_data is None else Path(self.sft_data),
            domain=self.domain,
            encoding=self.encoding(),
            scoring=Scoring(engine=self.engine, dtype=self.dtype),
            reference=reference,
            server=self.server,
            reference_server=self.reference_server,
            text=self.text,
            device=self.device,
            threads=self.threads,
            tensor_parallel_size=self.tensor_parallel_size,
            batch_tokens=self.batch_tokens,
            part_positions=self.part_positions,
            on_bad_rollout=self.on_bad_rollout,
            on_surveyed=on_surveyed,
        )

    def encoding(self) -> Encoding:
        """What is stored of each distribution."""
        rule: Rule = "teacher" if self.reference is None else "teacher+reference"
        return make_encoding(exact=self.exact, rule=rule, k_min=self.k_min, k_max=self.k_max, coverage=self.coverage)

    def command(self, output: str) -> list[str]:
        """The arguments of `lopd-store build` that mean the same."""
        words = ["--output", output]
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name == "text":
                words += [] if value else ["--no-text"]
            elif isinstance(value, bool):
                words += [f"--{item.name.replace('_', '-')}"] if value else []
            elif value is not None and (value != item.default or item.name == "workers"):  # unsaid, it means all
                words += [f"--{item.name.replace('_', '-')}", str(value)]
        return words


def build(
    *,
    teacher: str | Path,
    rollouts: str | Path,
    output: str | Path,
    sft: str | Path | None = None,
    sft_data: str | Path | None = None,
    domain: str | None = None,
    reference: str | Path | None = None,
    exact: bool = False,
    k_min: int = 1,
    k_max: int = 64,
    coverage: float = 0.99,
    text: bool = True,
    on_bad_rollout: OnBad = "fail",
    engine: str = "transformers",
    server: str | None = None,
    reference_server: str | None = None,
    trust_server: bool = False,
    max_noise: float | None = None,
    dtype: str = "float32",
    device: str | None = None,
    workers: int | None = 1,
    threads: int = 1,
    tensor_parallel_size: int = 1,
    batch_tokens: int = 4096,
    part_positions: int | None = None,
    ray: str | None = None,
    on_progress: OnProgress | None = None,
    on_audited: OnAudited | None = None,
    on_surveyed: OnSurveyed | None = None,
    on_note: OnNote | None = None,
) -> reader.Artifact:
    """Score rollouts with the teacher and seal the result as an artifact, which is returned opened.

    `sft` names the SFT data, checkpoint or record where the rollouts do not carry it. `sft_data` is the file of SFT
    data: given it, some of it is audited under the teacher (`on_audited` hears how far), and `sft` may be left out.
    `reference` is the policy that sampled the rollouts: given it, its own most likely ids are stored too, with the
    log-probs of both models, and the rollouts are audited under it.
    Without `text` the artifact has token ids and log-probs only. A rollout that cannot be scored is an error, or with
    `on_bad_rollout="skip"` left out, which the manifest and build.json say. `server` is the vLLM server of the engine
    `http`, and `reference_server` another that runs the reference policy; with `trust_server` their log-probs are not
    compared with those of the models' files, which may be too large to run here.
    Before the first part a few rollouts are scored twice, in other batches; a log-prob that changes by more than
    `max_noise` nats is an error (None stands for 0.01 in float32 and 1 in half precision). `workers` is the number of
    processes, None for one per GPU or processor; `threads` is the number of CPU threads of each, which unlike `workers`
    can change the last bits of a log-prob. So can `tensor_parallel_size`, the number of GPUs over which the teacher of
    each worker is split, by a process for each. A script that asks for several of either needs
    `if __name__ == "__main__":`. `ray` is the address of a Ray cluster, or `local`, whose actors are the workers. The
    first Ctrl-C stops after the parts in hand, the second at once; `on_note` hears lines for people, `on_surveyed` how
    far the rollouts are read.
    """
    settings = Settings(
        teacher=teacher,
        rollouts=rollouts,
        sft=sft,
        sft_data=sft_data,
        domain=domain,
        reference=reference,
        exact=exact,
        k_min=k_min,
        k_max=k_max,
        coverage=coverage,
        text=text,
        on_bad_rollout=on_bad_rollout,
        engine=engine,
        server=server,
        reference_server=reference_server,
        trust_server=trust_server,
        max_noise=max_noise,
        dtype=dtype,
        device=device,
        workers=workers,
        threads=threads,
        tensor_parallel_size=tensor_parallel_size,
        batch_tokens=batch_tokens,
        part_positions=part_positions,
        ray=ray,
    )
    if is_remote(output):
        raise InputError(f"`{output}` is no directory", hint="`lopd_store.publish` makes an artifact there")
    with _scored(settings, output, None, on_progress, on_audited, on_surveyed, on_note) as (plan, building, used):
        return _seal(plan, building, Path(output), used)


@dataclass(frozen=True, kw_only=True)
class Published:
    """An artifact in object storage."""

    address: str
    fingerprint: str
    counts: Counts


def publish(
    *,
    output: str,
    on_progress: OnProgress | None = None,
    on_audited: OnAudited | None = None,
    on_surveyed: OnSurveyed | None = None,
    on_note: OnNote | None = None,
    **options: Any,
) -> Published:
    """Like `build` with the same options, into object storage: `output` is an address such as `s3://bucket/name`.

    Every part is sent when it is done and removed here, and the manifest is sent last. The same call goes on on any
    machine.
    """
    hearing = (on_progress, on_audited, on_surveyed, on_note)
    with _scored(Settings(**options), output, None, *hearing) as (plan, building, used):
        return _publish(Remote(output), plan, building, used)


@dataclass(frozen=True, kw_only=True)
class ScoredShare:
    """What one job of several has done."""

    building: Path
    parts: tuple[int, ...]  # the numbers of its parts
    missing: tuple[int, ...]  # parts of other shares that are not here yet


def build_share(
    share: str,
    *,
    output: str | Path,
    on_progress: OnProgress | None = None,
    on_audited: OnAudited | None = None,
    on_surveyed: OnSurveyed | None = None,
    on_note: OnNote | None = None,
    **options: Any,
) -> ScoredShare:
    """Score every N-th part of an artifact, given `I/N`, and leave the parts for `merge`.

    `options` are those of `build`. The jobs may work in one directory that they share, or each in its own.
    """
    mine = Share.parse(share)
    hearing = (on_progress, on_audited, on_surveyed, on_note)
    with _scored(Settings(**options), output, mine, *hearing) as (plan, building, _):
        return ScoredShare(
            building=building,
            parts=tuple(mine.parts(len(plan.parts))),
            missing=tuple(in_progress.missing_parts(building, plan)),
        )


def merge_remote(output: str) -> Published:
    """Seal the parts that several jobs have sent to the same address."""
    remote = Remote(output)
    with in_progress.locked(remote.building), in_progress.what_is_done_stays(remote.building, None):
        remote.require_free()
        remote.fetch()
        plan = in_progress.read_plan(remote.building)
        in_progress.require_whole(remote.building, plan)
        return _publish(remote, plan, remote.building, None)


def merge(*sources: str | Path, output: str | Path) -> reader.Artifact:
    """Seal the parts that several jobs have scored: those in `output.building`, and those of other such directories.

    Every file is compared with the digests that were noted when it was written. Raises DataError, with the commands
    to type, where parts are missing.
    """
    output = Path(output)
    building = layout.building_directory(output)
    directories = [building, *map(Path, sources)] if building.exists() or not sources else [*map(Path, sources)]
    plan = in_progress.read_plan(directories[0])
    for directory in directories[1:]:
        in_progress.require_same(plan.to_json(), in_progress.read_plan(directory).to_json(), str(directory))
    with in_progress.locked(building), in_progress.what_is_done_stays(building, None):
        _require_free(output)
        for directory in directories:
            in_progress.copy_tools(directory, building)
        for number in range(len(plan.parts)):
            source = next((place for place in directories if is_done(place, number)), None)
            if source not in (None, building):  # what is here already is verified with everything else
                _take(number, plan, source, building)
        in_progress.require_whole(building, plan)
        return _seal(plan, building, output, None)


@contextmanager
def _scored(
    settings: Settings,
    output: str | Path,
    share: Share | None,
    on_progress: OnProgress | None,
    on_audited: OnAudited | None,
    on_surveyed: OnSurveyed | None,
    on_note: OnNote | None,
) -> Iterator[tuple[Plan, Path, int | None]]:
    """The build in progress with all parts scored, or those of the share, and how many workers were used; locked."""
    require_main_guard()
    remote = Remote(str(output)) if is_remote(output) else None
    _require_free(output, remote)
    plan = settings.plan(on_surveyed)
    if on_note is not None:
        _note_odd_rollouts(plan, on_note)
    building = layout.building_directory(Path(output)) if remote is None else remote.building
    numbers = range(len(plan.parts)) if share is None else share.parts(len(plan.parts))
    workers = settings.workers if settings.ray else count_workers(settings.workers, plan, len(numbers))
    with in_progress.locked(building, share), in_progress.what_is_done_stays(building, share):
        _require_free(output, remote)  # another build may have sealed it while this one was planned
        in_progress.begin(building, plan, settings.command(str(output)))
        check_servers(plan, weights=not settings.trust_server)
        if remote is not None:
            remote.begin(plan, settings.command(str(output)))
        if share is None or share.index == 1:
            _audit_sft(plan, building, on_audited)
        if remote is not None:
            remote.send_what_is_missing(numbers)
        score_parts(
            plan,
            building,
            numbers,
            workers=workers,
            ray=settings.ray,
            on_bad=settings.on_bad_rollout,
            max_noise=settings.max_noise,
            on_progress=on_progress,
            on_note=on_note,
            on_part=None if remote is None else remote.send,
        )
        yield plan, building, workers


def _audit_sft(plan: Plan, building: Path, on_audited: OnAudited | None) -> None:
    """Leave beside the plan what the audit of the SFT data finds, where there is such data and no audit yet."""
    path = building / in_progress.SFT_AUDIT
    if plan.sft_data_path is None or path.is_file():
        return
    with torch_threads(plan.threads):
        found = audit_sft(
            teacher=plan.teacher_path,
            data=plan.sft_data_path,
            dtype=plan.inputs.scoring.dtype,
            device="auto" if plan.device == "cuda" and plan.tensor_parallel_size > 1 else plan.device,
            batch_tokens=plan.batch_tokens,
            on_progress=on_audited,
        )
    models.free_memory()  # for the teachers of other processes
    write_durably(path, strictjson.pretty(found.to_json()))


def _seal(plan: Plan, building: Path, output: Path, workers: int | None) -> reader.Artifact:
    """Seal a build, and let it appear once every byte and value of it is verified."""
    in_progress.write_seal(plan, building, workers=workers)
    for found in verify(building).findings:
        again = f"remove `{building / DONE}/NNNNN.json` of the part, to score it again"
        raise replace(found, hint=f"remove `{building / found.where}`" if found.code == "A002" else again).to_error()
    in_progress.rename_into_place(building, output)
    return reader.open(output)


def _publish(remote: Remote, plan: Plan, building: Path, workers: int | None) -> Published:
    data = in_progress.write_seal(plan, building, workers=workers)
    remote.seal(plan, data)
    return Published(address=remote.address, fingerprint=digest_bytes(data), counts=parse(data).counts)


def _take(number: int, plan: Plan, source: Path, building: Path) -> None:
    """Check the files of a part that is done elsewhere, and copy them."""
    note = in_progress.checked_note(source, number, plan)
    for kind, digests in note.files.items():
        path = source / layout.part_file(number, kind)
        data = path.read_bytes() if path.is_file() else b""
        if digest_contents(data) != digests:
            raise DataError(
                f"`{path}` is not what was written",
                expected=f"{digests.sha256}  ({digests.size} bytes)",
                actual=f"{digest_contents(data).sha256}  ({len(data)} bytes)" if data else "nothing",
                hint=f"copy it again, or remove `{note_path(source, number)}` and score the part again",
            )
        write_durably(building / layout.part_file(number, kind), data)
    write_durably(note_path(building, number), note_path(source, number).read_bytes())


def _require_free(output: str | Path, remote: Remote | None = None) -> None:
    if remote is not None:
        remote.require_free()
    elif Path(output).exists():
        raise InputError(f"`{output}` exists", hint="choose another `--output`, or move it away")


def _note_odd_rollouts(plan: Plan, on_note: OnNote) -> None:
    if plan.two_bos:
        total = sum(part.rollouts for part in plan.parts)
        on_note(
            f"{plan.two_bos:,} of {total:,} prompts begin with two BOS tokens, which the teacher has hardly ever read; "
            "was a text that had one tokenised with special tokens?"
        )
    if not plan.skipped:
        return
    for bad in plan.skipped[:_NAMED_BAD_ROLLOUTS]:
        on_note(f"skipped: {bad}")
    on_note(f"{len(plan.skipped):,} rollouts cannot be scored and are skipped; build.json will list them")
