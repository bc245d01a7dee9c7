"""The audit in numbers: how often it accuses an honest text, and how much text it takes to notice another origin.

    python benchmarks/audit.py  # `make bench-audit`

It prints tables and writes them into RESULTS.md. The first run samples, trains and scores for about half an hour on one
core; models, texts and scores are kept in a cache.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt
import relatives
from draws import CUT, SETS, Honest, Scores, draw_honest, score_under
from measure import machine
from report import number, table, write_section

import lopd_store
from lopd_store.statistic import Z_LIMIT, Statistic, add_up

HERE = Path(__file__).parent
SIZES = (250, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000)
MOST = 20_000  # positions that a swapped teacher may take
SUBSETS = 20
SHARES = (0.02, 0.1, 0.25, 0.5)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A text of one origin audited under a model: as found, and as pieces that larger and smaller sets are made of."""

    name: str
    found: Statistic
    positions: npt.NDArray[np.int64]  # [pieces]
    score: npt.NDArray[np.float64]  # [pieces]
    variance: npt.NDArray[np.float64]  # [pieces]
    expected: float | None = None  # the effect without the noise of one text, from all draws
    error: float | None = None  # of `expected`, one standard deviation over rollouts
    kl: float | None = None  # KL(origin || model) in nats per token

    def detected(self, size: int, generator: np.random.Generator) -> int:
        """In how many of SUBSETS sets of so many positions |z| is above its limit."""
        enough = self.positions.sum() >= size
        count = 0
        for _ in range(SUBSETS):
            most = min(len(self.positions), size) if enough else size
            some = generator.choice(len(self.positions), most, replace=not enough)
            some = some[: int(np.searchsorted(self.positions[some].cumsum(), size)) + 1]
            count += abs(self.score[some].sum()) > Z_LIMIT * math.sqrt(self.variance[some].sum())
        return count


def main() -> None:
    """Measure, print, and keep the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, default=HERE / ".cache", help="where models, texts and scores are kept")
    parser.add_argument("--results", type=Path, default=HERE / "RESULTS.md", help="the file whose section is rewritten")
    options = parser.parse_args()
    cache: Path = options.cache / "audit"
    cache.mkdir(parents=True, exist_ok=True)
    honest = draw_honest(cache, relatives.teacher(cache), relatives.own_text(cache))
    swapped = list(swapped_teachers(cache, honest))
    others = list(other_texts(cache))
    close = list(close_relatives(cache, honest))
    text = "\n\n".join(
        [
            introduction(honest),
            f"Calibration: {SETS} honest sets, one token drawn at each position. KS is the Kolmogorov-Smirnov p-value "
            "of their p-values against uniform.",
            table_of_calibration(cache, honest),
            "Another origin. Effect, interval and z are those of one text; the expected effect is that of all draws. "
            "Human functions (HumanEval's solutions given as answers) and text sampled at another temperature are "
            "audited as if the model had sampled them at temperature 1.",
            table_of_effects([*swapped, *others]),
            f"Sets in which |z| is above {Z_LIMIT:g}, of {SUBSETS} random ones by positions. For other models they are "
            "made of fresh draws; for other texts of whole rollouts, with replacement (*) where the text is too short.",
            table_of_power([*swapped, *others, *close]),
            verdict(swapped),
            f"How close a relative can be. At n = {Z_LIMIT:g}² · variance / effect² positions half of all sets are "
            f"detected, at ({Z_LIMIT:g} + 2)² · variance / effect² nearly all.",
            table_of_relatives([*close, swapped[-1]]),
        ]
    )
    print(text)
    write_section(options.results, "Audit", text)


def swapped_teachers(cache: Path, honest: Honest) -> Iterator[Case]:
    """The teacher's text under models that it is not."""
    name = f"truncated to {relatives.LAYERS} of 30 layers"
    yield case_of_model(cache, name, "truncated", relatives.truncated(cache), honest)
    name = f"fine-tuned, {relatives.SFT_STEPS} steps"
    yield case_of_model(cache, name, "sft", relatives.fine_tuned(cache), honest)


def close_relatives(cache: Path, honest: Honest) -> Iterator[Case]:
    """The teacher's text under models nearer than those, and under its own weights in another precision."""
    for share in SHARES:
        key = f"between-{share:g}"
        name = f"{share:.0%} of the way to fine-tuned"
        if (cache / f"{key}.npz").is_file():
            yield case_of_model(cache, name, key, relatives.teacher(cache), honest)
        else:
            with relatives.between(cache, share) as model:
                yield case_of_model(cache, name, key, model, honest)
    name = "the model itself in bfloat16"
    yield case_of_model(cache, name, "bfloat16", relatives.teacher(cache), honest, dtype="bfloat16")


def case_of_model(cache: Path, name: str, key: str, model: Path, honest: Honest, dtype: str = "float32") -> Case:
    """The teacher's text and the tokens drawn from the teacher, scored under another model."""
    scores = score_under(cache, key, model, relatives.own_text(cache), honest.ids, dtype)
    total, drawn, own = int(scores.positions.sum()), scores.score[:, 1:], honest.plain.score[:, 1:]
    # What the teacher itself says of its draws has mean 0: taking it away takes most of the noise away, too.
    excess = (drawn - own).mean(axis=1)
    expected = excess.sum() / total
    kl = (scores.entropy.sum() - honest.plain.entropy.sum()) / total - expected
    return Case(
        name=name,
        found=statistic(scores),
        positions=np.repeat(scores.positions, SETS),
        score=drawn.reshape(-1),
        variance=np.repeat(scores.variance, SETS),
        expected=expected,
        error=math.sqrt(np.square(excess - expected * scores.positions).sum()) / total,
        kl=kl,
    )


def other_texts(cache: Path) -> Iterator[Case]:
    """Texts that the teacher did not sample at temperature 1, under the teacher."""
    for name, key, text in (
        ("human functions", "human", relatives.human_text(cache)),
        ("human functions, bodies alone", "human-bodies", relatives.human_text(cache, bodies_only=True)),
        (f"sampled at temperature {relatives.COOL:g}", "cool", relatives.own_text(cache, relatives.COOL)),
    ):
        rollouts = audited(cache, key, text, temperature=1)
        positions, score, variance = (
            np.array([getattr(one, field) for one in rollouts]) for field in ("positions", "score", "variance")
        )
        yield Case(name=name, found=add_up(rollouts), positions=positions, score=score, variance=variance)


def audited(cache: Path, key: str, text: Path, temperature: float) -> list[Statistic]:
    """What `lopd_store.audit` says of each rollout under the teacher."""
    path = cache / f"audit-{key}.json"
    if not path.is_file():
        model = relatives.teacher(cache)
        found = lopd_store.audit(model=model, data=text, temperature=temperature, top_p=1, device="cpu")
        path.write_text(json.dumps([vars(one) for one in found.rollouts]), encoding="utf-8")
    return [Statistic(**row) for row in json.loads(path.read_text(encoding="utf-8"))]


def statistic(scores: Scores) -> Statistic:
    """The audit's own words for the text itself."""
    positions, variance = int(scores.positions.sum()), float(scores.variance.sum())
    return Statistic(positions=positions, outside=0, score=float(scores.score[:, 0].sum()), variance=variance)


def table_of_calibration(cache: Path, honest: Honest) -> str:
    """How z spreads over honest sets."""
    cut = f"temperature {CUT[0]:g}, top-p {CUT[1]:g}"
    lines = []
    for name, z in (("temperature 1", honest.plain.z[1:]), (cut, honest.cut.z)):
        p_values = np.array([math.erfc(abs(one) / math.sqrt(2)) for one in z])
        above = f"{int((np.abs(z) > Z_LIMIT).sum())} of {len(z)}"
        met = "met" if np.abs(z).max() <= Z_LIMIT and uniform_p(p_values) > 0.05 else "**not met**"
        cells = [f"{np.abs(z).max():.2f}", above, f"{z.mean():+.2f}", f"{z.std(ddof=1):.2f}"]
        lines.append([name, *cells, f"{uniform_p(p_values):.2f}", met])
    heads = ["sampling", "max abs z", f"above {Z_LIMIT:g}", "mean z", "std of z", "KS", ""]
    cool = add_up(audited(cache, "cool-as-such", relatives.own_text(cache, relatives.COOL), relatives.COOL))
    return table(heads, lines) + (
        f"\n\nTwo texts really sampled token by token: at temperature 1 {honest.plain.positions.sum():,} positions, "
        f"z = {honest.plain.z[0]:.2f}; at temperature {relatives.COOL:g} {cool.positions:,} positions, audited as "
        f"such, z = {cool.z:.2f}."
    )


def table_of_effects(cases: list[Case]) -> str:
    """What the audit says of each text."""
    lines = []
    for case in cases:
        found, (low, high) = case.found, case.found.interval
        expected = "" if case.expected is None else f"{case.expected:+.4f}"
        cells = [f"{found.positions:,}", f"{found.effect:+.3f}", f"{low:+.3f} to {high:+.3f}", f"{found.z:+.1f}"]
        lines.append([case.name, *cells, expected])
    return table(["origin", "positions", "effect, nats/token", "95 %", "z", "expected effect"], lines)


def table_of_power(cases: list[Case]) -> str:
    """Detections by size; a star where rollouts are used more than once."""
    generator = np.random.default_rng(0)
    lines = []
    for case in cases:
        counts = [case.detected(size, generator) for size in SIZES]
        stars = ["*" if case.positions.sum() < size else "" for size in SIZES]
        lines.append([case.name, *(f"{count}{star}" for count, star in zip(counts, stars, strict=True))])
    return table(["origin", *(f"{size:,}" for size in SIZES)], lines)


def verdict(swapped: list[Case]) -> str:
    """Whether each swapped teacher is detected in all sets of the most positions that it may take."""
    generator = np.random.default_rng(1)
    counts = [case.detected(MOST, generator) for case in swapped]
    found = [f"{case.name} {count} of {SUBSETS}" for case, count in zip(swapped, counts, strict=True)]
    met = "met" if min(counts) == SUBSETS else "**not met**"
    target = f"a swapped teacher is detected in {SUBSETS} of {SUBSETS} sets of {MOST:,} positions"
    return f"Target: {target}: {met} ({'; '.join(found)})."


def table_of_relatives(cases: list[Case]) -> str:
    """Effect, distance and the text that it takes."""
    lines = []
    for case in cases:
        assert case.expected is not None and case.error is not None and case.kl is not None
        per_token = case.found.variance / case.found.positions
        needed = [f"{number_of_positions(factor, case.expected, per_token):,}" for factor in (Z_LIMIT, Z_LIMIT + 2)]
        expected = f"{case.expected:+.5f} ± {1.96 * case.error:.5f}"
        lines.append([case.name, number(case.kl), expected, f"{per_token:.2f}", *needed])
    heads = ["model", "KL, nats/token", "expected effect, 95 %", "variance/token", "half detected", "nearly all"]
    return table(heads, lines)


def number_of_positions(z: float, effect: float, variance: float) -> int:
    """How many positions it takes until z is expected, two digits of it."""
    needed = z**2 * variance / effect**2
    return int(round(needed, 1 - math.floor(math.log10(needed))))


def uniform_p(values: npt.NDArray[np.float64]) -> float:
    """Kolmogorov-Smirnov p-value of numbers against the uniform distribution (Stephens' form of the asymptotic one)."""
    ordered, count = np.sort(values), len(values)
    steps = np.arange(count + 1) / count
    distance = max((steps[1:] - ordered).max(), (ordered - steps[:-1]).max())
    scaled = (math.sqrt(count) + 0.12 + 0.11 / math.sqrt(count)) * distance
    if scaled < 0.2:
        return 1.0  # the series below converges too slowly
    return float(2 * sum((-1) ** (term - 1) * math.exp(-2 * (term * scaled) ** 2) for term in range(1, 101)))


def introduction(honest: Honest) -> str:
    """When, where, with what and on what."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("lopd", "numpy", "torch", "transformers"))
    count = honest.plain.positions.sum()
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, {machine()}; Python {platform.python_version()}, {versions}. The teacher is "
        f"SmolLM2-135M-Instruct in float32, and its text the answers to {len(honest.plain.positions)} problems of "
        f"HumanEval, {count:,} positions with a mean entropy of {honest.plain.entropy.sum() / count:.2f} nats. At each "
        f"position {SETS} more tokens are drawn. SFT: {relatives.SFT_STEPS} steps of {relatives.SFT_BATCH} human "
        "solutions to other problems at the default learning rate."
    )


if __name__ == "__main__":
    main()
