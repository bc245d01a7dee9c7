"""Two models side by side, in words; and PEFT adapters, which are models too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import lopd_store
from lopd_store import models
from lopd_store.errors import DataError, InputError
from lopd_store.identity import identify
from lopd_store.models import without_bars
from tests.tiny import save_tiny_model


@pytest.fixture
def copy(student_dir: Path, tmp_path: Path) -> Path:
    """A copy of the student that a test may change."""
    return Path(shutil.copytree(student_dir, tmp_path / "copy"))


def words(first: Path, second: Path) -> dict[str, tuple[str, ...]]:
    return lopd_store.compare(first, second).differences


def test_a_copy_is_the_same_model(student_dir: Path, copy: Path) -> None:
    assert lopd_store.compare(student_dir, copy).same


def test_another_precision_is_said_to_be_one(student_dir: Path, copy: Path) -> None:
    with without_bars():
        model = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float32)
        model.bfloat16().float().save_pretrained(copy)
        model.save_pretrained(copy.with_name("narrow"))
    AutoTokenizer.from_pretrained(student_dir).save_pretrained(copy.with_name("narrow"))
    model.bfloat16().save_pretrained(copy.with_name("narrow"))
    assert words(copy, copy.with_name("narrow")) == {
        "weights": (
            "the same values in another precision: rounded to bfloat16 they are equal",
            "stored as F32 and as BF16",
        )
    }


def test_changed_tensors_are_counted_and_named(student_dir: Path, other_teacher_dir: Path) -> None:
    said = words(student_dir, other_teacher_dir)
    assert set(said) == {"weights", "config"}
    assert said["weights"][0].startswith("9 tensors only in the second, such as `model.layers.2.")
    assert "tensors have other values, such as `" in said["weights"][1]
    assert said["config"] == ("`num_hidden_layers` is `2` and `3`",)


def test_tokens_that_moved_are_named_with_both_ids(student_dir: Path, copy: Path) -> None:
    def swap(vocab: dict[str, int]) -> None:
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]

    path = copy / "tokenizer.json"
    value: dict[str, Any] = json.loads(path.read_text())
    swap(value["model"]["vocab"])
    path.write_text(json.dumps(value))
    (said,) = words(student_dir, copy)["tokenizer"]
    assert said.startswith("2 tokens have other ids, such as 'a' is ")


def test_a_bigger_tokenizer_is_counted(student_dir: Path, tmp_path: Path) -> None:
    bigger = save_tiny_model(tmp_path / "bigger", seed=3, layers=2, vocab_size=304)
    said = words(student_dir, bigger)
    assert said["vocab_size"] == ("300 and 304",)
    assert said["tokenizer"][0].startswith("4 tokens only in the second")


def test_the_first_other_line_of_a_chat_template_is_shown(student_dir: Path, copy: Path) -> None:
    template = (copy / "chat_template.jinja").read_text()
    (copy / "chat_template.jinja").write_text(template + "\nmore")
    assert words(student_dir, copy)["chat_template"] == ("from line 2 on: `` and `more`",)


# Adapters


@pytest.fixture(scope="module")
def adapter(student_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of the student that changes something."""
    directory = tmp_path_factory.mktemp("adapters") / "adapter"
    with without_bars():
        model = AutoModelForCausalLM.from_pretrained(student_dir)
    torch.manual_seed(0)
    lora = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    lora.save_pretrained(directory)
    return directory


def test_an_adapter_is_its_base_model_but_for_the_adapter(student_dir: Path, adapter: Path) -> None:
    found = identify(adapter)
    assert found.differences(identify(student_dir)) == ("adapter",) and found.name == "adapter"


def test_an_adapters_identity_is_that_of_its_values_and_their_use(adapter: Path, tmp_path: Path) -> None:
    again = Path(shutil.copytree(adapter, tmp_path / "again"))
    path = again / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"inference_mode": False, "target_modules": ["v_proj", "q_proj"]}))
    assert identify(again).differences(identify(adapter)) == ()
    path.write_text(json.dumps(config | {"lora_alpha": 99}))
    assert identify(again).differences(identify(adapter)) == ("adapter",)


def test_an_adapter_loads_merged_into_its_base(student_dir: Path, adapter: Path) -> None:
    ids = torch.arange(8)[None]
    with torch.no_grad():
        base, merged = (models.load_model(models.find(path))(input_ids=ids).logits for path in (student_dir, adapter))
    assert float((base - merged).abs().max()) > 0.01


def test_rollouts_are_sampled_and_scored_by_adapters_too(
    adapter: Path, teacher_dir: Path, prompts_file: Path, tmp_path: Path
) -> None:
    made = lopd_store.generate(
        model=adapter, prompts=prompts_file, output=tmp_path / "rollouts.parquet", max_response_tokens=4, limit=2
    )
    artifact = lopd_store.build(teacher=teacher_dir, rollouts=made.output, output=tmp_path / "artifact")
    assert artifact.manifest.inputs[0].rollouts is not None
    assert artifact.manifest.inputs[0].rollouts.policy.adapter == identify(adapter).adapter


def test_an_adapter_whose_base_is_gone_is_refused(adapter: Path, tmp_path: Path) -> None:
    orphan = Path(shutil.copytree(adapter, tmp_path / "orphan"))
    config = json.loads((orphan / "adapter_config.json").read_text())
    for base, error in ((None, DataError), ("./nowhere", InputError)):
        (orphan / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
        with pytest.raises(error, match=r"base model|no model at"):
            identify(orphan)
