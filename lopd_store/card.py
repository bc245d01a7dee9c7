"""The dataset card: README.md of an artifact, made from its manifest by a template."""

from __future__ import annotations

from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from lopd_store import gate
from lopd_store.manifest import Manifest


def render_card(manifest: Manifest, fingerprint: str) -> str:
    """The card's text; it says nothing that the manifest does not."""
    sizes = [file.size for part in manifest.parts for file in part.files.values()]
    return _template().render(
        manifest=manifest,
        inputs=manifest.inputs,
        counts=manifest.counts,
        fingerprint=fingerprint,
        tag=tag_of(fingerprint),
        state=gate.judge(manifest.inputs).state,
        megabytes=sum(sizes) / 1e6,
        bytes_per_position=sum(sizes) / max(manifest.counts.positions, 1),
        size_category=_size_category(manifest.counts.rollouts),
    )


def tag_of(fingerprint: str) -> str:
    """The Hub tag of an artifact: `lopd-` and the first 12 hex digits of its fingerprint."""
    return "lopd-" + fingerprint.removeprefix("sha256:")[:12]


def _size_category(rollouts: int) -> str:
    for name, bound in (("n<1K", 10**3), ("1K<n<10K", 10**4), ("10K<n<100K", 10**5), ("100K<n<1M", 10**6)):
        if rollouts < bound:
            return name
    return "1M<n<10M"


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("lopd_store"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    environment.filters["plain"] = _plain
    return environment.get_template("card.md.jinja")


def _plain(text: object) -> str:
    """A name from an artifact as inert Markdown: one line, no markup."""
    return "".join(char if char.isalnum() or char in " -_./:@+" else "?" for char in str(text))[:200]
