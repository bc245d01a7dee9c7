"""lopd_store: teacher log-probs as a training artifact.

    lopd_store.build(teacher="teacher", rollouts="rollouts.parquet", output="artifact")
    lopd_store.verify("artifact").ok
    artifact = lopd_store.open("artifact")
    lopd_store.push("artifact", "acme/dapo-17k-qwen3-8b")

Importing it imports no torch, transformers, typer or huggingface_hub; the calls that need them import them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lopd_store.audit import audit
from lopd_store.errors import ArtifactError, ConsistencyError, DataError, InputError, LopdError, UnavailableError
from lopd_store.reader import Artifact, open
from lopd_store.signatures import sign
from lopd_store.subset import subset
from lopd_store.verifier import Report, verify

if TYPE_CHECKING:
    from lopd_store.builder import build, build_share, merge, merge_remote, publish
    from lopd_store.catalog import search
    from lopd_store.columns import to_dataset
    from lopd_store.combining import combine
    from lopd_store.differences import compare
    from lopd_store.download import pull
    from lopd_store.forecast import estimate
    from lopd_store.identity import identify
    from lopd_store.interop import export
    from lopd_store.sampler import generate
    from lopd_store.upload import push

__version__ = "0.1.0"
__all__ = [
    "Artifact",
    "ArtifactError",
    "ConsistencyError",
    "DataError",
    "InputError",
    "LopdError",
    "Report",
    "UnavailableError",
    "audit",
    "build",
    "build_share",
    "combine",
    "compare",
    "estimate",
    "export",
    "generate",
    "identify",
    "merge",
    "merge_remote",
    "open",
    "publish",
    "pull",
    "push",
    "search",
    "sign",
    "subset",
    "to_dataset",
    "verify",
]
_LAZY = {
    "build": "builder",
    "build_share": "builder",
    "combine": "combining",
    "compare": "differences",
    "estimate": "forecast",
    "export": "interop",
    "generate": "sampler",
    "identify": "identity",
    "merge": "builder",
    "merge_remote": "builder",
    "publish": "builder",
    "pull": "download",
    "push": "upload",
    "search": "catalog",
    "to_dataset": "columns",
}


def __getattr__(name: str) -> Any:
    """Import the calls that need torch or the Hub only when they are used."""
    if name not in _LAZY:
        raise AttributeError(f"module `lopd_store` has no attribute `{name}`")
    from importlib import import_module

    return getattr(import_module(f"lopd_store.{_LAZY[name]}"), name)
