"""Model identity: what keeps it, what changes it, and which files are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lopd_store.errors import ArtifactError, DataError
from lopd_store.identity import ModelIdentity, identify
from lopd_store.models import find, without_bars
from lopd_store.weights import tensor_digests, weights_digests
from tests.artifacts import identity_named
from tests.gguf import save_tiny_gguf
from tests.tiny import save_tiny_model, swap_ids


@pytest.fixture
def model_dir(student_dir: Path, tmp_path: Path) -> Path:
    """A copy of the student that a test may change."""
    return Path(shutil.copytree(student_dir, tmp_path / "copy"))


@pytest.fixture(scope="module")
def student(student_dir: Path) -> ModelIdentity:
    return identify(student_dir)


def weights_of(directory: Path) -> str:
    return weights_digests(tensor_digests(find(directory).weights)).weights


def edit_json(path: Path, edit: Callable[[Any], Any]) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def edit_weights(directory: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


# What keeps it


def test_another_directory_keeps_the_identity(student: ModelIdentity, model_dir: Path) -> None:
    found = identify(model_dir)
    assert found.differences(student) == () and found.name == "copy"


def test_saving_again_keeps_the_identity(student: ModelIdentity, model_dir: Path, tmp_path: Path) -> None:
    with without_bars():
        AutoModelForCausalLM.from_pretrained(model_dir).save_pretrained(tmp_path / "again")
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(tmp_path / "again")
    assert identify(tmp_path / "again").differences(student) == ()


def test_other_shards_keep_the_identity(student: ModelIdentity, model_dir: Path, tmp_path: Path) -> None:
    with without_bars():
        AutoModelForCausalLM.from_pretrained(model_dir).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert identify(tmp_path / "shards").differences(student) == ()


def test_the_order_of_tensors_over_the_files_keeps_the_identity(student: ModelIdentity, model_dir: Path) -> None:
    tensors = load_file(model_dir / "model.safetensors")
    (model_dir / "model.safetensors").unlink()
    names = sorted(tensors, reverse=True)
    for file, part in (("a", names[:9]), ("b", names[9:])):
        save_file({name: tensors[name] for name in part}, model_dir / f"{file}.safetensors")
    assert weights_of(model_dir) == student.weights


@pytest.mark.parametrize(
    "member", [{"_name_or_path": "x"}, {"torch_dtype": "bfloat16"}, {"use_cache": False}, {"transformers_version": "0"}]
)
def test_what_a_config_says_about_its_file_keeps_the_identity(
    student: ModelIdentity, model_dir: Path, member: dict[str, Any]
) -> None:
    edit_json(model_dir / "config.json", lambda config: config.update(member))
    assert identify(model_dir).differences(student) == ()


# What changes it


def test_one_changed_value_changes_the_weights(student: ModelIdentity, model_dir: Path) -> None:
    edit_weights(model_dir, lambda tensors: tensors["model.norm.weight"].view(-1)[:1].add_(1e-3))
    assert identify(model_dir).differences(student) == ("weights",)


def test_another_precision_changes_the_weights(student: ModelIdentity, model_dir: Path) -> None:
    edit_weights(model_dir, lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items()}))
    assert identify(model_dir).differences(student) == ("weights",)


def test_the_same_bytes_in_another_shape_change_the_weights(student: ModelIdentity, model_dir: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    edit_weights(model_dir, lambda tensors: tensors.update({name: tensors[name].view(64, 16)}))
    assert identify(model_dir).differences(student) == ("weights",)


def test_a_meaningful_field_changes_the_config(student: ModelIdentity, model_dir: Path) -> None:
    edit_json(model_dir / "config.json", lambda config: config.update(rms_norm_eps=1e-3))
    assert identify(model_dir).differences(student) == ("config",)


def test_another_template_changes_the_chat_template(student: ModelIdentity, model_dir: Path) -> None:
    (model_dir / "chat_template.jinja").write_text("{{ messages }}")
    assert identify(model_dir).differences(student) == ("chat_template",)


@pytest.mark.parametrize(("one", "other"), [("a", "b"), ("<|user|>", "<|assistant|>")])
def test_a_tokenizer_of_the_same_size_with_two_ids_swapped_is_another(
    student: ModelIdentity, model_dir: Path, one: str, other: str
) -> None:
    found = identify(swap_ids(model_dir, one, other))
    assert found.differences(student) == ("tokenizer",) and found.vocab_size == student.vocab_size


def test_a_tokenizer_with_other_merges_is_another(student: ModelIdentity, model_dir: Path) -> None:
    edit_json(model_dir / "tokenizer.json", lambda tokenizer: tokenizer["model"]["merges"].reverse())
    assert identify(model_dir).differences(student) == ("tokenizer",)


@pytest.mark.parametrize(
    ("file", "edit"),
    [
        ("tokenizer_config.json", lambda config: config.update(eos_token="<|user|>")),
        ("tokenizer.json", lambda tokenizer: tokenizer["added_tokens"][3].update(lstrip=True)),
        ("tokenizer.json", lambda tokenizer: tokenizer["added_tokens"][3].update(single_word=True)),
    ],
)
def test_a_tokenizer_with_other_special_tokens_is_another(
    student: ModelIdentity, model_dir: Path, file: str, edit: Callable[[Any], Any]
) -> None:
    edit_json(model_dir / file, edit)
    assert identify(model_dir).differences(student) == ("tokenizer",)


def test_a_padded_head_shows_in_the_output_width(tmp_path: Path) -> None:
    padded = identify(save_tiny_model(tmp_path / "padded", output_width=320))
    assert (padded.vocab_size, padded.output_width) == (300, 320)


# GGUF


def test_a_gguf_file_has_an_identity_of_its_own(student: ModelIdentity, student_dir: Path, tmp_path: Path) -> None:
    found = identify(save_tiny_gguf(tmp_path / "tiny.gguf", student_dir))
    assert (found.quantization, found.name, found.output_width) == ("gguf", "tiny.gguf", 300)
    assert "weights" in found.differences(student)


def test_a_gguf_file_keeps_its_identity_under_another_name(student_dir: Path, tmp_path: Path) -> None:
    one = save_tiny_gguf(tmp_path / "one.gguf", student_dir)
    other = Path(shutil.copy(one, tmp_path / "other.gguf"))
    assert identify(one).differences(identify(other)) == ()


def test_one_changed_value_of_a_gguf_file_changes_the_weights(student_dir: Path, tmp_path: Path) -> None:
    path = save_tiny_gguf(tmp_path / "one.gguf", student_dir)
    before = identify(path)
    data = path.read_bytes()
    path.write_bytes(data[:-8] + bytes([data[-8] ^ 1]) + data[-7:])
    assert identify(path).differences(before) == ("weights",)


# Refusals


def test_a_tensor_in_two_files_is_refused(model_dir: Path) -> None:
    shutil.copy(model_dir / "model.safetensors", model_dir / "model-copy.safetensors")
    with pytest.raises(DataError, match="occurs twice"):
        weights_of(model_dir)


def test_truncated_weights_are_refused(model_dir: Path) -> None:
    path = model_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"`model\.safetensors` is cut short at the tensor"):
        weights_of(model_dir)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "a header of 0 bytes"),
        (b"\xff" * 100, "a header of 18446744073709551615 bytes"),
        (b"\x08\0\0\0\0\0\0\0garbage!", "is not valid JSON"),
        (b"\x02\0\0\0\0\0\0\0[]", "does not describe tensors"),
        (b'\x0b\0\0\0\0\0\0\0{"a": null}', "does not describe tensors"),
        (b'\x10\0\0\0\0\0\0\0{"a": 1, "a": 2}', "occurs twice in one object"),
    ],
)
def test_what_is_no_safetensors_file_is_refused(model_dir: Path, data: bytes, said: str) -> None:
    (model_dir / "model.safetensors").write_bytes(data)
    with pytest.raises(DataError, match=rf"`model\.safetensors` is not a safetensors file(?s:.)*{said}"):
        weights_of(model_dir)


def test_an_identity_comes_back_from_its_json(student: ModelIdentity) -> None:
    assert ModelIdentity.from_json(student.to_json(), where="x") == student


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weights": None}, r"`x\.weights` is not a digest"),
        ({"chat_template": ""}, r"`x\.chat_template` is neither a digest nor null"),
        ({"vocab_size": True}, r"`x\.vocab_size` is not a size"),
        ({"output_width": -1}, r"`x\.output_width` is not a size"),
        ({"quantization": 4}, r"`x\.quantization` is neither a string nor null"),
        ({"name": None}, r"`x\.name` is not a string"),
        ({"more": 1}, "`x` has unknown members: `more`"),
    ],
)
def test_a_json_value_that_is_no_identity_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ArtifactError, match=said):
        ModelIdentity.from_json(identity_named("a").to_json() | changes, where="x")
