"""Settings from TOML files, and the recipes in configs/."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from lopd_store.errors import InputError
from lopd_train import OPD, SFT, TrainConfig
from tests.commands import run_command

settings: Any = import_module("lopd_cli.settings")
CONFIGS = Path(__file__).parents[2] / "configs"


def read(text: str, directory: Path, defaults: TrainConfig = OPD) -> TrainConfig:
    path = directory / "config.toml"
    path.write_text(text)
    config: TrainConfig = settings.read(path, defaults)
    return config


def test_a_file_changes_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    text = 'objective = "jsd"\nsteps = 7\nlearning_rate = 1\nbetas = [0, 0.95]\ngradient_checkpointing = true\n'
    expected = replace(SFT, objective="jsd", steps=7, learning_rate=1.0, betas=(0.0, 0.95), gradient_checkpointing=True)
    actual = read(text, tmp_path, SFT)
    assert actual == expected
    assert [type(value) for value in asdict(actual).values()] == [type(value) for value in asdict(expected).values()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat = 1e-5", "an unknown setting `learning_rat`\n\nhint: did you mean `learning_rate`?"),
        ('artifact = "here"', "an unknown setting `artifact`\n\nhint: where things lie is said on the command line"),
        ("[opd]\nsteps = 3", "an unknown setting `opd`"),
        ("steps = 1.0", "`steps` a value of another type\n  expected  a whole number\n  actual    1.0"),
        ("steps = true", "`steps` a value of another type"),
        ("learning_rate = true", "`learning_rate` a value of another type\n  expected  a number"),
        ('learning_rate = "2e-6"', "`learning_rate` a value of another type"),
        (f"learning_rate = 1{'0' * 400}", "`learning_rate` a value of another type"),
        ("gradient_checkpointing = 1", "`gradient_checkpointing` a value of another type\n  expected  true or false"),
        ("betas = [0.9]", "`betas` a value of another type\n  expected  a list of 2 numbers"),
        ('betas = [0.9, "0.98"]', "`betas` a value of another type"),
        ("objective = 3", "`objective` a value of another type\n  expected  a string"),
        ('objective = "kl"', "the setting `objective` is out of range"),
        ("learning_rate = nan", "the setting `learning_rate` is out of range"),
        ("temperature = 2.0", "`temperature` does not go with the objective `sampled`"),
        ("steps = ", "are not TOML"),
        ("steps = 1\nsteps = 2", "are not TOML"),
        ("a = " + "[" * 100_000, "are not TOML"),
    ],
)
def test_what_is_not_a_setting_or_not_of_its_type_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as raised:
        read(text, tmp_path)
    assert message in str(raised.value)


def test_a_file_that_is_missing_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: No such file"):
        settings.read(tmp_path / "missing.toml", OPD)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="are not TOML"):
        settings.read(tmp_path / "binary.toml", OPD)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_loads(path: Path) -> None:
    assert settings.read(path, OPD) != OPD


def test_the_papers_recipe_is_the_papers() -> None:
    recipe = settings.read(CONFIGS / "lightning-opd.toml", SFT)
    assert (recipe.objective, recipe.steps, recipe.batch_rollouts) == ("sampled", 150, 256)
    assert (recipe.learning_rate, recipe.schedule, recipe.betas) == (2e-6, "constant", (0.9, 0.98))
    assert (recipe.weight_decay, recipe.clip_norm) == (0.1, 1.0)


def test_flags_override_the_file_and_run_json_says_what_came_of_it(
    student_dir: Path, sft_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "config.toml"
    path.write_text('steps = 3\nlearning_rate = 1e-4\nbatch_rollouts = 4\ndevice = "cpu"\n')
    arguments = f"--model {student_dir} --data {sft_file} --output {tmp_path / 'sft'} --config {path} --steps 1"
    ran = run_command("lopd-train", "sft", *arguments.split())
    assert ran.code == 0, ran.stderr
    config = json.loads((tmp_path / "sft" / "run.json").read_text())["config"]
    assert (config["steps"], config["learning_rate"], config["batch_rollouts"]) == (1, 1e-4, 4)
    assert config["weight_decay"] == SFT.weight_decay
