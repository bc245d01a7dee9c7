"""Rollouts end to end in one row give what they give one by one, in values and in gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers import AutoModelForCausalLM as Model
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lopd_store.errors import DataError
from lopd_train import TrainConfig, packing, student
from lopd_train.batches import Batch, Record, collate
from lopd_train.student import Student
from tests.tiny import tiny_tokenizer
from tests.train.records import record

TOLERANCE = 1e-5  # relative, float32
LENGTHS = [(1, 3), (5, 20), (2, 1), (9, 40)]  # of prompts and responses
SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}
WINDOW = {"sliding_window": 8}
FAMILIES = {
    "llama": LlamaConfig(**SHAPE),
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE),
    "mistral, which sees a window": MistralConfig(**SHAPE, **WINDOW),
    "qwen3, half of whose layers see a window": Qwen3Config(
        **SHAPE, **WINDOW, use_sliding_window=True, layer_types=["full_attention", "sliding_attention"]
    ),
}


def loaded(config: PreTrainedConfig, directory: Path) -> Student:
    torch.manual_seed(0)
    Model.from_config(config).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return student.load(directory, TrainConfig(device="cpu"))


def logprobs(made: Student, batch: Batch) -> Tensor:
    """Of the targets; [positions]."""
    values = torch.log_softmax(made.split.logits(made.states(batch)), dim=-1)
    return values.gather(1, batch.targets[:, None])[:, 0]


def records() -> list[Record]:
    rng = np.random.default_rng(0)
    drawn = [(rng.integers(0, 300, prompt), rng.integers(0, 300, response)) for prompt, response in LENGTHS]
    return [record(prompt.tolist(), response.tolist()) for prompt, response in drawn]


def gradient(model: Any, logprobs: Tensor) -> Tensor:
    """Of a sum in which every position has a weight of its own."""
    weights = torch.linspace(-1, 2, len(logprobs))
    return torch.cat([g.flatten() for g in torch.autograd.grad((logprobs * weights).sum(), list(model.parameters()))])


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rollouts_give_the_logprobs_and_the_gradient_of_one_by_one(family: str, tmp_path: Path) -> None:
    made = loaded(FAMILIES[family], tmp_path)
    packed = logprobs(made, collate(records(), "cpu"))
    alone = torch.cat([logprobs(made, collate([item], "cpu")) for item in records()])
    plain = Model.from_pretrained(tmp_path)  # as transformers has it
    dense = torch.cat([_logprobs(plain, item) for item in records()])
    torch.testing.assert_close(packed, dense, rtol=TOLERANCE, atol=TOLERANCE)
    expected = gradient(plain, dense)
    for found in (packed, alone):
        difference = (gradient(made.model, found) - expected).norm() / expected.norm()
        assert float(difference) < TOLERANCE


def test_a_rollout_does_not_see_its_neighbours(tmp_path: Path) -> None:
    made, (first, *others) = loaded(FAMILIES["llama"], tmp_path), records()
    changed = record([7, 8, 9], [10, 11, 12, 13])
    before, after = (logprobs(made, collate([some, *others], "cpu")) for some in (first, changed))
    assert torch.equal(before[first.positions :], after[changed.positions :])


def test_there_is_no_mask_of_the_row_where_every_layer_sees_everything(tmp_path: Path) -> None:
    made = loaded(FAMILIES["qwen3"], tmp_path)
    made.model.base_model.layers[0].register_forward_pre_hook(_expect_no_mask, with_kwargs=True)
    logprobs(made, collate(records(), "cpu"))


def _expect_no_mask(module: Any, arguments: Any, options: dict[str, Any]) -> None:
    assert options["attention_mask"] is None


@pytest.mark.filterwarnings("ignore")  # mamba says that its kernels are slow here
def test_a_model_that_looks_across_rollouts_is_refused(tmp_path: Path) -> None:
    recurrent = MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=4)
    with pytest.raises(DataError, match="a `MambaForCausalLM` cannot be trained on packed rollouts\n  expected"):
        loaded(recurrent, tmp_path)


def test_a_model_whose_attention_is_another_is_refused() -> None:
    def half_as_sharp(module: Any, query: Tensor, *rest: Any, **options: Any) -> Any:
        return sdpa_attention_forward(module, query / 2, *rest, **options)

    AttentionInterface.register("half_as_sharp", half_as_sharp)
    model = Model.from_config(FAMILIES["llama"]).eval()
    model.set_attn_implementation("half_as_sharp")
    with pytest.raises(DataError, match="a `LlamaForCausalLM` cannot be trained on packed rollouts"):
        packing.prepare(model)


def test_packed_and_one_by_one_may_differ_by_the_rounding_of_the_weights_dtype() -> None:
    def by_another_kernel(module: Any, arguments: Any, states: Tensor) -> Tensor:
        return states * (1 + 2**-6) if states.shape[1] > 7 else states

    torch.manual_seed(0)
    model = Model.from_config(FAMILIES["llama"]).eval()
    model.base_model.norm.register_forward_hook(by_another_kernel)
    with pytest.raises(DataError, match="a difference of up to"):
        packing.prepare(model)
    packing.prepare(model.to(torch.bfloat16))


def test_a_student_in_training_generates_what_transformers_does_with_padding_and_a_cache(tmp_path: Path) -> None:
    made = loaded(FAMILIES["llama"], tmp_path)
    plain = Model.from_pretrained(tmp_path)
    ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    found, expected = (
        model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
        for model in (made.model, plain)
    )
    assert found.shape == (2, 17)
    assert torch.equal(found, expected)


def _logprobs(model: Any, item: Record) -> Tensor:
    ids = torch.from_numpy(item.token_ids.astype(np.int64))
    logprobs = torch.log_softmax(model(input_ids=ids[None]).logits[0], dim=-1)
    places = torch.arange(item.prompt_length, len(ids))
    return logprobs[places - 1, ids[places]]
