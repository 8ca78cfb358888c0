"""Recipes say what is wrong with them: unknown and missing keys, wrong types, values that make no sense."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch")

from localdepth.errors import TrainError
from localdepth_train.recipe import load_recipe, parse_recipe
from localdepth_train.trainer import train
from tests.training import DEFAULT


def set_to(key: str, value: str) -> Callable[[str], str]:
    """The text of a recipe with one value changed."""
    return lambda text: re.sub(rf"^{key} = .*$", f"{key} = {value}", text, flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text + "\n[extra]\n", "unknown key extra"),
        (lambda text: text.replace("clip =", "clipping ="), r"unknown key phases\[0\].optimizer.clipping"),
        (lambda text: text.replace("seed = 0", ""), "missing key seed"),
        (lambda text: text.replace("n_embd = 128", ""), "missing key model.n_embd"),
        (lambda text: text.replace("seed = 0", 'seed = "zero"'), "seed='zero' must be of type int"),
        (lambda text: text.replace("bf16 = true", "bf16 = 1"), "bf16=1 must be of type bool"),
        (lambda text: text.replace("mean = 8", 'mean = 8\nramp = "steep"'), "depth.ramp='steep' is not one of"),
        (
            lambda text: text.replace("[phases.tasks]", '[phases.tasks]\nseen = "y"'),
            r"unknown key phases\[0\].tasks.seen",
        ),
        (lambda text: text.replace('"hop"', '"chess"'), "known are"),
        (lambda text: text.replace("off_topic_share = 0.16", "off_topic_share = 5"), "is a share"),
        (lambda text: text.replace("mean = 8", "mean = 0"), "depth.mean=0 must be at least 1"),
        (lambda text: text.replace("head_dim = 32", "head_dim = 31"), "head_dim=31 is odd"),
        (lambda text: text.replace("start = 2", "start = 9"), "exceeds question_steps.top"),
        (lambda text: text + "= broken", "not valid TOML"),
        (set_to("seed", '0\nstart = "looped"'), r"start='looped' and \[model\] exclude each other"),
        (lambda text: text.replace("[[phases]]", "[phases]"), r"double brackets, \[\[phases\]\]"),
        (
            lambda text: text[: text.index("[model]")] + text[text.index("[[phases]]") :],
            r'needs \[model\].* start = "--start" leaves',
        ),
        (
            lambda text: 'start = ""\n' + text[: text.index("[model]")] + text[text.index("[[phases]]") :],
            "start='' names no folder",
        ),
        (set_to("seed", "-1"), r"seed=-1 must lie in 0\.\.4294967295"),
        (set_to("seed", str(1 << 32)), "seed=4294967296 must lie"),
        (set_to("weight_decay", "-0.1"), "weight_decay=-0.1 must be 0 or more"),
        (set_to("adamw_lr", "nan"), "adamw_lr=nan must be a finite number"),
        (set_to("clip", "-inf"), "clip=-inf must be a finite number"),
        (set_to("muon_lr", f"1{'0' * 400}"), "muon_lr=1000.* must be a finite number"),
        (set_to("clip", "0"), "clip=0.0 must be above 0"),
        (set_to("warmup", "0.5"), "warmup=0.5 and optimizer.cooldown=0.6"),
        (set_to("mastered_weight", "0"), "mastered_weight=0.0 must be above 0"),
        (set_to("threshold", "1"), "threshold=1.0 must lie between 0 and 1"),
        (set_to("threshold", "0"), "threshold=0.0 must lie between 0 and 1"),
        (set_to("evaluate_questions", "3\nevaluate_steps = 0"), "tasks.evaluate_steps=0 must be at least 1"),
        (set_to("backprop", '2\nramp = "linear"'), "ramp='linear' has no steps to rise in"),
        (set_to("backprop", "2\nsigma = -1"), "sigma=-1.0 must be 0 or more"),
    ],
)
def test_a_wrong_recipe_says_what_is_wrong(change: Callable[[str], str], said: str) -> None:
    text = DEFAULT.read_text()
    assert change(text) != text
    with pytest.raises(TrainError, match=said):
        parse_recipe(change(text))


def test_an_evaluation_depth_beyond_the_model_is_refused() -> None:
    with pytest.raises(TrainError, match="my recipe: depth=200 is outside"):
        parse_recipe(DEFAULT.read_text().replace("depths = [1, 2,", "depths = [1, 200,"), "my recipe")


def test_a_missing_recipe_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"no recipe at .*none\.toml; .*recipes/default\.toml, .*recipes/heal\.toml$"):
        load_recipe(tmp_path / "none.toml")
    with pytest.raises(TrainError, match="cannot read recipe"):
        load_recipe(tmp_path)


def test_what_a_recipe_leaves_open_is_asked_for_by_its_options(tmp_path: Path) -> None:
    heal = load_recipe(DEFAULT.with_name("heal.toml"))
    with pytest.raises(TrainError, match=r"give --start FOLDER, .* and --text PATH, the text to train on$"):
        train(heal, tmp_path / "run")
    with pytest.raises(TrainError, match="give --text PATH"):
        train(heal.given(start="looped"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
