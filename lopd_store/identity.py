"""Model identity: digests that say which model, wherever its files lie and however they were saved.

identity = identify("Qwen/Qwen3-8B")
identity.differences(other)     # () when it is the same model
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lopd_store import models, strictjson
from lopd_store.digest import digest_bytes, digest_json, is_digest
from lopd_store.errors import ArtifactError, DataError

_MAX_HEADER_BYTES = 100 << 20
# What a config says about its file or its loading, not about the function that the model computes.
_NOT_MEANINGFUL = {
    *("_name_or_path", "_commit_hash", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache"),
    *("pretraining_tp", "output_attentions", "output_hidden_states", "return_dict", "initializer_range"),
    *("attn_implementation", "chunk_size_feed_forward", "is_encoder_decoder", "problem_type", "id2label", "label2id"),
    "quantization_config",  # has a field of its own
}
_TOKENIZER_PARTS = ("added_tokens", "normalizer", "pre_tokenizer", "model")


@dataclass(frozen=True, kw_only=True)
class ModelIdentity:
    """Which model: equal digests are equal functions of token ids, whatever the files are called.

    `name` and `revision` say where it came from; they are for people and take no part in comparisons.
    """

    weights: str
    config: str
    tokenizer: str
    chat_template: str | None
    vocab_size: int  # ids that the tokenizer knows: its greatest id + 1
    output_width: int  # columns of the head; more than vocab_size where it is padded
    adapter: str | None
    quantization: str | None
    name: str
    revision: str | None

    def differences(self, other: ModelIdentity) -> tuple[str, ...]:
        """Names of the fields in which two identities differ; empty for the same model."""
        return tuple(
            field.name
            for field in fields(self)
            if field.name not in ("name", "revision") and getattr(self, field.name) != getattr(other, field.name)
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON object with one member per field."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_json(cls, value: Any, *, where: str) -> ModelIdentity:
        """Parse what `to_json` gave; raises ArtifactError at any other shape."""
        if not isinstance(value, Mapping) or set(value) != {field.name for field in fields(cls)}:
            raise ArtifactError(
                f"`{where}` is not a model identity", expected=", ".join(field.name for field in fields(cls))
            )
        for name in ("weights", "config", "tokenizer"):
            if not is_digest(value[name]):
                raise ArtifactError(f"`{where}.{name}` is not a digest", actual=repr(value[name])[:100])
        for name in ("chat_template", "adapter"):
            if value[name] is not None and not is_digest(value[name]):
                raise ArtifactError(f"`{where}.{name}` is neither a digest nor null", actual=repr(value[name])[:100])
        for name in ("vocab_size", "output_width"):
            if type(value[name]) is not int or not 0 < value[name] < 1 << 31:
                raise ArtifactError(f"`{where}.{name}` is not a size", actual=repr(value[name])[:100])
        for name in ("quantization", "revision"):
            if value[name] is not None and not isinstance(value[name], str):
                raise ArtifactError(f"`{where}.{name}` is neither a string nor null", actual=repr(value[name])[:100])
        if not isinstance(value["name"], str):
            raise ArtifactError(f"`{where}.name` is not a string", actual=repr(value["name"])[:100])
        return cls(**value)


def identify(model: str | Path) -> ModelIdentity:
    """The identity of a model directory, GGUF file or Hub id; reads every byte of the weights once."""
    files = models.find(model)
    loaded = models.load_config(files)
    config = loaded.to_dict()
    tokenizer = models.load_tokenizer(files)
    template = tokenizer.chat_template
    quantization = "gguf" if files.gguf_file else (config.get("quantization_config") or {}).get("quant_method")
    return ModelIdentity(
        weights=weights_digest(files),
        config=digest_json({name: value for name, value in config.items() if name not in _NOT_MEANINGFUL}),
        tokenizer=tokenizer_digest(tokenizer),
        chat_template=None if template is None else digest_json(template),
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        output_width=int(loaded.get_text_config().vocab_size),
        adapter=None,
        quantization=quantization,
        name=files.name,
        revision=files.revision,
    )


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of what decides text -> ids: the full id map, merges, added tokens, normaliser and pre-tokeniser."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = {} if backend is None else json.loads(backend.to_str())
    return digest_json(
        {
            "ids": tokenizer.get_vocab(),
            "special": sorted(tokenizer.all_special_ids),
            **{name: parts.get(name) for name in _TOKENIZER_PARTS},
        }
    )


def weights_digest(files: models.ModelFiles) -> str:
    """Digest over the sorted list of (tensor name, dtype, shape, sha256 of bytes): the same in 2 files or 200."""
    tensors: dict[str, tuple[str, list[int], str]] = {}
    for path in files.weights:
        for name, dtype, shape, digest in _gguf_tensors(path) if files.gguf_file else _safetensors(path):
            if name in tensors:
                raise DataError(f"the tensor `{name}` occurs twice", actual=f"again in `{path.name}`")
            tensors[name] = (dtype, shape, digest)
    return digest_json([[name, *tensors[name]] for name in sorted(tensors)])


def _safetensors(path: Path) -> Iterator[tuple[str, str, list[int], str]]:
    with path.open("rb") as file:
        size = path.stat().st_size
        length = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))[0]
        if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise DataError(f"`{path.name}` is not a safetensors file", actual=f"a header of {length} bytes")
        tensors = _header(file.read(length), path.name)
        start = 8 + length
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            view = memoryview(mapped)
            try:
                for name, tensor in tensors.items():
                    begin, end = tensor["data_offsets"]
                    if not 0 <= begin <= end <= size - start:
                        raise DataError(f"`{path.name}` is cut short at the tensor `{name}`")
                    digest = digest_bytes(view[start + begin : start + end])
                    yield name, tensor["dtype"], tensor["shape"], digest
            finally:
                view.release()


def _header(data: bytes, file: str) -> dict[str, Any]:
    """What the header of a safetensors file says of each tensor, by name."""
    try:
        header = strictjson.loads(data, where=file, max_bytes=_MAX_HEADER_BYTES)
    except ArtifactError as error:
        raise DataError(f"`{file}` is not a safetensors file: {error.message}") from error
    tensors: dict[str, Any] = header if isinstance(header, dict) else {"": header}
    tensors.pop("__metadata__", None)
    if not all(_is_tensor(value) for value in tensors.values()):
        raise DataError(f"`{file}` is not a safetensors file", actual="a header that does not describe tensors")
    return tensors


def _is_tensor(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("dtype"), str)
        and all(isinstance(value.get(name), list) for name in ("shape", "data_offsets"))
        and all(type(number) is int for number in value["shape"] + value["data_offsets"])
        and len(value["data_offsets"]) == 2
    )


def _gguf_tensors(path: Path) -> Iterator[tuple[str, str, list[int], str]]:
    from gguf import GGUFReader

    for tensor in GGUFReader(path).tensors:
        yield tensor.name, tensor.tensor_type.name, [int(n) for n in tensor.shape], digest_bytes(tensor.data.tobytes())
