"""lopd_store: teacher log-probs as a training artifact.

    lopd_store.build(teacher="teacher", rollouts="rollouts.parquet", output="artifact")
    lopd_store.verify("artifact").ok
    artifact = lopd_store.open("artifact")
    lopd_store.push("artifact", "acme/dapo-17k-qwen3-8b")

Importing it imports no torch, transformers, typer or huggingface_hub; the calls that need them import them.
"""

from __future__ import annotations

from lopd_store.errors import ArtifactError, ConsistencyError, DataError, InputError, LopdError, UnavailableError
from lopd_store.reader import Artifact, open

__version__ = "0.1.0"
__all__ = [
    "Artifact",
    "ArtifactError",
    "ConsistencyError",
    "DataError",
    "InputError",
    "LopdError",
    "UnavailableError",
    "open",
]
