"""What `opd` minimises under each setting, against formulas written out over whole distributions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lopd_store
import lopd_train
from lopd_store.errors import InputError
from lopd_train import TrainConfig, student
from lopd_train.batches import Record, collate
from tests.train.records import feed_of, records_of, trainer_of

BASE = TrainConfig(steps=2, batch_rollouts=8, learning_rate=2e-3, device="cpu")
SETTINGS: dict[str, dict[str, Any]] = {
    "sampled": {},
    "advantages cut": {"advantage_clip": 0.3},
    "powers": {"advantage_power": 5.0},
    "clipped ratios": {"ratio_clip": 0.2},
    "token ratios": {"correction": "token"},
    "rollout ratios": {"correction": "sequence", "cross_entropy_weight": 0.1},
    "reverse KL": {"objective": "reverse_kl", "correction": "sequence"},
    "soft forward KL": {"objective": "forward_kl", "temperature": 2.0},
    "mixed": {"objective": "jsd", "jsd_beta": 0.3, "reference_kl_weight": 0.5, "cross_entropy_weight": 0.1},
}
WEIGHED = ["token ratios", "rollout ratios", "reverse KL", "mixed"]
EVERY = pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))


@pytest.fixture(scope="module")
def union(teacher_dir: Path, reference: Path, rollouts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact that stores what either model finds likely, with the log-probs of both."""
    output = tmp_path_factory.mktemp("artifacts") / "union"
    return lopd_store.build(teacher=teacher_dir, reference=reference, rollouts=rollouts, output=output, workers=1).path


@pytest.fixture(scope="module")
def drifted(artifact: Path, reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference policy two steps on, so that ratios are not one."""
    config = replace(BASE, eval_fraction=0)
    output = tmp_path_factory.mktemp("models") / "drifted"
    return lopd_train.train(artifact=artifact, student=reference, output=output, config=config).output


def records(artifact: Path, count: int = 8) -> list[Record]:
    """Rollouts of different lengths, some of whose positions do not count."""
    rng = np.random.default_rng(0)
    some = records_of(artifact)[:count]
    return [replace(item, loss_mask=rng.random(len(item.loss_mask)) < 0.8) for item in some]


def gradients(model: Path, some: list[Record], config: TrainConfig, directory: Path) -> tuple[float, Tensor]:
    """Loss and gradient of one optimiser step, with a body in float64."""
    directory.mkdir(exist_ok=True)
    loaded = student.load(model, config)
    loaded.model.double()
    made = trainer_of(loaded, feed_of(some, config), directory)
    loss = made.backward(some, made.terms[0])["loss"]
    return loss, torch.cat([parameter.grad.flatten() for parameter in loaded.model.parameters()])


@pytest.mark.parametrize("settings", [SETTINGS[name] for name in WEIGHED], ids=WEIGHED)
def test_one_by_eight_two_by_four_and_eight_by_one_agree(
    settings: dict[str, Any], union: Path, drifted: Path, tmp_path: Path
) -> None:
    eight, config = records(union), replace(BASE, **settings)
    longest = max(len(item.token_ids) for item in eight)
    whole_loss, whole = gradients(drifted, eight, config, tmp_path)
    for max_tokens in (4 * longest, 1):
        loss, gradient = gradients(drifted, eight, replace(config, micro_batch_tokens=max_tokens), tmp_path)
        assert loss == pytest.approx(whole_loss, rel=1e-6)
        assert float((gradient - whole).norm() / whole.norm()) < 1e-6


@EVERY
def test_the_gradient_of_every_objective_is_that_of_its_formula_over_whole_distributions(
    settings: dict[str, Any], union: Path, drifted: Path, tmp_path: Path
) -> None:
    some, config = records(union, 4), replace(BASE, **settings)
    loss, gradient = gradients(drifted, some, config, tmp_path)
    model = student.load(drifted, config).model.double()
    total = torch.stack([formula(model, item, config) for item in some]).sum()
    expected = total / sum(item.positions for item in some)
    expected.backward()  # type: ignore[no-untyped-call]
    assert loss == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
    twin = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert float((gradient - twin).norm() / twin.norm()) < 1e-4


def formula(model: Any, item: Record, config: TrainConfig) -> Tensor:
    """The loss of one rollout, summed over its positions, with everything held."""
    ids = torch.from_numpy(item.token_ids.astype(np.int64))
    logprobs = torch.log_softmax(model(input_ids=ids[None]).logits[0], dim=-1)
    places = [item.prompt_length + j for j in np.flatnonzero(item.loss_mask)]
    q = torch.stack([logprobs[place - 1, ids[place]] for place in places])
    assert item.sampled_logprobs is not None and item.reference_logprobs is not None and item.topk is not None
    p, r = (
        torch.from_numpy(values[item.loss_mask]).double() for values in (item.sampled_logprobs, item.reference_logprobs)
    )
    topk = item.topk.mask(item.loss_mask)
    assert topk.reference_logprobs is not None and topk.reference_tail_logprobs is not None
    rows = []
    for j, place in enumerate(places):
        entries = slice(int(topk.offsets[j]), int(topk.offsets[j + 1]))
        kept = torch.from_numpy(topk.ids[entries].astype(np.int64))
        outside = torch.ones(logprobs.shape[1], dtype=torch.bool)
        outside[kept] = False
        mine = torch.cat([logprobs[place - 1, kept].exp(), logprobs[place - 1, outside].exp().sum()[None]])
        others = [
            torch.from_numpy(np.exp(np.append(values[entries], tails[j]).astype(np.float64)))
            for values, tails in (
                (topk.logprobs, topk.tail_logprobs),
                (topk.reference_logprobs, topk.reference_tail_logprobs),
            )
        ]
        rows.append((mine, *(other / other.sum() for other in others)))

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return (p * (p / q).log()).sum()

    def divergence(q: Tensor, p: Tensor) -> Tensor:
        if config.temperature != 1:
            powers = [values[:-1] ** (1 / config.temperature) for values in (q, p)]
            q, p = (values / values.sum() for values in powers)
        if config.objective == "jsd":
            middle = config.jsd_beta * p + (1 - config.jsd_beta) * q
            return config.jsd_beta * kl(p, middle) + (1 - config.jsd_beta) * kl(q, middle)
        return kl(q, p) if config.objective == "reverse_kl" else kl(p, q)

    ratios = (q.detach() - r).exp()
    if config.objective != "sampled":
        loss = torch.stack([divergence(mine, teacher) for mine, teacher, _ in rows])
    else:
        power = config.advantage_power
        advantage = (p - q if power is None else p.exp() ** power - q.exp() ** power).detach()
        if config.advantage_clip is not None:
            advantage = advantage.clamp(-config.advantage_clip, config.advantage_clip)
        loss = -advantage * q
        if config.ratio_clip is not None:
            moving = (q - r).exp()
            cut = moving.clamp(1 - config.ratio_clip, 1 + config.ratio_clip)
            loss = -torch.minimum(moving * advantage, cut * advantage)
    if config.reference_kl_weight:
        loss = loss + config.reference_kl_weight * torch.stack([kl(mine, other) for mine, _, other in rows])
    if config.correction == "token":
        loss = ratios.clamp(max=config.correction_cap) * loss
    if config.correction == "sequence":
        loss = ratios.prod().clamp(max=config.correction_cap) * loss
    return (loss - config.cross_entropy_weight * q).sum()


def test_the_kl_to_the_reference_policy_is_nothing_at_the_start_and_holds_the_student_back(
    union: Path, artifact: Path, reference: Path, drifted: Path, tmp_path: Path
) -> None:
    for stored in (union, artifact):  # over the union, and at the sampled tokens
        some = records(stored)
        plain = replace(BASE, objective="reverse_kl")
        held = replace(plain, reference_kl_weight=1.0)
        at_start = [gradients(reference, some, config, tmp_path)[1] for config in (plain, held)]
        later = [gradients(drifted, some, config, tmp_path)[1] for config in (plain, held)]
        assert float((at_start[1] - at_start[0]).norm() / at_start[0].norm()) < 0.01
        assert float((later[1] - later[0]).norm() / later[0].norm()) > 0.01


def test_settings_that_read_reference_log_probs_are_refused_without_them(
    teacher_dir: Path, reference: Path, artifact: Path, tmp_path: Path
) -> None:
    plain = lopd_store.build(
        teacher=teacher_dir, rollouts=without_reference(artifact, tmp_path), output=tmp_path / "plain", workers=1
    ).path
    overrides = ["allow-unknown-sft-teacher"]
    for setting in ({"correction": "token"}, {"ratio_clip": 0.2}, {"reference_kl_weight": 0.1}):
        (name,) = setting
        with pytest.raises(InputError, match=f"has no log-probs of the reference policy\n  expected .* for `{name}`"):
            lopd_train.train(
                artifact=plain,
                student=reference,
                output=tmp_path / "opd",
                config=replace(BASE, **setting),
                overrides=overrides,
            )


def without_reference(artifact: Path, directory: Path) -> Path:
    """The rollouts of an artifact as another tool may have written them: ids alone."""
    opened = lopd_store.open(artifact)
    stored = [opened.rollout(index) for index in range(len(opened))]
    rows = [{"prompt_ids": one.prompt_ids.tolist(), "response_ids": one.response_ids.tolist()} for one in stored]
    lopd_store.rollouts.write_rollouts(directory / "plain.parquet", rows, None)
    return directory / "plain.parquet"


def test_collating_keeps_what_the_reference_policy_said(union: Path) -> None:
    some = records(union, 3)
    batch = collate(some, "cpu")
    counted = [np.flatnonzero(item.loss_mask) for item in some]
    assert batch.rollouts.tolist() == [index for index, places in enumerate(counted) for _ in places]
    expected = [item.reference_logprobs[places] for item, places in zip(some, counted, strict=True)]  # type: ignore[index]
    assert batch.reference_logprobs is not None
    assert batch.reference_logprobs.tolist() == np.concatenate(expected).tolist()
    assert batch.topk is not None
    middle = batch.slice(4, 9)
    assert middle.topk is not None and middle.topk.reference is not None
    assert batch.topk.reference is not None
    entries = slice(int(batch.topk.offsets[4]), int(batch.topk.offsets[9]))
    assert middle.topk.reference.logprobs.tolist() == batch.topk.reference.logprobs[entries].tolist()
    assert middle.topk.teacher.positions.tolist() == (batch.topk.teacher.positions[entries] - 4).tolist()
    assert middle.topk.offsets.tolist() == (batch.topk.offsets[4:10] - batch.topk.offsets[4]).tolist()
    assert middle.targets.tolist() == batch.targets[4:9].tolist()
