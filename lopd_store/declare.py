"""Provenance by hand, for who sampled or fine-tuned with other tools: Axolotl, LLaMA-Factory, TRL.

    declare_rollouts("theirs.parquet", policy="teacher", output="sft.parquet")
    declare_checkpoint("sft", base="base", sft_data="sft.parquet")

Models are identified by their files as always; that they made these rollouts or this checkpoint is a person's word.
It is `declared`, and so is whatever rests on it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from lopd_store import models, strictjson
from lopd_store.digest import digest_file
from lopd_store.durable import write_durably
from lopd_store.errors import DataError, InputError
from lopd_store.identity import ModelIdentity, identify
from lopd_store.models import PROVENANCE_FILE
from lopd_store.provenance import (
    CheckpointRecord,
    RolloutsRecord,
    Sampling,
    SftProvenance,
    are_domains,
    by_domain,
    read_checkpoint_record,
    require_sampling_ranges,
    sft_of_data,
)
from lopd_store.rollouts import RolloutsFile, read_record
from lopd_store.weights import OnBytes


def declare_rollouts(
    path: str | Path,
    *,
    policy: str | Path,
    output: str | Path,
    temperature: float | None = None,
    top_p: float | None = None,
    prompts: str | Path | None = None,
    on_bytes: OnBytes | None = None,
) -> RolloutsRecord:
    """Write the same rollouts to another file, with the record that this policy sampled them; SFT data likewise.

    What is not said is not known, and stays so in the record; the longest response and the most samples of a prompt are
    taken from the rows. Raises InputError where the file has a record already.
    """
    path, output = Path(path), Path(output)
    if output.exists():
        raise InputError(f"`{output}` exists", hint="choose another `--output`, or move it away")
    if output.suffix != ".parquet":
        raise InputError(f"`{output}` is not a name for rollouts", expected="a name that ends in .parquet")
    require_sampling_ranges(temperature, top_p)
    file = RolloutsFile(path)
    if prompts is not None and not Path(prompts).is_file():
        raise InputError(f"no prompts at `{prompts}`", hint="leave `--prompts` out if the file is lost")
    if file.record is not None and file.record.status != "unknown":
        raise InputError(
            f"`{path}` says already who sampled it",
            expected="rollouts without a record",
            actual=f"{file.record.policy.name} ({file.record.status})",
            hint="use it as it is; a wrong declaration is made anew from the file before it",
        )
    identity = identify(policy, on_bytes=on_bytes)
    files = models.find(policy)
    record = RolloutsRecord(
        status="declared",
        policy=identity,
        policy_checkpoint=read_checkpoint_record(files.adapter or files.directory),
        prompts=None if prompts is None else digest_file(Path(prompts)).sha256,
        sampling=_sampling(file, identity, temperature=temperature, top_p=top_p),
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    file.copy(output, record)
    return record


def declare_checkpoint(
    directory: str | Path,
    *,
    base: str | Path,
    sft_data: str | Path | Mapping[str, str | Path] | None = None,
    sft_teacher: str | Path | Mapping[str, str | Path] | None = None,
    force: bool = False,
    on_bytes: OnBytes | None = None,
) -> CheckpointRecord:
    """Write the record beside a checkpoint that it was fine-tuned from this base on a teacher's responses.

    The teacher is the one that the record of `sft_data` names, or `sft_teacher`; together with it `sft_data` may be
    a file of any kind. Both may be one per domain. Raises InputError where neither names a teacher, or a record is
    there already without `force`.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"no checkpoint at `{directory}`", expected="a directory of safetensors")
    path = directory / PROVENANCE_FILE
    if path.exists() and not force:
        raise InputError(f"`{path}` exists", hint="pass `--force` to put a declared record in its place")
    model = identify(directory, on_bytes=on_bytes)
    data = {} if sft_data is None else by_domain(sft_data, "sft_data")
    teachers = {} if sft_teacher is None else by_domain(sft_teacher, "sft_teacher")
    sft = []
    for domain in dict.fromkeys([*data, *teachers]) or [None]:
        file, named = data.get(domain), teachers.get(domain)
        teacher = None if named is None else identify(named, on_bytes=on_bytes)
        sft.append(replace(_sft(None if file is None else Path(file), teacher), domain=domain))
    if not are_domains([one.domain for one in sft]):
        raise InputError(
            "`sft_data` and `sft_teacher` do not name the same domains",
            expected=", ".join(map(str, data)),
            actual=", ".join(map(str, teachers)),
        )
    record = CheckpointRecord(
        status="declared",
        method="sft",
        model=model,
        base=identify(base, on_bytes=on_bytes),
        data=sft[0].data if len(sft) == 1 else None,
        sft=tuple(sft),
    )
    write_durably(path, strictjson.pretty(record.to_json()))
    return record


def _sampling(file: RolloutsFile, policy: ModelIdentity, *, temperature: float | None, top_p: float | None) -> Sampling:
    """What the rows tell of how they were sampled; refuses ids that the policy cannot have sampled."""
    longest, of_prompt = 0, Counter[int]()
    row = 0
    for batch in file.batches():
        for rollout in batch:
            greatest = int(rollout.token_ids.max(initial=0))
            if greatest >= policy.vocab_size:
                raise DataError(
                    f"`{file.path}`, row {row}: an id that the tokenizer of `{policy.name}` does not know",
                    expected=f"ids below {policy.vocab_size}",
                    actual=greatest,
                    hint="name the model whose tokenizer made these ids",
                )
            longest = max(longest, len(rollout.response_ids))
            of_prompt[hash(rollout.prompt_ids.tobytes())] += 1
            row += 1
    if row == 0:
        raise DataError(f"`{file.path}` has no rollouts")
    return Sampling(
        temperature=None if temperature is None else float(temperature),
        top_p=None if top_p is None else float(top_p),
        max_response_tokens=longest,
        samples_per_prompt=max(of_prompt.values()),
        seed=None,
    )


def _sft(data: Path | None, teacher: ModelIdentity | None) -> SftProvenance:
    """The declared SFT provenance of a checkpoint from what was named of it."""
    if data is not None and not data.is_file():
        raise InputError(f"no SFT data at `{data}`", hint="name the teacher with `--sft-teacher` if the data is lost")
    digest = None if data is None else digest_file(data).sha256
    carried: ModelIdentity | None = None
    if data is not None and digest is not None and data.suffix == ".parquet":
        carried = sft_of_data(read_record(data), digest).teacher
    if teacher is None and carried is None:
        raise InputError(
            "nothing says which teacher wrote the SFT data" + ("" if data is None else f" in `{data}`"),
            hint="name the teacher with `--sft-teacher`, or declare the data first with `lopd-store record sft-data`",
        )
    if teacher is not None and carried is not None and (differences := carried.differences(teacher)):
        raise InputError(
            f"`{data}` was written by another teacher than `--sft-teacher`",
            expected=f"{carried.name}, as its record says",
            actual=f"{teacher.name}, which differs in {', '.join(differences)}",
            hint="leave `--sft-teacher` out",
        )
    return SftProvenance(status="declared", teacher=carried or teacher, data=digest)
