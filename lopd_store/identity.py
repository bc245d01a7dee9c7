"""Model identity: digests that say which model, wherever its files lie and however they were saved.

identity = identify("Qwen/Qwen3-8B")
identity.differences(other)     # () when it is the same model
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lopd_store import models, strictjson
from lopd_store.digest import digest_json, is_digest
from lopd_store.errors import ArtifactError, InputError
from lopd_store.weights import OnBytes, tensor_digests, weights_digests

_NOT_COMPARED = ("name", "revision", "rounded_weights")
# What a config says about its file or its loading, not about the function that the model computes.
_NOT_MEANINGFUL = {
    *("_name_or_path", "_commit_hash", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache"),
    *("pretraining_tp", "output_attentions", "output_hidden_states", "return_dict", "initializer_range"),
    *("attn_implementation", "chunk_size_feed_forward", "is_encoder_decoder", "problem_type", "id2label", "label2id"),
    "quantization_config",  # has a field of its own
}
_NOT_MEANINGFUL_OF_ADAPTERS = {
    *("base_model_name_or_path", "revision", "peft_version", "inference_mode", "auto_mapping", "task_type"),
    *("init_lora_weights", "lora_dropout", "runtime_config", "eva_config", "corda_config"),
}
TOKENIZER_FIELDS = ("tokenizer", "vocab_size")  # what a token id means
TOKENIZER_PARTS = ("added_tokens", "normalizer", "pre_tokenizer", "model")


@dataclass(frozen=True, kw_only=True)
class ModelIdentity:
    """Which model: equal digests are equal functions of token ids, whatever the files are called.

    `name` and `revision` say where it came from; they are for people. They take no part in comparisons, nor do the
    rounded weights, which only explain a difference.
    """

    weights: str
    rounded_weights: str | None  # of the values in bfloat16: equal for copies in other precisions; None if quantised
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
            if field.name not in _NOT_COMPARED and getattr(self, field.name) != getattr(other, field.name)
        )

    def require(self, found: ModelIdentity, message: str, *, hint: str | None = None) -> None:
        """Raise InputError with this message unless the model that was found is this one."""
        if differences := self.differences(found):
            raise InputError(
                message,
                expected=f"{self.name}, weights {self.weights}",
                actual=f"{found.name}, which differs in {', '.join(differences)}",
                hint=hint,
            )

    def is_rounding_of(self, other: ModelIdentity) -> bool:
        """Whether the weights are the same values in another precision."""
        known = self.rounded_weights is not None and self.rounded_weights == other.rounded_weights
        return known and self.weights != other.weights

    def to_json(self) -> dict[str, Any]:
        """A JSON object with one member per field."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_json(cls, value: Any, *, where: str, open_ended: bool = False) -> ModelIdentity:
        """Parse what `to_json` gave; raises ArtifactError at any other shape."""
        value = strictjson.members(value, [field.name for field in fields(cls)], where=where, open_ended=open_ended)
        for name in ("weights", "config", "tokenizer"):
            if not is_digest(value[name]):
                raise ArtifactError(f"`{where}.{name}` is not a digest", actual=repr(value[name])[:100])
        for name in ("rounded_weights", "chat_template", "adapter"):
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


def identify(model: str | Path, *, on_bytes: OnBytes | None = None) -> ModelIdentity:
    """The identity of a model directory, GGUF file, PEFT adapter or Hub id; reads every byte of the weights once.

    `on_bytes` hears (bytes read, bytes in all).
    """
    files = models.find(model)
    loaded = models.load_config(files)
    tokenizer = models.load_tokenizer(files)
    template = tokenizer.chat_template
    quantized = loaded.to_dict().get("quantization_config") or {}
    quantization = "gguf" if files.gguf_file else quantized.get("quant_method")
    weights = weights_digests(tensor_digests(files.weights, on_bytes=on_bytes))
    return ModelIdentity(
        weights=weights.weights,
        rounded_weights=None if quantization else weights.rounded,
        config=digest_json(meaningful_config(loaded)),
        tokenizer=tokenizer_digest(tokenizer),
        chat_template=None if template is None else digest_json(template),
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        output_width=int(loaded.get_text_config().vocab_size),
        adapter=None if files.adapter is None else adapter_digest(files.adapter),
        quantization=quantization,
        name=files.name,
        revision=files.revision,
    )


def load_tokenizer_of(model: str | Path, identity: ModelIdentity) -> Any:
    """The tokenizer of `model`; raises InputError unless it is the one of this identity."""
    tokenizer = models.load_tokenizer(models.find(model))
    if (found := tokenizer_digest(tokenizer)) != identity.tokenizer:
        raise InputError(
            f"`{model}` has another tokenizer than the artifact", expected=identity.tokenizer, actual=found
        )
    return tokenizer


def meaningful_config(config: Any) -> dict[str, Any]:
    """The fields of a configuration that say which function the model computes."""
    return {name: value for name, value in config.to_dict().items() if name not in _NOT_MEANINGFUL}


def adapter_digest(directory: Path) -> str:
    """Digest of a PEFT adapter: its weights, and the fields of its configuration that say how they are applied."""
    config = strictjson.loads((directory / "adapter_config.json").read_bytes(), where="adapter_config.json")
    weights = weights_digests(tensor_digests(sorted(directory.glob("*.safetensors"))))
    meaningful = {
        name: sorted(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else value
        for name, value in config.items()
        if name not in _NOT_MEANINGFUL_OF_ADAPTERS and value not in (None, {}, [], False)
    }
    return digest_json({"weights": weights.weights, "config": meaningful})


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of what decides text -> ids: the full id map, merges, added tokens, normaliser and pre-tokeniser."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = {} if backend is None else json.loads(backend.to_str())
    return digest_json(
        {
            "ids": tokenizer.get_vocab(),
            "special": sorted(tokenizer.all_special_ids),
            **{name: parts.get(name) for name in TOKENIZER_PARTS},
        }
    )
