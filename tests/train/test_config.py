from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from lopd_store.errors import InputError
from lopd_train import OPD, SFT, TrainConfig
from lopd_train.config import FREE_TO_CHANGE, help_of
from lopd_train.trainer import learning_rate


def test_the_defaults_are_the_papers() -> None:
    assert (OPD.learning_rate, OPD.schedule, OPD.betas) == (2e-6, "constant", (0.9, 0.98))
    assert (OPD.weight_decay, OPD.batch_rollouts, OPD.clip_norm) == (0.1, 256, 1.0)
    assert SFT.schedule == "cosine"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("advantage_clip", 0.0),
        ("advantage_power", -1.0),
        ("ratio_clip", 1.0),
        ("jsd_beta", 0.0),
        ("temperature", 0.0),
        ("correction", "rollout"),
        ("device", "auto"),
        ("correction_cap", 0.5),
        ("reference_kl_weight", -0.1),
        ("cross_entropy_weight", float("nan")),
        ("steps", 0),
        ("epochs", float("nan")),
        ("learning_rate", 0.0),
        ("learning_rate", float("inf")),
        ("schedule", "linear"),
        ("warmup_steps", -1),
        ("weight_decay", -0.1),
        ("betas", (0.9, 1.0)),
        ("clip_norm", 0.0),
        ("batch_rollouts", 0),
        ("micro_batch_tokens", 0),
        ("seed", -1),
        ("dtype", "float16"),
        ("eval_every", 0),
        ("eval_fraction", 1.0),
        ("checkpoint_every", 0),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_name_of_its_flag(name: str, value: Any) -> None:
    with pytest.raises(InputError) as raised:
        replace(OPD, **{name: value})
    message = str(raised.value)
    assert f"the setting `{name}` is out of range\n  expected  " in message
    assert f"  actual    {value}\n\nhint: `--{name.replace('_', '-')}`: " in message


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"objective": "reverse_kl", "temperature": 2.0}, "the tail is known at temperature 1 alone"),
        ({"temperature": 2.0}, "the tail is known at temperature 1 alone"),
        ({"objective": "forward_kl", "jsd_beta": 0.1}, "only it has a mixture"),
        ({"objective": "jsd", "advantage_clip": 1.0}, "only the sampled token has an advantage"),
        ({"objective": "jsd", "advantage_power": 5.0}, "only the sampled token has an advantage"),
        ({"objective": "reverse_kl", "ratio_clip": 0.2}, "only the sampled token has an advantage"),
        ({"objective": "reverse_kl", "correction": "token"}, "use `--correction sequence`"),
        ({"correction": "token", "ratio_clip": 0.2}, "two ways to do the same"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_with_the_reason(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError, match=why):
        replace(OPD, **settings)


def test_every_setting_says_what_it_means() -> None:
    names = {item.name for item in fields(TrainConfig)}
    assert all(help_of(name).endswith(".") for name in names)
    assert names >= FREE_TO_CHANGE


def test_resolving_leaves_nothing_open() -> None:
    resolved = TrainConfig(epochs=2.5, batch_rollouts=8).resolve(rollouts=20)
    assert (resolved.steps, resolved.batch_rollouts, resolved.device is None) == (7, 8, False)
    assert TrainConfig(steps=3, epochs=9).resolve(rollouts=20).steps == 3
    assert TrainConfig(batch_rollouts=256).resolve(rollouts=20).batch_rollouts == 20


def test_the_learning_rate_warms_up_and_then_stays_or_falls() -> None:
    constant = TrainConfig(steps=8, learning_rate=1.0, warmup_steps=4)
    assert [learning_rate(constant, step) for step in range(1, 9)] == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    cosine = replace(constant, schedule="cosine")
    rates = [learning_rate(cosine, step) for step in range(1, 9)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1, 1]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[6] == pytest.approx(0.5)
    assert 0 < rates[7] < 0.2
