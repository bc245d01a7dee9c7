"""Plots for the card: what the distributions of an artifact look like, as small images beside README.md.

    draw(part)["plots/topk.png"]        # the bytes of a PNG

They are drawn when an artifact is sealed, from a million positions at most, and say nothing that the stored values
do not; like the card, no digest covers them. The same values give the same image on the same version of Matplotlib.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

from lopd_store import layout
from lopd_store.part import Part

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEAST_POSITIONS = 1_000  # fewer make no distribution
_MOST_POSITIONS = 1 << 20
_INCHES, _DOTS = (4.8, 3.0), 100  # per inch
_MAIN, _OTHER = "#2f6f9f", "#d1495b"
_OUTSIDE = 0.05  # per cent at either end, beyond what is shown


def draw(part: Part) -> dict[str, bytes]:
    """The plots by their paths; none of a part with few positions, nor of what it lacks."""
    part = part.slice(0, max(int(np.searchsorted(part.position_offsets, _MOST_POSITIONS, side="right")) - 1, 1))
    if len(part.sampled_logprobs) < LEAST_POSITIONS:
        return {}
    import matplotlib
    from matplotlib.figure import Figure

    plots: dict[str, bytes] = {}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # nobody's own style
        matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.grid": True, "grid.alpha": 0.3})
        for name, plot in zip(layout.ALL_PLOTS, (_topk, _advantages, _responses), strict=True):
            figure = Figure(figsize=_INCHES, dpi=_DOTS, layout="constrained")
            if plot(part, figure.add_subplot()):
                sink = io.BytesIO()
                figure.savefig(sink, format="png", metadata={"Software": None})
                plots[name] = sink.getvalue()
    return plots


def _topk(part: Part, axes: Axes) -> bool:
    """How many entries positions have, and what mass these hold."""
    if (topk := part.topk) is None:
        return False
    shares = np.bincount(topk.counts) / len(topk.counts)
    ks = np.flatnonzero(shares)
    axes.bar(ks, shares[ks], width=1, color=_MAIN)
    axes.set(xlabel="stored entries k", ylabel="share of positions", yscale="log")
    axes.set_title(f"k is {topk.counts.mean():.1f} on average", loc="left")
    mass = 1 - np.exp(topk.tail_logprobs.astype(np.float64))
    beside = axes.twinx()
    beside.plot(ks, (np.bincount(topk.counts, mass) / np.bincount(topk.counts).clip(1))[ks], ".-", color=_OTHER)
    beside.set_ylabel("mean mass that they hold", color=_OTHER)
    beside.grid(False)
    return True


def _advantages(part: Part, axes: Axes) -> bool:
    """How much likelier the teacher finds each sampled token than the policy that sampled it."""
    if part.reference_logprobs is None:
        return False
    with np.errstate(invalid="ignore"):
        advantages = (part.sampled_logprobs - part.reference_logprobs)[part.loss_mask]
    advantages = advantages[np.isfinite(advantages)]
    if not len(advantages):
        return False
    low, high = np.percentile(advantages, [_OUTSIDE, 100 - _OUTSIDE])
    mean = advantages.mean(dtype=np.float64)
    axes.hist(advantages, bins=80, range=(low, max(high, low + 0.1)), color=_MAIN)
    axes.axvline(mean, color=_OTHER)
    axes.set(xlabel="log-prob under teacher minus reference policy (nat)", ylabel="positions", yscale="log")
    axes.set_title(f"advantage of the sampled token: {mean:+.3f} on average", loc="left")
    return True


def _responses(part: Part, axes: Axes) -> bool:
    """How long the responses are."""
    lengths = np.diff(part.position_offsets)
    axes.hist(lengths, bins=40, color=_MAIN)
    axes.axvline(lengths.mean(), color=_OTHER)
    axes.set(xlabel="response tokens", ylabel="rollouts")
    axes.set_title(f"responses have {lengths.mean():,.0f} tokens on average", loc="left")
    return True
