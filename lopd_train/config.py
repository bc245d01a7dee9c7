"""The settings of a run: one value for both methods, checked when it is made.

    SFT, OPD                                the published recipes
    replace(OPD, steps=100, seed=1)         a run of one's own

Where things lie is said to `train_sft` and `train_opd`; how to train is said here, and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal, get_args, get_type_hints

from lopd_store.errors import InputError
from lopd_store.models import default_device

Schedule = Literal["constant", "cosine"]
Dtype = Literal["float32", "bfloat16"]
Loss = Literal["sampled", "reverse_kl", "forward_kl", "jsd"]
Correction = Literal["none", "token", "sequence"]
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

    objective: Annotated[Loss, "Of opd: on the sampled token, as in the paper, or over top-k and tail."] = "sampled"
    advantage_clip: Annotated[float | None, "Of sampled: greatest advantage either way, in nats."] = None
    advantage_power: Annotated[float | None, "Of sampled: PowerOPD's exponent; its authors use 5."] = None
    ratio_clip: Annotated[float | None, "Of sampled: PPO's clip range around the reference policy."] = None
    jsd_beta: Annotated[float, "Of jsd: the teacher's share of the mixture."] = 0.5
    temperature: Annotated[float, "Of forward_kl and jsd: softens both sides, and leaves the tail out."] = 1.0
    correction: Annotated[Correction, "Of opd: weigh what is off-policy by ratios to the reference policy."] = "none"
    correction_cap: Annotated[float, "Greatest such ratio."] = 2.0
    reference_kl_weight: Annotated[float, "Of opd: weight of the KL to the reference policy in the loss."] = 0.0
    cross_entropy_weight: Annotated[float, "Of opd: weight of the cross-entropy of the response in the loss."] = 0.0
    steps: Annotated[int | None, "Optimiser steps; by default as many as `epochs` asks for."] = None
    epochs: Annotated[float, "Passes over the training rollouts, where `steps` is not given."] = 1.0
    learning_rate: Annotated[float, "Peak learning rate."] = 2e-6
    schedule: Annotated[Schedule, "Learning rate after the warm-up; cosine falls to 0."] = "constant"
    warmup_steps: Annotated[int, "Steps over which the learning rate rises linearly from 0."] = 0
    weight_decay: Annotated[float, "AdamW's weight decay, on matrices only."] = 0.1
    betas: Annotated[tuple[float, float], "AdamW's two decay rates."] = (0.9, 0.98)
    clip_norm: Annotated[float, "Greatest norm of the gradient."] = 1.0
    batch_rollouts: Annotated[int, "Rollouts per optimiser step; all of them where there are fewer."] = 256
    micro_batch_tokens: Annotated[int, "Tokens per forward pass; a longer rollout goes alone."] = 8192
    shuffle_parts: Annotated[int, "Parts whose rollouts are shuffled together; memory holds twice as many."] = 8
    drop_long: Annotated[bool, "Leave out rollouts longer than the student's context instead of stopping."] = False
    seed: Annotated[int, "Seed of the data order and of the held-out split."] = 0
    dtype: Annotated[Dtype, "Arithmetic of the forward pass, and the output's dtype."] = "float32"
    device: Annotated[str | None, "cpu, cuda, cuda:1, …; by default a GPU where there is one."] = None
    compile: Annotated[bool, "Compile each transformer block with torch.compile."] = False
    lora_rank: Annotated[int | None, "Train low-rank adapters of this rank instead of the weights."] = None
    lora_alpha: Annotated[float, "Adapters are scaled by this divided by their rank."] = 32.0
    lora_targets: Annotated[str, "The layers with adapters: all-linear, or names with commas between."] = "all-linear"
    gradient_checkpointing: Annotated[bool, "Recompute activations instead of keeping them."] = False
    eval_every: Annotated[int, "Steps between evaluations; there is one before and one after in any case."] = 25
    eval_fraction: Annotated[float, "Share of the prompts held out for evaluation; 0 for none."] = 0.05
    checkpoint_every: Annotated[int, "Steps between checkpoints to resume from."] = 25
    keep_checkpoints: Annotated[int, "Models kept of this many last checkpoints, and of the best one."] = 0
    eval_command: Annotated[str | None, "Run after checkpoints, told LOPD_CHECKPOINT (a model) and LOPD_STEP."] = None

    def __post_init__(self) -> None:
        for name, fits, expected in (
            ("objective", self.objective in get_args(Loss), " or ".join(get_args(Loss))),
            ("advantage_clip", self.advantage_clip is None or 0 < self.advantage_clip < math.inf, "above 0"),
            ("advantage_power", self.advantage_power is None or 0 < self.advantage_power < math.inf, "above 0"),
            ("ratio_clip", self.ratio_clip is None or 0 < self.ratio_clip < 1, "between 0 and 1"),
            ("jsd_beta", 0 < self.jsd_beta < 1, "between 0 and 1"),
            ("temperature", 0 < self.temperature < math.inf, "above 0"),
            ("correction", self.correction in get_args(Correction), " or ".join(get_args(Correction))),
            ("correction_cap", 1 <= self.correction_cap < math.inf, "1 or more"),
            ("reference_kl_weight", 0 <= self.reference_kl_weight < math.inf, "0 or more"),
            ("cross_entropy_weight", 0 <= self.cross_entropy_weight < math.inf, "0 or more"),
            ("steps", self.steps is None or self.steps >= 1, "1 or more"),
            ("epochs", 0 < self.epochs < math.inf, "above 0"),
            ("learning_rate", 0 < self.learning_rate < math.inf, "above 0"),
            ("schedule", self.schedule in get_args(Schedule), " or ".join(get_args(Schedule))),
            ("warmup_steps", self.warmup_steps >= 0, "0 or more"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "0 or more"),
            ("betas", len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas), "two numbers in [0, 1)"),
            ("clip_norm", 0 < self.clip_norm < math.inf, "above 0"),
            ("batch_rollouts", self.batch_rollouts >= 1, "1 or more"),
            ("micro_batch_tokens", self.micro_batch_tokens >= 1, "1 or more"),
            ("shuffle_parts", self.shuffle_parts >= 1, "1 or more"),
            ("seed", 0 <= self.seed < 1 << 63, "0 to 2^63 - 1"),
            ("dtype", self.dtype in get_args(Dtype), " or ".join(get_args(Dtype))),
            ("lora_rank", self.lora_rank is None or self.lora_rank >= 1, "1 or more"),
            ("lora_alpha", 0 < self.lora_alpha < math.inf, "above 0"),
            ("eval_every", self.eval_every >= 1, "1 or more"),
            ("eval_fraction", 0 <= self.eval_fraction < 1, "from 0 to below 1"),
            ("checkpoint_every", self.checkpoint_every >= 1, "1 or more"),
            ("keep_checkpoints", self.keep_checkpoints >= 0, "0 or more"),
        ):
            if not fits:
                raise InputError(
                    f"the setting `{name}` is out of range",
                    expected=expected,
                    actual=getattr(self, name),
                    hint=f"`--{name.replace('_', '-')}`: {help_of(name)}",
                )

        for name, (objectives, why) in _ONLY_OF.items():
            if self.objective not in objectives and getattr(self, name) != _default(name):
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

    @property
    def needs_reference(self) -> tuple[str, ...]:
        """The settings in use that read the reference policy's log-probs."""
        used = {
            "correction": self.correction != "none",
            "ratio_clip": self.ratio_clip is not None,
            "reference_kl_weight": self.reference_kl_weight > 0,
        }
        return tuple(f"`{name}`" for name, is_used in used.items() if is_used)

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


def _default(name: str) -> Any:
    return TrainConfig.__dataclass_fields__[name].default


def help_of(name: str) -> str:
    """What a setting means, in a sentence."""
    return str(get_type_hints(TrainConfig, include_extras=True)[name].__metadata__[0])


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
