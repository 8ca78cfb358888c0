"""Experiments: arms cost the same, start from what they say, and end in a table and a figure."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from localdepth_train.checkpoint import Checkpoint  # noqa: E402
from localdepth_train.curriculum import Ramp  # noqa: E402
from localdepth_train.findings.experiments import (  # noqa: E402
    EXPERIMENTS,
    flops_per_token,
    make_start,
    run_arm,
    steps_for,
)
from localdepth_train.findings.grounds import TaskGround  # noqa: E402
from localdepth_train.recipe import DepthRecipe  # noqa: E402
from tests.published import EXPECTED  # noqa: E402

CONFIG = EXPECTED["retrofit_llama"]
STEP_SHARE = 0.02  # a budget is met to a step, and a ramp's cost is drawn


@pytest.mark.parametrize("ramp", Ramp)
@pytest.mark.parametrize("mean", [2, 4, 8])
def test_arms_cost_the_same_however_deep_they_go(ramp: Ramp, mean: int) -> None:
    depth = DepthRecipe(mean=mean, backprop=4, ramp=ramp, ramp_share=0.5)
    budget = 500 * flops_per_token(CONFIG, DepthRecipe(mean=4, backprop=4), 500)
    steps = steps_for(budget, CONFIG, depth)
    assert steps * flops_per_token(CONFIG, depth, steps) == pytest.approx(budget, rel=STEP_SHARE)


def test_a_plain_pass_costs_its_layers_once() -> None:
    plain = replace(CONFIG, n_prelude=0, n_core=4, n_coda=0)
    deep = flops_per_token(plain, DepthRecipe(mean=3, backprop=3, fixed=True), 10)
    once = flops_per_token(plain, DepthRecipe(mean=1, backprop=1, fixed=True), 10)
    assert 2 < deep / once < 3.1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arm"), [(name, arm) for name, one in EXPERIMENTS.items() for arm in one.arms])
def test_every_arm_trains_and_is_judged(name: str, arm: str, ground_folder: Path) -> None:
    make_start(name, next(iter(EXPERIMENTS[name].arms)), GROUND, ground_folder, seed=0)
    make_start(name, arm, GROUND, ground_folder, seed=0)
    looks = run_arm(name, arm, GROUND, ground_folder, seed=0)
    assert {"1", "16"} <= set(looks[-1]["evaluation"]["loss"])
    assert {"1", "8"} <= set(looks[-1]["evaluation"]["cells"]["turn"])


GROUND = TaskGround(steps=2, base_steps=2)


@pytest.fixture(scope="session")
def ground_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the base of all arms lies."""
    return tmp_path_factory.mktemp("findings")


@pytest.mark.slow
def test_a_random_start_has_the_shape_and_tokenizer_of_the_retrofit(ground_folder: Path) -> None:
    random, retrofit = (
        Checkpoint(make_start("pretrained", arm, GROUND, ground_folder, seed=0)) for arm in ("random", "pretrained")
    )
    assert random.config.tensors() == retrofit.config.tensors()
    assert random.text("tokenizer.json") == retrofit.text("tokenizer.json")
    name = "core.0.ffn_up.weight"
    assert not np.allclose(random.read(name), retrofit.read(name))


@pytest.mark.slow
def test_the_command_ends_in_a_table_and_a_figure(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "localdepth_train.findings", "retrofit", "-o", str(tmp_path)]
    done = subprocess.run([*command, "--seeds", "2", "--steps", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| plain |" in done.stdout
    assert (tmp_path / "questions/retrofit.png").stat().st_size > 10_000
