"""DistillKit's own codec on the same distributions, from a checkout that the user names; none of its code is here.

It is measured as it is published: log-probs as a few exact values and a polynomial, ids as packed bits, in torch.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from distributions import Distributions
from measure import medians
from parts import make_part
from sizes import mean_kl

from lopd_store.encoding import make_encoding

# The README of https://github.com/arcee-ai/DistillKit, "Logit Compression".
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "recommended": {"k": 128, "exact_k": 16, "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"]},
    "budget": {"k": 50, "exact_k": 1, "polynomial_terms": [0, 1, "sqrt"]},
}
_COMMON = {"exact_dtype": "bfloat16", "term_dtype": "float32", "residual_bins": [], "delta_encoding": False}
_BATCH = 4096  # positions


@dataclass(frozen=True, kw_only=True)
class Codec:
    """What a codec does with the distributions."""

    name: str
    bytes_per_position: float
    kl: float  # mean KL(true || stored), in nats
    positions_per_second: float


def measure_distillkit(checkout: Path, data: Distributions, repeats: int) -> Iterator[Codec]:
    """Each published configuration of DistillKit, in one thread."""
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(checkout))
    codec = import_module("distillkit.compression")
    version = tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    for name, some in CONFIGURATIONS.items():
        config = codec.DistributionQuantizationConfig(d=data.vocab_size, **some, **_COMMON)
        compressor = codec.LogprobCompressor(config=config)
        true = make_part(data, make_encoding(k_max=config.k, coverage=1)).topk
        assert true is not None
        ids = torch.from_numpy(true.ids.reshape(-1, config.k).astype(np.int64))
        logprobs = torch.from_numpy(true.logprobs.reshape(-1, config.k))
        batches = zip(torch.split(ids, _BATCH), torch.split(logprobs, _BATCH), strict=True)
        rows = [compressor.compress_from_sparse(*batch) for batch in batches]

        def decode(compressor: Any = compressor, rows: Any = rows) -> list[Any]:
            return [compressor.decompress_to_sparse(row) for row in rows]

        found_ids, found = (torch.cat(column).reshape(-1) for column in zip(*decode(), strict=True))
        stored = replace(true, ids=found_ids.numpy().astype(np.uint32), logprobs=found.float().numpy())
        yield Codec(
            name=f"DistillKit {version}, {name} (k = {config.k})",
            bytes_per_position=sum(column.numel() for row in rows for column in row.values()) / len(ids),
            kl=mean_kl(true, stored),
            positions_per_second=len(ids) / medians(decode, repeats=repeats)[0],
        )
