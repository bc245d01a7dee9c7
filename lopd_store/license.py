"""The licence of a model, and whether it is gated: read where the model says it, never guessed.

    read_license("Qwen/Qwen3-8B").id        # "apache-2.0", or None where nothing says it

It travels into the artifact beside the teacher's identity, and is no part of it. Names are the Hub's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lopd_store import models, strictjson
from lopd_store.errors import ArtifactError

MAX_CHARACTERS = 500  # of each member; a link is not a text
_MAX_CARD_BYTES = 1 << 20
_CARD = "README.md"


@dataclass(frozen=True, kw_only=True)
class License:
    """What a model says of its licence; None is unknown, which is not the same as free."""

    id: str | None = None  # as the Hub writes it: `apache-2.0`, `other`
    name: str | None = None  # of another one
    link: str | None = None
    gated: bool | None = None  # whether the Hub asks who downloads it

    def __str__(self) -> str:
        words = [self.id or "unknown", *(f"({word})" for word in (self.name, self.link) if word is not None)]
        gating = {True: ", gated", False: ", not gated", None: ""}[self.gated]
        return " ".join(words) + gating

    def to_json(self) -> dict[str, Any]:
        """A JSON object with one member per field."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    @classmethod
    def from_json(cls, value: Any, *, where: str, open_ended: bool = False) -> License:
        """Parse what `to_json` gave."""
        value = strictjson.members(value, [item.name for item in fields(cls)], where=where, open_ended=open_ended)
        for name in ("id", "name", "link"):
            text = value[name]
            if text is not None and not (isinstance(text, str) and 1 <= len(text) <= MAX_CHARACTERS):
                raise ArtifactError(f"`{where}.{name}` is neither a short string nor null", actual=repr(text)[:100])
        if value["gated"] is not None and type(value["gated"]) is not bool:
            raise ArtifactError(f"`{where}.gated` is not true, false or null", actual=repr(value["gated"])[:100])
        return cls(**{item.name: value[item.name] for item in fields(cls)})


UNKNOWN_LICENSE = License()


def read_license(model: str | Path) -> License:
    """What a model's card or GGUF file says; of one on the Hub also whether it is gated, where that can be asked."""
    files = models.find(model)
    if files.gguf_file is not None:
        return _of_gguf(files.weights[0])
    said = _front_matter((files.adapter or files.directory) / _CARD)
    texts = {field: _text(said.get(key)) for field, key in _KEYS.items()}
    return License(**texts, gated=None if files.revision is None else _is_gated(files.name, files.revision))


_KEYS = {"id": "license", "name": "license_name", "link": "license_link"}


def _front_matter(path: Path) -> Mapping[str, Any]:
    """The metadata of a model card; empty where there is none that reads."""
    from huggingface_hub.repocard import metadata_load
    from yaml import YAMLError

    try:
        if path.stat().st_size > _MAX_CARD_BYTES:
            return {}
        return metadata_load(path) or {}
    except (OSError, ValueError, YAMLError, RecursionError):
        return {}


def _text(value: Any) -> str | None:
    """A member of a card as text; several licences are listed."""
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        value = ", ".join(value)
    return value if isinstance(value, str) and 1 <= len(value) <= MAX_CHARACTERS else None


def _of_gguf(path: Path) -> License:
    from gguf import GGUFReader

    reader = GGUFReader(path)

    def text(name: str) -> str | None:
        field = reader.get_field(name)
        return None if field is None else _text(field.contents())

    return License(id=text("general.license"), name=text("general.license.name"), link=text("general.license.link"))


def _is_gated(repository: str, revision: str) -> bool | None:
    """What the Hub says; None where it cannot be asked."""
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        gated = HfApi().model_info(repository, revision=revision).gated
    except (HfHubHTTPError, httpx2.HTTPError, OSError):
        return None
    return None if gated is None else bool(gated)
