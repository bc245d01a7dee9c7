from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lopd_train
from lopd_train import TrainConfig, checkpoint, student
from lopd_train.student import Student

ADAPTERS = TrainConfig(lora_rank=4, lora_alpha=8, device="cpu")


def with_random_adapters(model: Path, config: TrainConfig = ADAPTERS) -> Student:
    loaded = student.load(model, config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trained(loaded).values():
            parameter.normal_(std=0.1)
    return loaded


def trained(loaded: Student) -> dict[str, Any]:
    return {name: parameter for name, parameter in loaded.model.named_parameters() if parameter.requires_grad}


def test_adapters_alone_are_trained_in_every_linear_layer_but_the_head(reference: Path) -> None:
    names = trained(student.load(reference, ADAPTERS))
    assert len(names) == 2 * 7 * 2  # A and B, of seven layers, in two blocks
    assert all("lora_" in name and "_proj" in name for name in names)


def test_merged_weights_give_what_weights_with_adapters_give(reference: Path, tmp_path: Path) -> None:
    loaded, ids = with_random_adapters(reference), torch.arange(20)[None]
    checkpoint.write_model(loaded, checkpoint.whole_weights(loaded), tmp_path)
    merged, before = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path, reference))
    with torch.no_grad():
        expected = loaded.model(input_ids=ids).logits
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(before(input_ids=ids).logits, expected, atol=0.1)


def test_beside_adapters_the_weights_stand_in_the_dtype_of_the_arithmetic(reference: Path) -> None:
    loaded = student.load(reference, replace(ADAPTERS, dtype="bfloat16"))
    assert {parameter.dtype for parameter in trained(loaded).values()} == {torch.float32}
    frozen = [parameter for parameter in loaded.model.parameters() if not parameter.requires_grad]
    assert {parameter.dtype for parameter in frozen} == {torch.bfloat16}


def test_a_run_with_adapters_writes_a_plain_model_and_is_resumed_exactly(
    artifact: Path, reference: Path, config: TrainConfig, tmp_path: Path
) -> None:
    run = replace(config, lora_rank=2, checkpoint_every=2, learning_rate=0.01)
    arguments: dict[str, Any] = {"artifact": artifact, "student": reference, "config": run}
    whole = lopd_train.train(**arguments, output=tmp_path / "whole").output

    def crash(progress: lopd_train.Progress) -> None:
        if progress.step == 3:
            raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        lopd_train.train(**arguments, output=tmp_path / "crashed", on_progress=crash)
    resumed = lopd_train.train(**arguments, output=tmp_path / "crashed").output
    assert (whole / "model.safetensors").read_bytes() == (resumed / "model.safetensors").read_bytes()
    names = AutoModelForCausalLM.from_pretrained(whole).state_dict().keys()
    assert names == AutoModelForCausalLM.from_pretrained(reference).state_dict().keys()
