"""The licence of a model is what the model says, and unknown where it says nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest

import lopd_store
from lopd_store.errors import ArtifactError
from lopd_store.identity import identify
from lopd_store.license import MAX_CHARACTERS, UNKNOWN_LICENSE, License, read_license
from tests.gguf import save_tiny_gguf

KNOWN = License(id="other", name="acme-1", link="https://acme.example", gated=True)


@pytest.fixture
def model_dir(student_dir: Path, tmp_path: Path) -> Path:
    """A copy of the student that a test may change."""
    return Path(shutil.copytree(student_dir, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("front_matter", "license"),
    [
        ("license: apache-2.0", License(id="apache-2.0")),
        (
            "license: other\nlicense_name: acme-1\nlicense_link: LICENSE",
            License(id="other", name="acme-1", link="LICENSE"),
        ),
        ("license: [mit, apache-2.0]", License(id="mit, apache-2.0")),
        ("license:", UNKNOWN_LICENSE),
        ("license: ''", UNKNOWN_LICENSE),
        ("license: 3", UNKNOWN_LICENSE),
        ("license: {a: b}", UNKNOWN_LICENSE),
        (f"license: {'x' * (MAX_CHARACTERS + 1)}", UNKNOWN_LICENSE),
        ("tags: [x]", UNKNOWN_LICENSE),
        ("- a list", UNKNOWN_LICENSE),
        ("license: !!python/object/apply:os.system [true]", UNKNOWN_LICENSE),
        ("[" * 20_000, UNKNOWN_LICENSE),
    ],
)
def test_the_card_of_a_model_says_it(model_dir: Path, front_matter: str, license: License) -> None:
    (model_dir / "README.md").write_text(f"---\n{front_matter}\n---\n\n# A model\n")
    assert read_license(model_dir) == license


def test_without_a_card_it_is_unknown(student_dir: Path) -> None:
    assert read_license(student_dir) == UNKNOWN_LICENSE


@pytest.mark.parametrize("data", [b"license: mit\n", b"\xff\xfe", b"---\nlicense: mit\n---\n" + b" " * (1 << 20)])
def test_a_card_without_metadata_that_reads_says_nothing(model_dir: Path, data: bytes) -> None:
    (model_dir / "README.md").write_bytes(data)
    assert read_license(model_dir) == UNKNOWN_LICENSE


def test_a_gguf_file_says_it_itself(student_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")  # of whatever else is in this folder
    assert read_license(save_tiny_gguf(tmp_path / "plain.gguf", student_dir)) == UNKNOWN_LICENSE
    add = gguf.GGUFWriter.add_chat_template

    def also_license(writer: gguf.GGUFWriter, template: Any) -> None:
        add(writer, template)
        writer.add_license("apache-2.0")
        writer.add_license_link("https://acme.example")

    monkeypatch.setattr(gguf.GGUFWriter, "add_chat_template", also_license)
    found = read_license(save_tiny_gguf(tmp_path / "licensed.gguf", student_dir))
    assert found == License(id="apache-2.0", link="https://acme.example")


def test_it_is_in_the_artifact_and_no_part_of_the_identity(
    model_dir: Path, student_dir: Path, rollouts_file: Path, tmp_path: Path
) -> None:
    (model_dir / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert identify(model_dir).differences(identify(student_dir)) == ()
    artifact = lopd_store.build(teacher=model_dir, rollouts=rollouts_file, output=tmp_path / "a")
    assert artifact.manifest.inputs[0].license == License(id="apache-2.0")
    assert "| licence of the teacher | `apache-2.0` |" in (artifact.path / "README.md").read_text()


def test_it_comes_back_from_its_json_and_reads_as_a_line() -> None:
    assert License.from_json(KNOWN.to_json(), where="x") == KNOWN
    assert str(KNOWN) == "other (acme-1) (https://acme.example), gated"
    assert (str(UNKNOWN_LICENSE), str(License(id="mit", gated=False))) == ("unknown", "mit, not gated")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"id": ""}, r"`x\.id` is neither a short string nor null"),
        ({"link": "x" * 501}, r"`x\.link` is neither a short string nor null"),
        ({"gated": "auto"}, r"`x\.gated` is not true, false or null"),
        ({"more": 1}, "`x` has unknown members: `more`"),
    ],
)
def test_a_json_value_that_is_no_licence_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ArtifactError, match=said):
        License.from_json(KNOWN.to_json() | changes, where="x")
