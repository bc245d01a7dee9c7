"""Attention over packed rollouts: they stand end to end in one row, and each sees itself alone.

    model.set_attn_implementation("lopd_packed")
    body(input_ids=batch.input_ids, position_ids=batch.position_ids, cu_seq_lens_q=batch.borders)

There is no padding, and no mask of the whole row: scaled dot product attention runs once per rollout, with the causal
kernel of the device (flash where there is one), so the work is the sum of the rollouts' squares and not the square of
their sum. A model with layers that see only a window keeps the masks that transformers makes from position ids.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lopd_store.errors import DataError

_NAME = "lopd_packed"


def prepare(model: Any) -> None:
    """Give a model packed attention; raises DataError unless a probe comes out packed as it does one by one."""
    from transformers import AttentionInterface, AttentionMaskInterface

    config, body = model.config, model.base_model
    weight = model.get_input_embeddings().weight
    ids = torch.arange(12, device=weight.device)[None] % len(weight)
    with torch.no_grad():  # by the attention that the model was loaded with
        alone = [body(input_ids=piece, use_cache=False).last_hidden_state for piece in (ids[:, :5], ids[:, 5:])]
        expected = torch.cat(alone, dim=1)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds == {"full_attention"} and not getattr(config, "sliding_window", None):
        AttentionInterface.register(_NAME, packed_attention)
        AttentionMaskInterface.register(_NAME, packed_mask)
        model.set_attn_implementation(_NAME)
    with torch.no_grad():
        packed = body(**inputs(ids, torch.tensor([0, 5, 12], dtype=torch.int32))).last_hidden_state
    # Kernels round in their own ways, and another number of tokens may be given to another one.
    tolerance = max(1e-3, 4 * torch.finfo(expected.dtype).eps)
    if not torch.allclose(packed, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())):
        raise DataError(
            f"a `{type(model).__name__}` cannot be trained on packed rollouts",
            expected="states of a rollout that do not depend on its neighbours",
            actual=f"a difference of up to {float((packed - expected).abs().max()):.3g}",
        )


def inputs(
    input_ids: Tensor,  # [1, tokens]
    borders: Tensor,  # [rollouts + 1], int32, on the CPU
) -> dict[str, Any]:
    """What a model's body is called with for packed rollouts."""
    lengths = borders.diff()
    starts = torch.repeat_interleave(borders[:-1], lengths)
    positions = (torch.arange(len(starts)) - starts).to(input_ids.device, torch.int64)
    return {"input_ids": input_ids, "position_ids": positions[None], "cu_seq_lens_q": borders, "use_cache": False}


@torch.compiler.disable  # type: ignore[untyped-decorator]  # traced, it is compiled for each number of rollouts
def packed_attention(
    module: Any,
    query: Tensor,  # [1, heads, tokens, width]
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor | None = None,  # [rollouts + 1], on the CPU: where each rollout begins
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each rollout to itself; where no borders are given, what transformers does."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]
    lengths = cu_seq_lens_q.diff().tolist()
    rollouts = zip(*(torch.split(states, lengths, dim=2) for states in (query, key, value)), strict=True)
    outputs = [sdpa_attention_forward(module, *states, None, **options)[0] for states in rollouts]
    return torch.cat(outputs, dim=1), None


def packed_mask(**options: Any) -> Tensor | None:
    """None for a packed row, which is known by having neither padding nor a cache; else what transformers makes."""
    from transformers.masking_utils import sdpa_mask

    if options.get("attention_mask") is None and options["q_length"] == options["kv_length"]:
        return None
    return sdpa_mask(**options)  # type: ignore[no-any-return]
