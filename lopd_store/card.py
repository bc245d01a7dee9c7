"""The dataset card: README.md of an artifact, made from its manifest by a template."""

from __future__ import annotations

from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from lopd_store import gate
from lopd_store.license import UNKNOWN_LICENSE
from lopd_store.manifest import Manifest

UNNAMED = "OWNER/NAME"  # stands in the card for the repository until a push knows it


def render_card(manifest: Manifest, fingerprint: str) -> str:
    """The card's text; it says nothing that the manifest does not."""
    verdict = gate.judge(manifest.inputs)
    sizes = [file.size for part in manifest.parts for file in part.files.values()]
    return _template().render(
        manifest=manifest,
        inputs=manifest.inputs,
        counts=manifest.counts,
        fingerprint=fingerprint,
        repository=UNNAMED,
        state=verdict.state,
        audited=[finding for finding in verdict.findings if finding.audit is not None],
        megabytes=sum(sizes) / 1e6,
        bytes_per_position=sum(sizes) / max(manifest.counts.positions, 1),
        size_category=_size_category(manifest.counts.rollouts),
    )


def tag_of(fingerprint: str) -> str:
    """The Hub tag of an artifact: `lopd-` and the first 12 hex digits of its fingerprint."""
    return "lopd-" + fingerprint.removeprefix("sha256:")[:12]


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
    found.filters["license"] = lambda license: "unknown" if license == UNKNOWN_LICENSE else _code(license)
    found.filters["audit"] = lambda audit: f"**{audit.verdict}**: {audit}"
    return found


def _code(text: object) -> str:
    """A name from an artifact as a code span: one line in which nothing is markup, a link or an end of a table cell."""
    return f"`{_plain(text)[:200] or '?'}`"


def _plain(text: object) -> str:
    """Words that may hold a stranger's as one line without markup."""
    return "".join(char if char.isalnum() or char in " -_./:@+,()" else "?" for char in str(text))
