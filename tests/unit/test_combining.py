"""Combining: artifacts of several teachers become one that verifies, or are refused with what does not go together."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lopd_store
from lopd_store import combine, gate, layout, manifest
from lopd_store.errors import ArtifactError, InputError
from tests.conformance.text import SPEC

VALID = SPEC / "vectors" / "valid"
PLAIN, PARTS, NAMED, SEVERAL = (
    VALID / name
    for name in ("consistent_sft", "several_parts", "one_domain_that_has_a_name", "several_domains_of_one_teacher")
)


def domains(artifact: lopd_store.Artifact) -> list[str | None]:
    return [one.domain for one in artifact.manifest.inputs]


def test_the_parts_of_all_follow_each_other_under_new_numbers(tmp_path: Path) -> None:
    made = combine(("math", PLAIN), ("code", PARTS), output=tmp_path / "both")
    sources = [lopd_store.open(PLAIN), lopd_store.open(PARTS)]
    wanted = [(source, number) for source in sources for number in range(len(source.manifest.parts))]
    assert [part.input for part in made.manifest.parts] == [0, *[1] * (len(wanted) - 1)]
    for number, (source, old) in enumerate(wanted):
        for kind in layout.FILE_KINDS:
            stored = (made.path / layout.part_file(number, kind)).read_bytes()
            assert stored == (source.path / layout.part_file(old, kind)).read_bytes()
    report = lopd_store.verify(made.path)
    assert report.ok and report.files == 1 + 3 * len(wanted)
    assert {path.name for path in made.path.iterdir()} == {"manifest.json", "build.json", "README.md", "parts"}


def test_every_input_stays_what_it_was_but_for_its_name(tmp_path: Path) -> None:
    made = combine(("math", PLAIN), NAMED.with_name("several_domains_of_one_teacher"), output=tmp_path / "both")
    first, *others = made.manifest.inputs
    (alone,) = lopd_store.open(PLAIN).manifest.inputs
    assert (first.domain, first.to_json() | {"domain": None}) == ("math", alone.to_json())
    assert tuple(others) == lopd_store.open(SEVERAL).manifest.inputs
    assert made.manifest.counts_of(0) == lopd_store.open(PLAIN).manifest.counts


def test_the_same_artifacts_in_the_same_order_give_the_same_fingerprint(tmp_path: Path) -> None:
    named = [("math", PLAIN), ("code", PARTS)]
    made = [combine(*named, output=tmp_path / name).fingerprint for name in ("one", "two")]
    assert made[0] == made[1] != combine(*named[::-1], output=tmp_path / "three").fingerprint


def test_a_combination_is_combined_again_as_if_it_had_been_at_once(tmp_path: Path) -> None:
    pair = combine(NAMED, ("code", PARTS), output=tmp_path / "pair")
    made = combine(pair.path, ("chat", PLAIN), output=tmp_path / "again")
    at_once = combine(NAMED, ("code", PARTS), ("chat", PLAIN), output=tmp_path / "at-once")
    assert domains(made) == ["math", "code", "chat"]
    assert made.fingerprint == at_once.fingerprint


def test_audits_of_rollouts_stay_those_of_their_domain(tmp_path: Path) -> None:
    made = combine(VALID / "several_domains", ("chat", VALID / "audited_rollouts"), output=tmp_path / "all")
    assert lopd_store.verify(made.path).ok
    found = [one.rollouts_audit for one in made.manifest.inputs]
    assert None not in found and len(set(map(str, found))) == 3


def test_files_are_linked_and_copied_where_they_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [Path(shutil.copytree(path, tmp_path / path.name)) for path in (PLAIN, NAMED)]
    linked = combine(("code", sources[0]), sources[1], output=tmp_path / "linked")
    name = layout.part_file(0, layout.TOKENS)
    assert (linked.path / name).samefile(sources[0] / name)

    def refuse(*_: object) -> None:
        raise OSError

    monkeypatch.setattr(os, "link", refuse)
    copied = combine(("code", sources[0]), sources[1], output=tmp_path / "copied")
    assert not (copied.path / name).samefile(sources[0] / name)
    assert copied.fingerprint == linked.fingerprint and lopd_store.verify(copied.path).ok


def test_what_merely_happened_says_of_which_artifacts_it_is_made(tmp_path: Path) -> None:
    made = combine(("math", PLAIN), SEVERAL, output=tmp_path / "both")
    happened = json.loads((made.path / layout.BUILD_RECORD).read_bytes())
    fingerprints = [lopd_store.open(path).fingerprint for path in (PLAIN, SEVERAL)]
    assert [one["fingerprint"] for one in happened["combined"]] == fingerprints


def test_skipped_rollouts_add_up(tmp_path: Path) -> None:
    paths = []
    for name, count in (("a", 2), ("b", 3)):
        path = Path(shutil.copytree(PLAIN, tmp_path / name))
        document = json.loads((path / layout.MANIFEST).read_bytes())
        document["annotations"] = {"skipped_rollouts": count}
        (path / layout.MANIFEST).write_bytes(manifest.sealed(document))
        paths.append((name, path))
    made = combine(*paths, output=tmp_path / "both")
    assert made.manifest.annotations == {"skipped_rollouts": 5}


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []
    made = combine(("math", PLAIN), SEVERAL, output=tmp_path / "both", on_bytes=lambda *done: heard.append(done))
    size = sum(file.size for part in made.manifest.parts for file in part.files.values())
    assert heard[-1] == (size, size)


def test_the_gate_holds_each_domain_to_its_own_teacher(tmp_path: Path) -> None:
    made = combine(("math", PLAIN), ("code", VALID / "inconsistent_sft"), output=tmp_path / "both")
    (finding,) = gate.judge(made.manifest.inputs).findings
    assert (finding.subject, finding.state) == ("teacher", "inconsistent")
    assert finding.reason.startswith("domain code: the SFT data was written by another teacher")


@pytest.mark.parametrize(
    ("other", "message", "expected", "actual"),
    [
        ("vocabulary_above_65536", "another tokenizer", "vocab_size 24", "vocab_size 100000"),
        ("fixed_k", "another encoding", "`selection.coverage` 0.9", "`selection.coverage` 1.0"),
        ("exact", "another encoding", "`profile` compact", "`profile` exact"),
        ("teacher_and_reference", "another encoding", "`selection.rule` teacher", "`selection.rule` teacher"),
        ("redacted", "only one has text", "text", "no text"),
        ("without_reference_logprobs", "only one has reference log-probs", "reference", "no reference"),
    ],
)
def test_what_does_not_go_together_is_refused_with_both_sides(
    other: str, message: str, expected: str, actual: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as refusal:
        combine(("math", PLAIN), ("code", VALID / other), output=tmp_path / "both")
    assert refusal.value.message == f"`{VALID / other}` does not go with `{PLAIN}`: {message}"
    assert expected in str(refusal.value.expected) and actual in str(refusal.value.actual)
    assert refusal.value.hint and list(tmp_path.iterdir()) == []


def test_another_tokenizer_of_the_same_size_is_refused(tmp_path: Path) -> None:
    other = Path(shutil.copytree(PLAIN, tmp_path / "other"))
    document = json.loads((other / layout.MANIFEST).read_bytes())
    document["inputs"][0]["teacher"]["tokenizer"] = "sha256:" + 64 * "7"
    (other / layout.MANIFEST).write_bytes(manifest.sealed(document))
    with pytest.raises(InputError, match=r"another tokenizer\n  expected  tokenizer sha256:.*\n  actual    .*7777"):
        combine(("math", PLAIN), ("code", other), output=tmp_path / "both")


@pytest.mark.parametrize(
    ("artifacts", "message"),
    [
        ([("math", PLAIN)], "there is nothing to combine"),
        ([], "there is nothing to combine"),
        ([NAMED, PLAIN], "names no domain\n\nhint: name it: DOMAIN="),
        ([NAMED, ("math", PLAIN)], "do not have a domain each(?s:.)*actual    math, math"),
        ([NAMED, NAMED], "do not have a domain each"),
        ([("math", PLAIN), ("code", NAMED)], "names what it is of itself\n  expected  math\n  actual    code"),
        ([("chat", SEVERAL), NAMED], "names what it is of itself"),
        ([NAMED, ("Code", PLAIN)], "do not have a domain each(?s:.)*actual    math, Code"),
        ([NAMED, ("", PLAIN)], "do not have a domain each"),
        ([NAMED, ("../code", PLAIN)], "do not have a domain each"),
        ([NAMED, ("code", VALID / "sampled_only_view")], "is a copy of a part of an artifact"),
        ([NAMED, ("code", VALID / "view_of_some_parts")], "is a copy of a part of an artifact"),
        ([NAMED, ("code", "hf://acme/artifact")], "is not on this machine"),
        ([NAMED, ("code", "nowhere")], "no artifact at `nowhere`"),
    ],
)
def test_what_cannot_be_combined_is_refused_and_leaves_nothing(
    artifacts: list[Path | tuple[str, Path]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        combine(*artifacts, output=tmp_path / "both")
    assert list(tmp_path.iterdir()) == []


def test_more_domains_than_there_may_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="do not have a domain each"):
        combine(*((f"d{number}", PLAIN) for number in range(65)), output=tmp_path / "many")
    assert (
        len(combine(*((f"d{number}", PLAIN) for number in range(64)), output=tmp_path / "many").manifest.inputs) == 64
    )


def test_what_is_there_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "both").mkdir()
    with pytest.raises(InputError, match=r"`.*both` exists"):
        combine(NAMED, ("code", PLAIN), output=tmp_path / "both")


def test_an_artifact_that_does_not_verify_is_named_with_its_code(tmp_path: Path) -> None:
    broken = Path(shutil.copytree(PARTS, tmp_path / "broken"))
    path = broken / layout.part_file(1, layout.TOPK)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError) as refusal:
        combine(NAMED, ("code", broken), output=tmp_path / "both")
    assert (refusal.value.code, refusal.value.hint) == ("A022", f"lopd-store verify {broken}")
    assert refusal.value.message.startswith(f"`{broken}`: ") and layout.part_file(1, layout.TOPK) in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]
    path.unlink()
    with pytest.raises(ArtifactError, match=r"`.*00001\.topk\.zarr\.zip` is missing"):
        combine(NAMED, ("code", broken), output=tmp_path / "both")


def test_an_interrupt_leaves_nothing_and_a_kill_nothing_that_stays(tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        combine(NAMED, ("code", PLAIN), output=tmp_path / "both", on_bytes=interrupt)
    assert list(tmp_path.iterdir()) == []
    killed = "combine(sys.argv[1], ('code', sys.argv[2]), output=sys.argv[3], on_bytes=lambda *_: os._exit(9))"
    script = f"import os, sys; from lopd_store import combine; {killed}"
    done = subprocess.run([sys.executable, "-c", script, NAMED, PLAIN, tmp_path / "both"], timeout=120, check=False)
    assert done.returncode == 9
    assert {path.name for path in tmp_path.iterdir()} == {"both.unfinished", "both.unfinished.lock"}
    assert combine(NAMED, ("code", PLAIN), output=tmp_path / "both").path.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["both"]
