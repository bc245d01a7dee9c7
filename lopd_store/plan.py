"""The plan of a build: everything that decides the bytes of an artifact, settled before the first token is scored.

Part borders follow from the rollouts alone, so one worker and sixty-four make the same parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lopd_store import models, strictjson
from lopd_store.container import MAX_VALUES
from lopd_store.digest import digest_json
from lopd_store.encoding import Encoding
from lopd_store.errors import DataError, InputError
from lopd_store.identity import ModelIdentity, identify
from lopd_store.license import read_license
from lopd_store.manifest import INPUTS_MEMBERS, Inputs, Scoring, read_inputs
from lopd_store.provenance import (
    DOMAINS_EXPECTED,
    SftProvenance,
    are_domains,
    declared,
    parse_checkpoint_record,
    sft_of_checkpoint,
    sft_of_data,
    sft_of_policy,
)
from lopd_store.rollouts import RolloutsFile
from lopd_store.survey import BadRollout, Limits, OnBad, OnSurveyed, Survey, survey

MAX_PART_POSITIONS = 1 << 20
MIN_PART_POSITIONS = 1 << 13
MAX_PART_TOKENS = 1 << 24  # a part is closed here too, so that long prompts cannot make it large
_MOST_PARTS = 60_000  # a manifest says about 1,000 bytes of each, and is at most 64 MiB
_PARTS_WANTED = 16  # enough to share among workers and to lose little when killed
# What can change a bit of a log-prob, or how arrays are packed; docs/adr/0016 says why a plan has them.
_LIBRARIES = ("lopd", "torch", "transformers", "numpy", "numba", "pcodec", "numcodecs", "zarr", "pyarrow")


@dataclass(frozen=True, kw_only=True)
class PlannedPart:
    """Rows [start, stop) of the file, and how much of them there is to score."""

    start: int
    stop: int
    rollouts: int
    tokens: int
    positions: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that decides the bytes of an artifact, settled before the first token is scored."""

    teacher_path: str  # where to load it; not part of what is planned
    rollouts_path: str  # likewise
    reference_path: str | None  # likewise
    sft_data_path: str | None  # likewise
    sft_data: str | None  # digest of the SFT data to audit
    server: str | None  # likewise
    reference_server: str | None  # likewise
    inputs: Inputs
    encoding: Encoding
    reference_logprobs: bool
    text: bool
    device: str
    threads: int
    tensor_parallel_size: int  # devices that each worker's teacher is split over
    batch_tokens: int
    parts: tuple[PlannedPart, ...]
    skipped: tuple[BadRollout, ...]
    versions: dict[str, str]  # of the libraries that decide bytes
    two_bos: int = 0  # prompts that begin with two BOS tokens; for people, not part of what is planned

    def to_json(self) -> dict[str, Any]:
        """What plan.json holds; equal plans make equal artifacts."""
        return {
            **self.inputs.to_json(),
            "sft_data": self.sft_data,
            "encoding": self.encoding.to_json(),
            "reference_logprobs": self.reference_logprobs,
            "text": self.text,
            "device": self.device,
            "threads": self.threads,
            "tensor_parallel_size": self.tensor_parallel_size,
            "batch_tokens": self.batch_tokens,
            "skipped": [list(astuple(bad)) for bad in self.skipped],
            "parts": [list(astuple(part)) for part in self.parts],
            "versions": self.versions,
        }

    @classmethod
    def from_json(cls, value: Any, *, where: str) -> Plan:
        """Read what `to_json` gave; it does not say where things are on this machine."""
        numbers = ("threads", "tensor_parallel_size", "batch_tokens")
        plain = ("sft_data", "reference_logprobs", "text", "device", "versions", *numbers)
        names = (*INPUTS_MEMBERS, *plain, "encoding", "skipped", "parts")
        value = strictjson.members(value, names, where=where)
        return cls(
            **{name: value[name] for name in plain},
            teacher_path="",
            rollouts_path="",
            reference_path=None,
            server=None,
            reference_server=None,
            sft_data_path=None,
            inputs=read_inputs({name: value[name] for name in INPUTS_MEMBERS}, where),
            encoding=Encoding.from_json(value["encoding"], where=f"{where}: encoding", open_ended=False),
            skipped=tuple(BadRollout(row=row, why=why) for row, why in value["skipped"]),
            parts=tuple(
                PlannedPart(start=start, stop=stop, rollouts=rollouts, tokens=tokens, positions=positions)
                for start, stop, rollouts, tokens, positions in value["parts"]
            ),
        )

    @cached_property
    def digest(self) -> str:
        """The digest that a part which is done carries, so that parts of two plans never meet."""
        return digest_json(self.to_json())

    def limits(self, context_length: int | None) -> Limits:
        """What a rollout must fit into, in an engine with this context."""
        return _limits(self.inputs.teacher, context_length, self.encoding)


def make_plan(
    *,
    teacher: str,
    rollouts: Path,
    sft: Path | None,
    sft_data: Path | None = None,
    domain: str | None = None,
    encoding: Encoding,
    scoring: Scoring,
    reference: str | None = None,
    server: str | None = None,
    reference_server: str | None = None,
    text: bool = True,
    device: str | None = None,
    threads: int = 1,
    tensor_parallel_size: int = 1,
    batch_tokens: int = 4096,
    part_positions: int | None = None,
    on_bad_rollout: OnBad = "fail",
    on_surveyed: OnSurveyed | None = None,
) -> Plan:
    """Read the inputs, check what can be checked before scoring, and draw the borders of the parts."""
    for name, number in (
        ("threads", threads),
        ("tensor_parallel_size", tensor_parallel_size),
        ("batch_tokens", batch_tokens),
    ):
        if number < 1:
            raise InputError(f"`{name}` is out of range", expected="1 or more", actual=number)
    if domain is not None and not are_domains([domain]):
        raise InputError(f"`{domain}` is not a name for a domain", expected=DOMAINS_EXPECTED)
    device = models.pick_device(device)
    if tensor_parallel_size > 1 and scoring.engine == "transformers":
        from lopd_store.teachers.tensor_parallel import require_tensor_parallel

        for model in filter(None, (teacher, reference)):
            require_tensor_parallel(model, tensor_parallel_size, device)
    file = RolloutsFile(rollouts)
    if len(file) == 0:
        raise DataError(f"`{rollouts}` has no rollouts", hint="sample some with `lopd-store generate`")
    identity = identify(teacher)
    file.require_tokenizer_of(identity, "the teacher")
    if reference is not None:
        _check_reference(file, reference)
    provenance = _sft_provenance(file, sft_data if sft is None else sft, domain)
    context_length = _context_length(*([teacher] if reference is None else [teacher, reference]))
    bos = models.load_tokenizer(models.find(teacher)).bos_token_id
    limits = _limits(identity, context_length, encoding)
    found = survey(file, limits, bos=bos, on_bad=on_bad_rollout, on_surveyed=on_surveyed)
    return Plan(
        teacher_path=teacher,
        rollouts_path=str(rollouts),
        reference_path=reference,
        sft_data_path=None if sft_data is None else str(sft_data),
        sft_data=None if sft_data is None else _sft_data_digest(sft_data, provenance),
        server=server,
        reference_server=reference_server,
        inputs=Inputs(
            domain=domain or provenance.domain,
            teacher=identity,
            license=read_license(teacher),
            scoring=scoring,
            sft=provenance,
            rollouts_file=file.digest(),
            rollouts=file.record,
        ),
        encoding=encoding,
        reference_logprobs=found.has_logprobs or reference is not None,
        text=text,
        device=device,
        threads=threads,
        tensor_parallel_size=tensor_parallel_size,
        batch_tokens=batch_tokens,
        parts=_draw_parts(found, part_positions, encoding, file),
        skipped=found.bad,
        versions={name: version(name) for name in _LIBRARIES},
        two_bos=found.two_bos,
    )


def differences(wanted: Any, found: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The members of two JSON values that differ, each by its path: `encoding.selection.k_max`, 64, 40."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        for name in [*wanted, *(name for name in found if name not in wanted)]:
            path = f"{where}.{name}" if where else name
            yield from differences(wanted.get(name), found.get(name), path)
    elif wanted != found:
        yield where, wanted, found


def part_borders(
    positions: npt.ArrayLike,  # [rows]
    part_positions: int | None = None,
    *,
    most_entries: int = 1,
    tokens: npt.ArrayLike | None = None,  # [rows]
) -> tuple[tuple[int, int], ...]:
    """Rows [start, stop) of each part: whole rollouts, each part closed once it has `part_positions` positions.

    A part has at most `MAX_VALUES` entries, so one with a great `k_max` has fewer positions; and it is closed once it
    has `MAX_PART_TOKENS` tokens.
    """
    limit = min(MAX_PART_POSITIONS, _most_positions(most_entries))
    lengths = np.asarray(positions)
    sizes = lengths if tokens is None else np.asarray(tokens)
    if part_positions is None:
        part_positions = min(max(int(lengths.sum(dtype=np.int64)) // _PARTS_WANTED, MIN_PART_POSITIONS), limit)
    elif not 1 <= part_positions <= limit:
        raise InputError("`part_positions` is out of range", expected=f"1 to {limit}", actual=part_positions)
    borders, start, here, tokens_here = [], 0, 0, 0
    for row, (length, size) in enumerate(zip(lengths, sizes, strict=True)):
        here, tokens_here = here + int(length), tokens_here + int(size)
        if here >= part_positions or tokens_here >= MAX_PART_TOKENS:
            borders.append((start, row + 1))
            start, here, tokens_here = row + 1, 0, 0
    if start < len(lengths):
        borders.append((start, len(lengths)))
    if len(borders) > _MOST_PARTS:
        raise InputError(
            f"{len(borders)} parts are too many",
            expected=f"at most {_MOST_PARTS}",
            hint="build several artifacts, each of a part of the rollouts",
        )
    return tuple(borders)


def _most_positions(most_entries: int) -> int:
    """Positions of one rollout that fit into a part, however full that is already."""
    return MAX_VALUES // most_entries // 2


def _limits(teacher: ModelIdentity, context_length: int | None, encoding: Encoding) -> Limits:
    return Limits(
        vocab_size=teacher.vocab_size,
        context_length=context_length,
        positions=_most_positions(encoding.most_entries),
    )


def _context_length(*names: str) -> int | None:
    """The shortest context among these models, as their configs say."""
    lengths = [models.context_length(models.load_config(models.find(name))) for name in names]
    return min((length for length in lengths if length is not None), default=None)


def _draw_parts(
    found: Survey, part_positions: int | None, encoding: Encoding, file: RolloutsFile
) -> tuple[PlannedPart, ...]:
    positions, prompts = found.response_lengths, found.prompt_lengths
    borders = part_borders(positions, part_positions, most_entries=encoding.most_entries, tokens=prompts + positions)
    parts = []
    for start, stop in borders:
        # A rollout that can be scored has a prompt, and of a bad one no token counts.
        rollouts = int((prompts[start:stop] > 0).sum())
        scored = int(positions[start:stop].sum())
        tokens = scored + int(prompts[start:stop].sum())
        if rollouts:
            parts.append(PlannedPart(start=start, stop=stop, rollouts=rollouts, tokens=tokens, positions=scored))
    if not parts:
        raise DataError(f"no rollout of `{file.path}` can be scored", actual=f"{found.bad[0]}, and so on")
    return tuple(parts)


def read_sft(path: Path, policy: ModelIdentity | None, domain: str | None = None) -> SftProvenance:
    """What `build --sft RECORD` names: SFT data (Parquet), a checkpoint directory, or a checkpoint record.

    It is `declared` where only the user's word ties it to the policy that sampled the rollouts. Raises InputError
    where it is the record of another checkpoint.
    """
    if path.is_dir():
        path = path / models.PROVENANCE_FILE
    if not path.is_file():
        raise InputError(f"no SFT provenance at `{path}`", hint="name SFT data, a checkpoint directory, or its record")
    if path.suffix == ".parquet":
        file = RolloutsFile(path)
        return declared(sft_of_data(file.record, file.digest(), domain))
    record = parse_checkpoint_record(path.read_bytes(), where=str(path))
    if policy is None:
        return declared(sft_of_checkpoint(record, domain))
    policy.require(
        record.model,
        f"`--sft {path}` is the record of another checkpoint than the policy that sampled the rollouts",
        hint="name the checkpoint that sampled the rollouts, or the SFT data that it was trained on",
    )
    return sft_of_checkpoint(record, domain)


def _sft_provenance(file: RolloutsFile, sft: Path | None, domain: str | None) -> SftProvenance:
    carried = sft_of_policy(file.record, domain)
    if sft is None:
        return carried
    named = read_sft(sft, None if file.record is None else file.record.policy, domain)
    if carried.teacher and named.teacher and (differences := carried.teacher.differences(named.teacher)):
        raise InputError(
            f"`--sft {sft}` names another teacher than the rollouts themselves",
            expected=f"{carried.teacher.name}, as recorded in `{file.path}`",
            actual=f"{named.teacher.name}, which differs in {', '.join(differences)}",
            hint="leave `--sft` out: the rollouts carry the record of their policy",
        )
    if carried.teacher is not None:
        return carried
    is_recorded = file.record is not None and file.record.status == "recorded"
    return named if is_recorded else declared(named)  # of a policy that only a person's word ties to these rollouts


def _sft_data_digest(path: Path, sft: SftProvenance) -> str:
    """The digest of the SFT data to audit, which must be what the policy was trained on, where that is known."""
    digest = RolloutsFile(path).digest()
    if sft.data not in (None, digest):
        raise InputError(
            f"`{path}` is not the SFT data of the reference policy",
            expected=sft.data,
            actual=digest,
            hint="name the file that the reference policy was trained on, or leave `--sft-data` out",
        )
    return digest


def _check_reference(file: RolloutsFile, reference: str) -> None:
    """The model beside the teacher must be the policy that sampled the rollouts, or its log-probs mean nothing."""
    if file.record is None:
        raise InputError(
            f"`{file.path}` does not say which policy sampled it, so `{reference}` may be another",
            hint="sample the rollouts with `lopd-store generate`, which records the policy",
        )
    file.record.policy.require(identify(reference), f"`{reference}` is not the policy that sampled the rollouts")
