"""The dataset card: README.md of an artifact, made from its manifest by a template.

What lopd writes stands between two markers, and some members of the metadata above; everything else is people's, and
stays when the card is made again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from lopd_store import gate, layout
from lopd_store.hub import tag_of
from lopd_store.identity import ModelIdentity
from lopd_store.license import UNKNOWN_LICENSE
from lopd_store.manifest import Manifest

UNNAMED = "OWNER/NAME"  # stands in the card for the repository until a push knows it
_BEGIN = "<!-- lopd writes what follows, up to the end; write above or below it -->"
_END = "<!-- end of what lopd writes -->"
_TAG = "lopd"
_PLOTS = (  # what each shows, for who cannot see it
    "Share of positions by the number of stored entries, and the mean mass that these hold",
    "Positions by the log-prob of their token under teacher minus reference policy",
    "Rollouts by the number of their response tokens",
)
_METADATA = re.compile(r"---\n(.*?)\n---\n", re.DOTALL)
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}", re.ASCII)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}", re.ASCII)


def render_card(manifest: Manifest, fingerprint: str, *, plots: Sequence[str] = ()) -> str:
    """The card's text; it says nothing that the manifest does not, and shows the plots that lie beside it."""
    verdict = gate.judge(manifest.inputs)
    sizes = [file.size for part in manifest.parts for file in part.files.values()]
    text = _template().render(
        manifest=manifest,
        inputs=manifest.inputs,
        counts=manifest.counts,
        counts_of=manifest.counts_of,
        fingerprint=fingerprint,
        plots=[(name, words) for name, words in zip(layout.ALL_PLOTS, _PLOTS, strict=True) if name in plots],
        tag=tag_of(fingerprint),
        repository=UNNAMED,
        state=verdict.state,
        audited=[finding for finding in verdict.findings if finding.audit is not None],
        megabytes=sum(sizes) / 1e6,
        bytes_per_position=sum(sizes) / max(manifest.counts.positions, 1),
    )
    return _join(_metadata(manifest, fingerprint), f"\n{_BEGIN}\n\n{text}\n{_END}\n")


def merge_card(generated: str, edited: str) -> str:
    """The generated card with what people wrote into the edited one: more metadata, text outside of the markers."""
    ours, card = _split(generated)
    theirs, text = _split(edited)
    block = card[card.index(_BEGIN) : card.index(_END) + len(_END)]
    tags = theirs.get("tags")
    added = [tag for tag in tags if not _is_ours(tag)] if isinstance(tags, list) else []
    if "license" in theirs:  # what people say of their artifact goes before what the teacher's licence is
        ours.pop("license", None)
    metadata = theirs | ours | {"tags": [*ours["tags"], *(tag for tag in added if tag not in ours["tags"])]}
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not (begin and end):  # a card that lopd did not write
        before, after = text.rstrip("\n") + "\n\n", "\n"
    return _join(metadata, before + block + after)


def search_tags(
    *, fingerprint: str | None = None, teachers: Iterable[str] = (), tokenizer: str | None = None
) -> list[str]:
    """The tags by which an artifact is found: by its name, its teachers' weights, its tokenizer, each a digest."""
    digests = [("artifact", fingerprint), *(("teacher", one) for one in teachers), ("tokenizer", tokenizer)]
    named = [f"{_TAG}-{what}-{digest[7:19]}" for what, digest in digests if digest is not None]
    return [_TAG, *dict.fromkeys(named)]


def _metadata(manifest: Manifest, fingerprint: str) -> dict[str, Any]:
    """What the Hub reads of a card: nothing in it is text of strangers but ids of models that can be ids."""
    inputs = manifest.inputs
    policies = [one.rollouts.policy for one in inputs if one.rollouts]
    models = [*(one.teacher for one in inputs), *policies]
    base = dict.fromkeys(model.name for model in models if _is_on_hub(model))
    licenses = {one.license.id or "" for one in inputs}
    license = licenses.pop() if len(licenses) == 1 and all(map(_LICENSE.fullmatch, licenses)) else None
    return {
        "tags": [
            *search_tags(
                fingerprint=fingerprint,
                teachers=[one.teacher.weights for one in inputs],
                tokenizer=inputs[0].teacher.tokenizer,
            ),
            "distillation",
        ],
        **({"license": license} if license else {}),
        **({"base_model": list(base)} if base else {}),
        "size_categories": [_size_category(manifest.counts.rollouts)],
        "configs": [{"config_name": "rollouts", "data_files": "parts/*.rollouts.parquet"}],
    }


def _is_on_hub(model: ModelIdentity) -> bool:
    """Whether the identity was taken of a repository: then it has a commit."""
    return model.revision is not None and _HUB_ID.fullmatch(model.name) is not None


def _is_ours(tag: object) -> bool:
    return isinstance(tag, str) and (tag == _TAG or tag.startswith(f"{_TAG}-"))


def _join(metadata: dict[str, Any], text: str) -> str:
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n{text}"


def _split(card: str) -> tuple[dict[str, Any], str]:
    """The metadata of a card and its text; none where it cannot be read."""
    card = card.replace("\r\n", "\n")
    match = _METADATA.match(card)
    if match is None:
        return {}, card
    try:
        metadata = yaml.safe_load(match[1])
    except (yaml.YAMLError, RecursionError):
        metadata = None
    return metadata if isinstance(metadata, dict) else {}, card[match.end() :]


def _size_category(rollouts: int) -> str:
    """The Hub's name for a data set of this many rows."""
    bounds = ["1K", "10K", "100K", "1M", "10M", "100M", "1B"]
    smaller = sum(rollouts >= 1000 * 10**power for power in range(len(bounds)))
    if smaller == 0:
        return f"n<{bounds[0]}"
    return f"n>{bounds[-1]}" if smaller == len(bounds) else f"{bounds[smaller - 1]}<n<{bounds[smaller]}"


@cache
def _template() -> Template:
    return environment("lopd_store").get_template("card.md.jinja")


def environment(package: str) -> Environment:
    """The templates of a package, with filters that keep what strangers wrote from being markup."""
    found = Environment(
        loader=PackageLoader(package),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    found.filters["code"] = _code
    found.filters["plain"] = _plain
    found.filters["number"] = lambda number: "unknown" if number is None else f"{number:g}"
    found.filters["license"] = lambda license: "unknown" if license == UNKNOWN_LICENSE else _code(license)
    found.filters["audit"] = lambda audit: f"**{audit.verdict}**: {audit}"
    return found


def _code(text: object) -> str:
    """A name from an artifact as a code span: one line in which nothing is markup, a link or an end of a table cell."""
    return f"`{_plain(text)[:200] or '?'}`"


def _plain(text: object) -> str:
    """Words that may hold a stranger's as one line without markup."""
    return "".join(char if char.isalnum() or char in " -_./:@+,()" else "?" for char in str(text))
