"""The specification keeps its promises: its JSON validates, its example is real, its tables are the library's."""

from __future__ import annotations

import inspect
import json
import re
import struct
from dataclasses import replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import lopd_store
from lopd_store import container, grid, identity, layout, rescore, signatures, strictjson, view
from lopd_store import encoding as encodings
from lopd_store import manifest as manifests
from lopd_store import table as parquet
from lopd_store.container import Group, array_metadata
from lopd_store.digest import digest_bytes
from lopd_store.encoding import Encoding, make_encoding
from lopd_store.part import tokens_arrays, topk_arrays
from lopd_store.provenance import MAX_DOMAINS
from lopd_store.weights import tensor_digests, weights_digests
from tests.conformance import example
from tests.conformance.text import SPEC, TEXT, block, blocks, tables
from tests.records import CHECKPOINT, CODE, MATH, OF_BOTH, ROLLOUTS, make_manifest

SCHEMA = json.loads((SPEC / "manifest.schema.json").read_text(encoding="utf-8"))
ENCODINGS = [
    make_encoding(exact=exact, rule=rule) for exact in (False, True) for rule in ("teacher", "teacher+reference")
]


def validator(name: str) -> jsonschema.Draft202012Validator:
    """The schema of one kind of object."""
    return jsonschema.Draft202012Validator({**SCHEMA, "$ref": f"#/$defs/{name}"})


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The worked example, written out."""
    return example.write_example(tmp_path_factory.mktemp("example") / "artifact")


def test_the_text_has_less_than_600_lines_of_at_most_140_characters() -> None:
    lines = TEXT.splitlines()
    assert len(lines) < 600
    assert [number for number, line in enumerate(lines, start=1) if len(line) > 140] == []


@pytest.mark.parametrize("name", ["artifact.md", "CHANGELOG.md"])
def test_every_relative_link_leads_to_a_file(name: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (SPEC / name).read_text(encoding="utf-8"))
    assert [link for link in links if not (SPEC / link).exists()] == []


def test_sections_that_the_text_names_are_there() -> None:
    sections = {int(number) for number in re.findall(r"^## ([0-9]+)\.", TEXT, re.MULTILINE)}
    named = re.findall(r"sections? ((?:[0-9]+(?:, | and )?)+)", TEXT)
    assert {int(number) for numbers in named for number in re.findall("[0-9]+", numbers)} <= sections
    assert sections == set(range(1, max(sections) + 1))


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize(("info", "content"), [found for found in blocks() if found[0].startswith("json")])
def test_fenced_json_is_valid(info: str, content: str) -> None:
    value, name = json.loads(content), info.removeprefix("json").strip()
    if name not in ("stored", "decoded"):  # what is in the arrays of the example
        validator(name).validate(value)


def test_real_manifests_are_valid(sealed: Path, unknown: Path) -> None:
    for directory in (sealed, unknown):
        validator("manifest").validate(json.loads((directory / "manifest.json").read_bytes()))


def test_manifests_of_every_encoding_and_their_records_are_valid() -> None:
    for encoding in ENCODINGS:
        validator("manifest").validate(json.loads(manifests.render(make_manifest(encoding=encoding))))
    validator("rollouts_record").validate(ROLLOUTS.to_json())
    validator("rollouts_record").validate(replace(ROLLOUTS, policy_checkpoint=None).to_json())
    validator("checkpoint_record").validate(CHECKPOINT.to_json())
    validator("manifest").validate(json.loads(manifests.render(make_manifest(inputs=(MATH, CODE)))))
    validator("rollouts_record").validate(OF_BOTH.to_json())


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format",), "other"),
        (("unknown",), 1),
        (("counts", "tokens"), -1),
        (("encoding", "profile"), "exact"),
        (("encoding", "grids", "topk_logprobs"), [[0.0, 0.3]]),
        (("inputs", 0, "scoring", "temperature"), 0.7),
        (("inputs", 0, "sft", "teacher"), None),
        (("inputs", 0, "teacher", "weights"), "sha256:0"),
        (("inputs", 0, "rollouts", "record"), "checkpoint"),
        (("inputs", 0, "domain"), "Math"),
        (("inputs", 0, "sft", "domain"), 1),
        (("inputs", 0, "rollouts", "policy_checkpoint", "sft"), []),
        (("inputs",), []),
        (("parts", 0, "input"), 64),
        (("parts",), []),
        (("parts", 0, "files", "topk", "path"), "parts/00000.tokens.zarr.zip"),
    ],
)
def test_the_schema_refuses_what_the_library_refuses(path: tuple[str | int, ...], value: Any) -> None:
    document = json.loads(manifests.render(make_manifest()))
    at = document
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    assert not validator("manifest").is_valid(document)
    with pytest.raises(lopd_store.ArtifactError):
        manifests.parse(manifests.sealed(document))


def test_the_objects_of_the_schema_have_the_members_of_the_tables() -> None:
    members = {
        frozenset(name.strip("` ") for row in table for name in row["member"].split(","))
        for table in tables()
        if "member" in table[0]
    }
    for name in ("manifest", "input", "identity", "sft", "rollouts_record", "checkpoint_record", "signature"):
        assert frozenset(SCHEMA["$defs"][name]["properties"]) in members, name


def test_signatures_are_what_the_schema_and_the_text_say(tmp_path: Path) -> None:
    vectors = SPEC / "vectors"
    found = json.loads((vectors / "valid" / "signed" / layout.SIGNATURES).read_bytes())
    validator("signatures").validate(found)
    one = found[0]
    members = [one[name].encode() + b"\n" for name in ("signed", "fingerprint")]
    assert signatures.message(one["fingerprint"]) == b"".join(members)
    malformed = sorted(vectors.glob("invalid/A100_*"))
    for slug in ("key_with_a_comment", "unknown_member", "signature_too_short", "another_algorithm"):
        (vector,) = (path for path in malformed if path.name == f"A100_{slug}")
        value = json.loads((vector / "artifact" / layout.SIGNATURES).read_bytes())
        assert not validator("signatures").is_valid(value)


def test_the_default_encoding_is_that_of_the_text() -> None:
    assert json.loads(block("json encoding")) == make_encoding().to_json()
    assert Encoding.from_json(json.loads(block("json encoding")), where="text") == make_encoding()


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda encoding: f"{encoding.profile}, {encoding.rule}")
def test_the_tables_of_arrays_are_those_of_the_library(encoding: Encoding) -> None:
    tokens, topk = (table for table in tables() if "array" in table[0])
    reference = encoding.rule == "teacher+reference"
    for table, specs in ((tokens, tokens_arrays(encoding)), (topk[: None if reference else -2], topk_arrays(encoding))):
        found = {}
        for row in table:
            fill = row["fill"].split(" / ")[-1 if encoding.profile == "exact" else 0]
            found[row["array"].strip("`")] = (row[encoding.profile], fill, row["chain"])
        assert list(found) == list(specs)
        for name, spec in specs.items():
            assert found[name] == (spec.dtype, str(spec.fill).lower().replace("nan", "NaN"), _chain(spec)), name


def test_the_metadata_of_the_text_is_that_of_the_library() -> None:
    counts = topk_arrays(make_encoding())["counts"]
    assert json.loads(block("json array")) == array_metadata(3, counts)
    loss_mask = array_metadata(3, tokens_arrays(make_encoding())["loss_mask"])
    assert f"Z, `{json.dumps(loss_mask['codecs'], separators=(',', ':'))}`" in TEXT


def test_the_members_that_leave_no_trace_in_a_config_digest_are_those_of_the_library() -> None:
    (names,) = (content.split() for info, content in blocks() if info == "" and "transformers_version" in content)
    assert names == sorted(identity._NOT_MEANINGFUL)


def test_the_digests_of_the_text_can_be_computed_from_it(tmp_path: Path) -> None:
    lines = block("digests").splitlines()
    digests = dict(line.split() for line in lines[1::2])
    assert {name: digest_bytes(form.encode()) for name, form in zip(digests, lines[::2], strict=True)} == digests
    assert digests == {name: getattr(example.teacher(), name) for name in digests}
    header = json.dumps({"head": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + example.HEAD)
    found = weights_digests(tensor_digests([path], cache=False))
    assert (found.weights, found.rounded) == (digests["weights"], digests["rounded_weights"])


def test_the_example_is_valid(written: Path) -> None:
    assert lopd_store.verify(written).findings == ()


def test_the_arrays_of_the_example_are_those_of_the_text(written: Path) -> None:
    specs = {"tokens": tokens_arrays(example.encoding()), "topk": topk_arrays(example.encoding())}
    found = {}
    for kind, of_kind in specs.items():
        group = Group((written / f"parts/00000.{kind}.zarr.zip").read_bytes(), of_kind, where=kind)
        found[kind] = {name: group.read(name).tolist() for name in group.lengths}
    assert json.loads(block("json stored")) == found


def test_the_example_decodes_to_what_the_text_says(written: Path) -> None:
    artifact = lopd_store.open(written)
    found = []
    for index in range(len(artifact)):
        rollout = artifact.rollout(index)
        assert rollout.topk is not None
        entries = list(zip(rollout.topk.ids.tolist(), rollout.topk.logprobs.tolist(), strict=True))
        borders = rollout.topk.offsets.tolist()
        arrays = ("prompt_ids", "response_ids", "loss_mask", "sampled_logprobs", "reference_logprobs")
        found.append(
            {
                **{name: getattr(rollout, name).tolist() for name in arrays},
                "topk": [[list(entry) for entry in entries[a:b]] for a, b in pairwise(borders)],
                "tail_logprobs": rollout.topk.tail_logprobs.tolist(),
            }
        )
    assert json.loads(block("json decoded")) == found


def test_the_distributions_of_the_example_are_those_of_the_text() -> None:
    (table,) = (table for table in tables() if "position" in table[0])
    assert [[float(value) for value in list(row.values())[2:]] for row in table] == example.PROBABILITIES
    assert [int(row["response"]) for row in table] == [id for _, response in example.ROLLOUTS for id in response]


def test_manifest_fingerprint_and_view_of_the_example_are_those_of_the_text(written: Path) -> None:
    data = (written / "manifest.json").read_bytes()
    assert json.loads(block("json manifest")) == json.loads(data)
    assert strictjson.pretty(json.loads(block("json manifest"))) == data
    end = " ".join(TEXT.rpartition("```\n")[2].split())
    assert f"has {len(data)} bytes" in end
    assert f"`{digest_bytes(data)}`" in end
    assert block("json view") + "\n" == example.view_json(digest_bytes(data)).decode()
    assert "pcodec {}, numcodecs {} and pyarrow {}.".format(*map(version, ("pcodec", "numcodecs", "pyarrow"))) in end


def test_the_limits_of_the_text_are_those_of_the_library() -> None:
    (table,) = (table for table in tables() if "at most" in table[0])
    mebibytes, kibibytes = manifests.MAX_MANIFEST_BYTES >> 20, signatures.MAX_BYTES >> 10
    powers = {2**exponent: f"2^{exponent}" for exponent in range(64)}
    powers |= {2**exponent - 1: f"2^{exponent} - 1" for exponent in range(3, 64)}
    assert [row["at most"] for row in table] == [
        f"{mebibytes} MiB; {view.MAX_VIEW_BYTES} bytes; {container.MAX_METADATA_BYTES} bytes; {kibibytes} KiB",
        f"{strictjson.MAX_DEPTH}; {strictjson._MAX_INTEGER_DIGITS}",
        f"{layout.MAX_PARTS:,}; {powers[manifests._COUNT_LIMIT - 1]}; {powers[layout.MAX_FILE_BYTES]}",
        f"{MAX_DOMAINS}; {MAX_DOMAINS} characters",
        f"{encodings.K_LIMIT:,}; {grid.MAX_SEGMENTS}; {grid.LAST_LEVEL + 1:,}",
        "2^31 - 1",
        f"{powers[container.MAX_VALUES]}; {powers[container.CHUNK]}",
        f"{parquet.MAX_FOOTER_BYTES >> 20} MiB; {parquet.MAX_DEPTH}",
    ]


def test_what_the_text_says_of_rescoring_is_what_the_library_does() -> None:
    assert f"max({rescore._NOISE_FACTOR} * noise, 10^-4)" in TEXT
    assert rescore._LEAST_NOISE == 1e-4
    assert "A090" in inspect.getsource(rescore)


def _chain(spec: Any) -> str:
    return "Z" if spec.dtype == "bool" else "P"
