"""Invalid artifacts, each a valid one with one thing broken, by the code that a verifier must find.

Recipes stand in the order of the codes. Most break a copy that holds just the file in question and the token files.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from lopd_store import layout
from lopd_store.identity import ModelIdentity
from recipes import artifact, hostile_json, hostile_tables, hostile_values, hostile_zips, signatures
from recipes.artifact import (
    REMOVED,
    Link,
    Tree,
    data_of,
    document,
    edited,
    identity,
    sampled_by,
    taught_by,
    viewed,
    whole,
    with_manifest,
)

ROLLOUTS, TOKENS, TOPK = (layout.part_file(0, kind) for kind in layout.FILE_KINDS)


@dataclass(frozen=True, kw_only=True)
class Vector:
    """A broken artifact, and what must be found in it."""

    tree: Tree
    codes: tuple[str, ...]
    student: ModelIdentity | None = None  # to verify it for
    signed_by: str | None = None  # the key to ask for

    def expected(self) -> dict[str, Any]:
        """What expected.json holds."""
        expected = {"codes": list(self.codes), "student": None if self.student is None else self.student.to_json()}
        return expected if self.signed_by is None else expected | {"signed_by": self.signed_by}


def vectors() -> dict[str, Vector]:
    """Every vector by the name of its directory, CODE_SLUG."""
    found: dict[str, Vector] = {}
    for recipes in (manifests, directories, views, documents, files, zips, values, tables, audits, gates, signed):
        for code, slug, vector in recipes():
            assert f"{code}_{slug}" not in found and code in vector.codes
            found[f"{code}_{slug}"] = vector
    return dict(sorted(found.items()))


Made = Iterator[tuple[str, str, Vector]]
tokens_only = functools.cache(artifact.tokens_only)
with_topk = functools.cache(artifact.with_topk)
with_table = functools.cache(artifact.with_table)


def one(code: str, slug: str, tree: Tree, *also: str, student: ModelIdentity | None = None) -> tuple[str, str, Vector]:
    return code, slug, Vector(tree=tree, codes=(code, *also), student=student)


def manifests() -> Made:
    tree = tokens_only()
    data = data_of(tree, layout.MANIFEST)
    without = {name: content for name, content in tree.items() if name != layout.MANIFEST}
    yield one("A001", "no_manifest", without)
    yield one("A001", "link", without | {layout.MANIFEST: Link("real.json"), "real.json": data})
    yield one("A001", "directory", without | {f"{layout.MANIFEST}/manifest.json": data})


def directories() -> Made:
    tree = tokens_only()
    topk = data_of(whole(), TOPK)
    yield one("A002", "stray_file", tree | {"parts/notes.txt": b"hello"})
    yield one("A002", "hidden_file", tree | {"parts/.hidden": b""})
    yield one("A002", "part_that_is_not_listed", tree | {layout.part_file(1, layout.TOKENS): data_of(tree, TOKENS)})
    yield one("A002", "kind_that_the_view_lacks", tree | {TOPK: topk})
    yield one("A002", "directory", tree | {"parts/more/file": b""})
    yield one("A002", "half_written_file", tree | {f"{TOKENS}.tmp": b"half"})
    without = {name: content for name, content in tree.items() if name != TOKENS}
    yield one("A020", "missing", without)
    yield one("A020", "link_to_the_same_bytes", without | {TOKENS: Link("../elsewhere"), "elsewhere": tree[TOKENS]})
    yield one("A020", "link_that_climbs", without | {TOKENS: Link("../../../../../../../../../etc/hostname")})
    yield one("A020", "link_that_leads_nowhere", without | {TOKENS: Link("nowhere")})
    yield one("A020", "link_to_itself", without | {TOKENS: Link("00000.tokens.zarr.zip")})
    yield one("A020", "directory", without | {f"{TOKENS}/zarr.json": b"{}"})
    moved = {name.replace("parts/", "elsewhere/"): content for name, content in tree.items()}
    yield one("A020", "parts_is_a_link", moved | {"parts": Link("elsewhere")})


def views() -> Made:
    tree = tokens_only()
    view = json.loads(data_of(tree, layout.VIEW))
    without = {name: content for name, content in tree.items() if name != layout.VIEW}
    for slug, changes in {
        "of_another_artifact": {"fingerprint": "sha256:" + 64 * "0"},
        "without_tokens": {"kinds": ["topk"]},
        "kinds_out_of_order": {"kinds": ["tokens", "rollouts"]},
        "kind_twice": {"kinds": ["tokens", "tokens"]},
        "unknown_kind": {"kinds": ["tokens", "rewards"]},
        "no_parts": {"parts": [0, 0]},
        "parts_beyond_the_last": {"parts": [0, 2]},
        "negative_parts": {"parts": [-1, 1]},
        "parts_are_flags": {"parts": [False, True]},
        "unknown_member": {"more": 1},
        "another_format": {"format": "lopd"},
    }.items():
        yield one("A003", slug, tree | {layout.VIEW: json.dumps(view | changes).encode()})
    for slug, data in {
        "not_json": b"{",
        "nan": data_of(tree, layout.VIEW).replace(b"0", b"NaN", 1),
        "name_twice": data_of(tree, layout.VIEW).replace(b"{", b'{"format": "lopd-view",', 1),
        "too_large": data_of(tree, layout.VIEW) + b" " * 5000,
    }.items():
        yield one("A003", slug, tree | {layout.VIEW: data})
    yield one("A003", "link", without | {layout.VIEW: Link("real.json"), "real.json": tree[layout.VIEW]})
    yield one("A003", "directory", without | {f"{layout.VIEW}/view.json": tree[layout.VIEW]})


def documents() -> Made:
    tree = tokens_only()
    data = data_of(tree, layout.MANIFEST)
    for slug, text in hostile_json.TEXTS.items():
        yield one("A010", slug, with_manifest(tree, text(data)))
    for slug, text in hostile_json.AFTER_SEALING.items():
        yield one("A011", slug, with_manifest(tree, text(data)))
    for slug, text in hostile_json.OTHER_FORMS.items():
        yield one("A012", slug, with_manifest(tree, text(data)))
    said: dict[str, Any] = {
        "sft": taught_by("teacher"),
        "sft_audit": artifact.audited(),
        "rollouts": sampled_by("student"),
    }
    consistent = viewed(whole(**said), [layout.TOKENS])
    for code, edits in hostile_json.EDITS.items():
        for slug, (path, value) in edits.items():
            yield one(code, slug, edited(consistent if code == "A018" else tree, path, value))
    for path in ("version", "text", "inputs.0.scoring.engine", "encoding.grids", "parts.0.files.topk.xxh3_128"):
        code = next(code for prefix, code in hostile_json.CODE_OF.items() if path.startswith(prefix))
        yield one(code, f"lacks_{path.rpartition('.')[2]}", edited(tree, path, REMOVED))
    domains = viewed(artifact.several(), [layout.TOKENS])
    for code, edits in hostile_json.OF_SEVERAL_DOMAINS.items():
        for slug, (path, value) in edits.items():
            yield one(code, slug, edited(domains, path, value))
    yield one("A024", "alone_in_capitals", edited(tree, "inputs.0.domain", "Math"))
    yield one("A026", "beyond_the_only_input", edited(tree, "parts.0.input", 1))
    two = viewed(whole([artifact.make_part(seed=seed) for seed in range(2)]), [layout.TOKENS])
    yield one("A016", "parts_in_another_order", edited(two, "parts", document(two)["parts"][::-1]))


def files() -> Made:
    tree = tokens_only()
    data = data_of(tree, TOKENS)
    for slug, content in {
        "cut_by_one_byte": data[:-1],
        "cut_in_the_middle": data[: len(data) // 2],
        "emptied": b"",
        "one_byte_more": data + b"\0",
        "written_twice": data + data,
    }.items():
        yield one("A021", slug, tree | {TOKENS: content})
    for slug, at in {"first_byte": 0, "middle_byte": len(data) // 2, "last_byte": len(data) - 1}.items():
        flipped = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        yield one("A022", f"flipped_{slug}", tree | {TOKENS: flipped})
    yield one("A022", "zeros", tree | {TOKENS: bytes(len(data))})
    yield one("A022", "flipped_byte_of_the_topk", _flipped(with_topk(), TOPK))
    yield one("A022", "flipped_byte_of_the_table", _flipped(with_table(), ROLLOUTS))
    yield one("A022", "digest_of_other_bytes", edited(tree, "parts.0.files.tokens.sha256", "sha256:" + 64 * "1"))
    yield one("A023", "digest_of_other_bytes", edited(tree, "parts.0.files.tokens.xxh3_128", 32 * "1"))


def _flipped(tree: Tree, name: str) -> Tree:
    data = bytearray(data_of(tree, name))
    data[len(data) // 2] ^= 0x10
    return tree | {name: bytes(data)}


def zips() -> Made:
    for recipes in (hostile_zips.STRUCTURE, hostile_zips.METADATA, hostile_zips.CHUNKS):
        for (code, slug), break_it in recipes.items():
            yield one(code, slug, break_it(tokens_only()))
    for slug, break_padding in hostile_zips.PADDING.items():
        yield one("A034", slug, break_padding())


def values() -> Made:
    for (code, slug), break_it in hostile_values.OF_TOKENS.items():
        yield one(code, slug, break_it(tokens_only()))
    for (code, slug), break_it in hostile_values.OF_EXACT_TOKENS.items():
        yield one(code, slug, break_it(tokens_only(artifact.EXACT)))
    for (code, slug), break_it in hostile_values.OF_TOPK.items():
        yield one(code, slug, break_it(with_topk()))
    for (code, slug), break_it in hostile_values.OF_EXACT_TOPK.items():
        yield one(code, slug, break_it(with_topk(artifact.EXACT)))
    for (code, slug), tree in hostile_values.made().items():
        yield one(code, slug, tree, *hostile_values.ALSO.get((code, slug), ()))


def tables() -> Made:
    for (code, slug), break_it in hostile_tables.RECIPES.items():
        yield one(code, slug, break_it(with_table()))


def audits() -> Made:
    both = replace(artifact.COMPACT, rule="teacher+reference")
    tree = whole(encoding=both, rollouts=sampled_by("student"))
    stored = document(tree)["inputs"][0]["rollouts_audit"]
    for slug, audit in {
        "none": None,
        "another_score": stored | {"score": stored["score"] + 0.001},
        "another_variance": stored | {"variance": stored["variance"] - 0.001},
        "fewer_positions": stored | {"positions": stored["positions"] - 1},
        "one_outside": stored | {"outside": 1},
    }.items():
        yield one("A069", slug, edited(tree, "inputs.0.rollouts_audit", audit))
    domains = artifact.several()
    math, code = (one["rollouts_audit"] for one in document(domains)["inputs"])
    yield one("A069", "of_another_domain", edited(domains, "inputs.0.rollouts_audit", code))
    both_domains = {name: math[name] + code[name] for name in math}
    yield one("A069", "of_all_domains_together", edited(domains, "inputs.1.rollouts_audit", both_domains))
    yield one("A069", "of_another_temperature", edited(tree, "inputs.0.rollouts.sampling.temperature", 0.7))
    yield one("A069", "though_nobody_knows_the_policy", edited(whole(encoding=both), "inputs.0.rollouts_audit", stored))
    alone = edited(whole(rollouts=sampled_by("student")), "inputs.0.rollouts_audit", stored)
    yield one("A069", "without_the_top_k_of_the_reference_policy", alone)


def gates() -> Made:
    student = identity("student")
    policy = sampled_by("student")
    taught = taught_by("teacher", output_width=32)

    def tokens(**inputs: Any) -> Tree:
        return viewed(whole(**inputs), [layout.TOKENS])

    yield one("A080", "unknown_sft_teacher", tokens(rollouts=policy), student=student)
    yield one("A080", "another_sft_teacher", tokens(rollouts=policy, sft=taught_by("other")), student=student)
    spoiled = artifact.audited(score=-700.0)
    yield one(
        "A080", "audit_against_the_sft_data", tokens(rollouts=policy, sft=taught, sft_audit=spoiled), student=student
    )
    spoiled = artifact.audited(outside=30)
    yield one("A080", "impossible_sft_data", tokens(rollouts=policy, sft=taught, sft_audit=spoiled), student=student)
    against = {"positions": 300, "outside": 0, "score": 90.0, "variance": 400.0}
    rollouts = edited(tokens(rollouts=policy, sft=taught), "inputs.0.rollouts_audit", against)
    yield one("A080", "audit_against_the_rollouts", rollouts, student=student)
    yield one("A080", "unknown_policy", tokens(sft=taught), student=student)
    yield one("A080", "another_student", tokens(rollouts=policy, sft=taught), student=identity("other"))
    quantised = replace(student, quantization="gguf")
    yield one("A080", "student_quantised", tokens(rollouts=policy, sft=taught), student=quantised)
    domains = viewed(artifact.several(), [layout.TOKENS])
    math, code = (one["teacher"] for one in document(domains)["inputs"])
    swapped = edited(edited(domains, "inputs.0.teacher", code), "inputs.1.teacher", math)
    yield one("A080", "teachers_of_two_domains_swapped", swapped, student=student)
    other_policy = edited(domains, "inputs.1.rollouts.policy", identity("other").to_json())
    yield one("A080", "another_student_in_one_domain", other_policy, student=student)
    other_tokenizer = replace(student, tokenizer="sha256:" + 64 * "0")
    record = replace(policy, policy=other_tokenizer)
    yield one("A080", "another_tokenizer", tokens(rollouts=record, sft=taught), student=other_tokenizer)


def signed() -> Made:
    for code, trees in {"A100": signatures.malformed(), "A101": signatures.not_signed()}.items():
        for slug, tree in trees.items():
            yield code, slug, Vector(tree=tree, codes=(code,), signed_by=signatures.SIGNED_BY)
