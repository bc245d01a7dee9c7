"""Low-rank adapters: a few matrices trained in place of the weights, and merged into them on export.

W x becomes W x + (alpha / rank) B A x, where W stays and A and B are trained; B is zero at first.
Source: LoRA, arXiv 2106.09685, section 4.1; the modules are peft's.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from lopd_store.errors import InputError
from lopd_train.config import TrainConfig

_BASE, _A, _B = ".base_layer", ".lora_A.default.weight", ".lora_B.default.weight"


def add(model: Any, config: TrainConfig) -> None:
    """Put adapters into every linear layer but the head, in float32, and freeze everything else."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise InputError("`lora_rank` needs peft", hint='pip install "lopd[lora]"') from error
    settings = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules="all-linear")
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # peft's words to transformers are old
        inject_adapter_in_model(settings, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def merge(weights: dict[str, Tensor], config: TrainConfig) -> dict[str, Tensor]:
    """The weights of a model with adapters as those of a model without; adds in float32."""
    merged = {name.replace(_BASE, ""): value for name, value in weights.items() if ".lora_" not in name}
    for name in [name.removesuffix(_A) for name in weights if name.endswith(_A)]:
        change = weights[name + _B].float() @ weights[name + _A].float()
        base = merged[f"{name}.weight"]
        merged[f"{name}.weight"] = base.float() + config.lora_alpha / (config.lora_rank or 1) * change
    return merged
