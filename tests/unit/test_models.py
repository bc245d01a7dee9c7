"""Models on disk: which directories are models, how they load, and that body and head are the whole."""

from __future__ import annotations

import gc
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from safetensors.torch import load_file, save_file
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from lopd_store import models
from lopd_store.errors import DataError, InputError, UnavailableError
from lopd_store.identity import identify
from tests.gguf import save_tiny_gguf
from tests.memory import ONE_USE, resident, use_memory

ROOT = Path(__file__).parents[2]


@pytest.fixture
def model_dir(student_dir: Path, tmp_path: Path) -> Path:
    """A copy of the student that a test may change."""
    return Path(shutil.copytree(student_dir, tmp_path / "copy"))


def test_pickled_weights_are_refused(model_dir: Path) -> None:
    (model_dir / "model.safetensors").rename(model_dir / "pytorch_model.bin")
    with pytest.raises(
        DataError, match=r"`copy` has pickled weights(?s:.)*actual    pytorch_model\.bin(?s:.)*hint: convert"
    ):
        models.find(model_dir)


def test_a_directory_without_weights_is_refused(model_dir: Path) -> None:
    (model_dir / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"`copy` has no weights\n  expected  \*\.safetensors\n  actual    none"):
        models.find(model_dir)


def test_a_directory_with_a_gguf_file_alone_says_to_name_the_file(model_dir: Path) -> None:
    (model_dir / "model.safetensors").rename(model_dir / "x.gguf")
    with pytest.raises(DataError, match=r"hint: name the file: `.*/x\.gguf`"):
        models.find(model_dir)


def test_weights_without_a_config_are_refused(model_dir: Path) -> None:
    (model_dir / "config.json").unlink()
    with pytest.raises(DataError, match=r"has weights but no config\.json"):
        models.find(model_dir)


def test_an_adapter_that_does_not_name_its_base_model_is_refused(model_dir: Path) -> None:
    (model_dir / "adapter_config.json").write_text("{}")
    with pytest.raises(DataError, match="does not name its base model"):
        models.find(model_dir)


def test_a_file_that_is_no_gguf_is_refused(model_dir: Path) -> None:
    with pytest.raises(InputError, match=r"model\.safetensors` is not a model(?s:.)*hint: name the directory"):
        models.find(model_dir / "model.safetensors")


@pytest.mark.parametrize("name", ["/no/such/model", "./owner/name", "no model", "a/b/c", ""])
def test_what_is_neither_a_path_nor_a_hub_id_is_refused(name: str) -> None:
    with pytest.raises((InputError, DataError), match=r"no model at|has no weights"):
        models.find(name)


def test_a_hub_id_that_cannot_be_fetched_could_not_be_told() -> None:
    with pytest.raises(UnavailableError, match="`acme/no-such-model` could not be fetched"):
        models.find("acme/no-such-model")


@pytest.mark.parametrize("load", [models.load_config, models.load_tokenizer, models.load_model])
def test_code_in_a_model_directory_is_never_run(
    model_dir: Path, load: Callable[[models.ModelFiles], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))  # nobody may be asked either
    code = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoTokenizer": ["code.Tokens", None]}
    for name, kind in (("config.json", "model_type"), ("tokenizer_config.json", "tokenizer_class")):
        settings = json.loads((model_dir / name).read_text())
        (model_dir / name).write_text(json.dumps(settings | {kind: "Unheard", "auto_map": code}))
    (model_dir / "code.py").write_text(f"open({str(model_dir / 'was-run')!r}, 'w')")
    with pytest.raises(DataError, match=r"`copy` does not load: .* contains custom code"):
        load(models.find(model_dir))
    assert not (model_dir / "was-run").exists()


def test_a_config_that_names_no_model_is_refused(model_dir: Path) -> None:
    (model_dir / "config.json").write_text("{}")
    with pytest.raises(DataError, match="the config of `copy` does not load: Unrecognized model"):
        identify(model_dir)


def test_truncated_weights_do_not_load(model_dir: Path) -> None:
    path = model_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="the model `copy` does not load"):
        models.load_model(models.find(model_dir))


@pytest.mark.parametrize("rows", [0, 10])
def test_weights_that_are_missing_or_cut_are_not_made_up(model_dir: Path, rows: int) -> None:
    tensors = load_file(model_dir / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weight = tensors.pop(name)
    if rows:
        tensors[name] = weight[:rows].clone()
    save_file(tensors, model_dir / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        DataError, match=rf"the weights of `copy` are not those of its config(?s:.)*1 are missing.*{name}"
    ):
        models.load_model(models.find(model_dir))


def test_a_directory_without_a_tokenizer_says_what_it_needs(model_dir: Path) -> None:
    for path in model_dir.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(DataError, match=r"the tokenizer of `copy` does not load(?s:.)*hint: .*tokenizer\.json"):
        models.load_tokenizer(models.find(model_dir))


def test_a_model_loads_in_the_dtype_that_is_asked_for(student_dir: Path) -> None:
    model = models.load_model(models.find(student_dir), dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16} and not model.training


def test_a_gguf_file_loads_and_is_saved_as_an_ordinary_model(student_dir: Path, tmp_path: Path) -> None:
    path = save_tiny_gguf(tmp_path / "tiny.gguf", student_dir)
    loaded = models.load_model(models.find(path))
    with models.without_bars():
        models.copy_without_quantization(loaded).save_pretrained(tmp_path / "plain")
    ids = torch.arange(12)[None]
    plain = models.load_model(models.find(tmp_path / "plain"))
    torch.testing.assert_close(plain(input_ids=ids).logits, loaded(input_ids=ids).logits)


def test_stop_tokens_are_the_tokenizers_and_the_generation_configs(student_dir: Path) -> None:
    files = models.find(student_dir)
    model, tokenizer = models.load_model(files), models.load_tokenizer(files)
    model.generation_config.eos_token_id = [9, 7]
    assert models.stop_token_ids(model.generation_config, tokenizer) == (tokenizer.eos_token_id, 7, 9)


def test_a_device_that_torch_does_not_know_is_refused() -> None:
    assert models.pick_device("cpu") == "cpu"
    with pytest.raises(InputError, match="the device `abacus` cannot be used"):
        models.pick_device("abacus")


# Body and head

SMALL = {
    "vocab_size": 30,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
WITHOUT_HEAD_DIM = {name: value for name, value in SMALL.items() if name != "head_dim"}


FAMILIES = {
    "Llama": (LlamaForCausalLM, LlamaConfig(**SMALL, tie_word_embeddings=False)),
    "Llama, tied": (LlamaForCausalLM, LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "Qwen2": (Qwen2ForCausalLM, Qwen2Config(**WITHOUT_HEAD_DIM)),
    "Qwen3": (Qwen3ForCausalLM, Qwen3Config(**SMALL)),
    "Qwen3, tied": (Qwen3ForCausalLM, Qwen3Config(**SMALL, tie_word_embeddings=True)),
    "Qwen3 MoE": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(**SMALL, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2),
    ),
    "Gemma 2": (Gemma2ForCausalLM, Gemma2Config(**SMALL, final_logit_softcapping=0.05)),
    "Gemma 3": (Gemma3ForCausalLM, Gemma3TextConfig(**SMALL, final_logit_softcapping=0.05)),
    "Gemma 3, not capped": (Gemma3ForCausalLM, Gemma3TextConfig(**SMALL)),
    "Granite": (GraniteForCausalLM, GraniteConfig(**WITHOUT_HEAD_DIM, logits_scaling=8.0)),
    "Cohere": (CohereForCausalLM, CohereConfig(**WITHOUT_HEAD_DIM, logit_scale=0.0625, pad_token_id=0)),
    "Cohere 2": (Cohere2ForCausalLM, Cohere2Config(**SMALL, logit_scale=0.25, pad_token_id=0)),
    "Phi 3": (Phi3ForCausalLM, Phi3Config(**WITHOUT_HEAD_DIM, pad_token_id=0)),
    "GPT-2": (GPT2LMHeadModel, GPT2Config(vocab_size=30, n_embd=16, n_layer=1, n_head=2)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_body_and_head_give_the_logits_of_the_model(family: str, dtype: torch.dtype) -> None:
    kind, config = FAMILIES[family]
    torch.manual_seed(0)
    model = kind(config).to(dtype).eval()
    split = models.split(model)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        found, wanted = split.logits(split.body(input_ids=ids).last_hidden_state), model(input_ids=ids).logits.float()
    assert (found.dtype, split.output_width) == (torch.float32, 30)
    near = 1e-6 if dtype == torch.float32 else 2**-7  # one step of bfloat16: we scale and cap in float32
    torch.testing.assert_close(found, wanted, rtol=near, atol=near * float(wanted.abs().max()))


def test_a_head_that_scales_its_logits_in_an_unknown_way_is_refused() -> None:
    torch.manual_seed(0)
    model = Cohere2ForCausalLM(Cohere2Config(**SMALL, logit_scale=0.25, pad_token_id=0)).eval()
    model.logit_scale = 0.3  # which nothing in the config tells
    with pytest.raises(DataError, match="the head of a `Cohere2ForCausalLM` is not understood"):
        models.split(model)


def test_splitting_leaves_a_model_in_training_mode(student_dir: Path) -> None:
    model = models.load_model(models.find(student_dir)).train()
    models.split(model)
    assert model.training


# Memory

needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")


@needs_glibc
def test_a_process_that_samples_or_scores_on_the_cpu_uses_again_what_it_frees(
    student_dir: Path, teacher_dir: Path, prompts_file: Path, rollouts_file: Path, tmp_path: Path
) -> None:
    keep = "models.keep_freed_memory('cpu')"  # by itself, because what else a process holds can keep memory, too
    sample = "generate(model=sys.argv[1], prompts=sys.argv[2], output='sampled.parquet', max_response_tokens=4)"
    score = "build(teacher=sys.argv[1], rollouts=sys.argv[2], output='artifact')"
    for work, *read in ((keep,), (sample, student_dir, prompts_file), (score, teacher_dir, rollouts_file)):
        imports = "import sys, lopd_store.models; from tests.memory import use_memory"
        code = f"{imports}; lopd_store.{work}; use_memory(); print(use_memory())"
        command = [sys.executable, "-c", code, *map(str, read)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert int(done.stdout or -1) in range(ONE_USE), done.stderr


@needs_glibc
def test_memory_that_is_kept_can_be_given_back() -> None:
    models.keep_freed_memory("cpu")
    use_memory()
    kept = resident()
    models.free_memory()
    assert kept - resident() > ONE_USE // 2


def test_what_nobody_uses_any_more_is_given_back(model_dir: Path) -> None:
    model = models.load_model(models.find(model_dir))
    add_hook_to_module(model, AlignDevicesHook())  # as accelerate does where it spreads a model over devices
    alive = weakref.ref(model)
    del model
    gc.disable()
    try:
        assert alive() is not None
        models.free_memory()
    finally:
        gc.enable()
    assert alive() is None
