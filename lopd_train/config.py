"""The settings of a run: one value for both methods, checked when it is made.

    SFT, OPD                                the published recipes
    replace(OPD, steps=100, seed=1)         a run of one's own

Where things lie is said to `train_sft` and `train_opd`; how to train is said here, and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_type_hints

from lopd_store.errors import InputError
from lopd_store.models import default_device


class Range(NamedTuple):
    """What values make sense, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


ABOVE_0 = Range("above 0", lambda value: 0 < value < math.inf)
FROM_0 = Range("0 or more", lambda value: 0 <= value < math.inf)
FROM_1 = Range("1 or more", lambda value: 1 <= value < math.inf)
SHARE = Range("from 0 to below 1", lambda value: 0 <= value < 1)
WITHIN = Range("between 0 and 1", lambda value: 0 < value < 1)
TWO_SHARES = Range("two numbers in [0, 1)", lambda values: len(values) == 2 and all(map(SHARE.holds, values)))
ONE_DEVICE = Range("one device of each process", lambda value: value != "auto")
SEED = Range("0 to 2^63 - 1", lambda value: 0 <= value < 1 << 63)


def _one_of(kind: Any) -> Range:
    return Range(" or ".join(get_args(kind)), lambda value: value in get_args(kind))


Loss = Literal["sampled", "reverse_kl", "forward_kl", "jsd"]
Correction = Literal["none", "token", "sequence"]
Schedule = Literal["constant", "cosine"]
Dtype = Literal["float32", "bfloat16"]

# These change how fast a run goes and what it needs, not what it computes, so a resumed run may change them. What it
# drops from now on as too long would have stopped it before.
FREE_TO_CHANGE = frozenset(
    {"device", "micro_batch_tokens", "compile", "gradient_checkpointing", "checkpoint_every", "keep_checkpoints"}
    | {"eval_command", "drop_long"}
)

# Settings that only some objectives read, and why the others cannot.
_AT_TOKENS = (("sampled",), "only the sampled token has an advantage")
_ONLY_OF: Mapping[str, tuple[tuple[str, ...], str]] = {
    "advantage_clip": _AT_TOKENS,
    "advantage_power": _AT_TOKENS,
    "ratio_clip": _AT_TOKENS,
    "jsd_beta": (("jsd",), "only it has a mixture"),
    "temperature": (("forward_kl", "jsd"), "the tail is known at temperature 1 alone, and reverse KL needs it"),
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train. The defaults are those of Lightning OPD (arXiv 2604.13010)."""

    objective: Annotated[Loss, _one_of(Loss), "Of opd: at the sampled token, or over top-k and tail."] = "sampled"
    advantage_clip: Annotated[float | None, ABOVE_0, "Of sampled: greatest advantage either way, in nats."] = None
    advantage_power: Annotated[float | None, ABOVE_0, "Of sampled: PowerOPD's exponent; its authors use 5."] = None
    ratio_clip: Annotated[float | None, WITHIN, "Of sampled: PPO's clip range around the reference policy."] = None
    jsd_beta: Annotated[float, WITHIN, "Of jsd: the teacher's share of the mixture."] = 0.5
    temperature: Annotated[float, ABOVE_0, "Of forward_kl and jsd: softens both sides, and leaves the tail out."] = 1.0
    correction: Annotated[
        Correction, _one_of(Correction), "Of opd: weigh what is off-policy by ratios to the reference policy."
    ] = "none"
    correction_cap: Annotated[float, FROM_1, "Greatest such ratio."] = 2.0
    reference_kl_weight: Annotated[float, FROM_0, "Of opd: weight of the KL to the reference policy."] = 0.0
    cross_entropy_weight: Annotated[float, FROM_0, "Of opd: weight of the cross-entropy of the response."] = 0.0
    sft_weight: Annotated[float, FROM_0, "Of opd with `--sft-data`: weight of the mean cross-entropy of that data."] = (
        0.0
    )
    sft_rollouts: Annotated[int, FROM_1, "Of opd with `--sft-data`: rollouts of it per optimiser step."] = 32
    steps: Annotated[int | None, FROM_1, "Optimiser steps; by default as many as `epochs` asks for."] = None
    epochs: Annotated[float, ABOVE_0, "Passes over the training rollouts, where `steps` is not given."] = 1.0
    learning_rate: Annotated[float, ABOVE_0, "Peak learning rate."] = 2e-6
    schedule: Annotated[Schedule, _one_of(Schedule), "Learning rate after the warm-up; cosine falls to 0."] = "constant"
    warmup_steps: Annotated[int, FROM_0, "Steps over which the learning rate rises linearly from 0."] = 0
    weight_decay: Annotated[float, FROM_0, "AdamW's weight decay, on matrices only."] = 0.1
    betas: Annotated[tuple[float, float], TWO_SHARES, "AdamW's two decay rates."] = (0.9, 0.98)
    clip_norm: Annotated[float, ABOVE_0, "Greatest norm of the gradient."] = 1.0
    batch_rollouts: Annotated[int, FROM_1, "Rollouts per optimiser step; all of them where there are fewer."] = 256
    micro_batch_tokens: Annotated[int, FROM_1, "Tokens per forward pass; a longer rollout goes alone."] = 8192
    shuffle_parts: Annotated[int, FROM_1, "Parts whose rollouts are shuffled together; memory holds twice as many."] = 8
    drop_long: Annotated[bool, "Leave out rollouts longer than the student's context instead of stopping."] = False
    seed: Annotated[int, SEED, "Seed of the data order and of the held-out split."] = 0
    dtype: Annotated[Dtype, _one_of(Dtype), "Arithmetic of the forward pass, and the output's dtype."] = "float32"
    device: Annotated[str | None, ONE_DEVICE, "cpu, cuda, cuda:1, …; by default a GPU where there is one."] = None
    compile: Annotated[bool, "Compile each transformer block with torch.compile."] = False
    lora_rank: Annotated[int | None, FROM_1, "Train low-rank adapters of this rank instead of the weights."] = None
    lora_alpha: Annotated[float, ABOVE_0, "Adapters are scaled by this divided by their rank."] = 32.0
    gradient_checkpointing: Annotated[bool, "Recompute activations instead of keeping them."] = False
    eval_every: Annotated[int, FROM_1, "Steps between evaluations; there is one before and one after in any case."] = 25
    eval_fraction: Annotated[float, SHARE, "Share of the prompts held out for evaluation; 0 for none."] = 0.05
    checkpoint_every: Annotated[int, FROM_1, "Steps between checkpoints to resume from."] = 25
    keep_checkpoints: Annotated[int, FROM_0, "Models kept of this many last checkpoints, and of the best one."] = 0
    eval_command: Annotated[str | None, "Run after checkpoints, told LOPD_CHECKPOINT (a model) and LOPD_STEP."] = None

    def __post_init__(self) -> None:
        for name, (*ranges, meaning) in _marks().items():
            value = getattr(self, name)
            for fits in ranges if value is not None else []:
                if not fits.holds(value):
                    raise InputError(
                        f"the setting `{name}` is out of range",
                        expected=fits.words,
                        actual=value,
                        hint=f"`--{name.replace('_', '-')}`: {meaning}",
                    )
        for name, (objectives, why) in _ONLY_OF.items():
            if self.objective not in objectives and getattr(self, name) != self.__dataclass_fields__[name].default:
                raise InputError(
                    f"the setting `{name}` does not go with the objective `{self.objective}`: {why}",
                    expected=f"`objective` {' or '.join(objectives)}",
                    hint=f"`--{name.replace('_', '-')}`: {help_of(name)}",
                )
        if self.correction == "token" and self.objective != "sampled":
            raise InputError(
                f"`correction` token does not go with the objective `{self.objective}`",
                hint="a KL sums over every token, so only the prefix is off-policy: use `--correction sequence`",
            )
        if self.correction != "none" and self.ratio_clip is not None:
            raise InputError("`correction` and `ratio_clip` are two ways to do the same", hint="choose one of them")

    def resolve(self, rollouts: int) -> TrainConfig:
        """The same settings with nothing left open, for this many training rollouts."""
        batch = min(self.batch_rollouts, rollouts)
        steps = self.steps or math.ceil(self.epochs * rollouts / batch)
        keep = max(self.keep_checkpoints, 1) if self.eval_command else self.keep_checkpoints
        device = self.device or default_device()
        return replace(self, steps=steps, batch_rollouts=batch, device=device, keep_checkpoints=keep)

    def to_json(self) -> Mapping[str, Any]:
        """A JSON object with one member per setting."""
        return {**asdict(self), "betas": list(self.betas)}


@cache
def _marks() -> Mapping[str, tuple[Any, ...]]:
    """Of every setting its range, where it has one, and its meaning."""
    hints = get_type_hints(TrainConfig, include_extras=True)
    return {name: hint.__metadata__ for name, hint in hints.items()}


def help_of(name: str) -> str:
    """What a setting means, in a sentence."""
    return str(_marks()[name][-1])


OPD = TrainConfig()
# The settings that the paper's authors publish for their SFT (configs/sft in their repository).
SFT = TrainConfig(
    learning_rate=8e-5,
    schedule="cosine",
    warmup_steps=10,
    weight_decay=0.0,
    betas=(0.9, 0.999),
    batch_rollouts=64,
)
