"""Two processes train as one does and speak with one voice, whatever ``accelerate config`` once wrote."""

import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")

from localdepth_train.recipe import DrawPer, Recipe
from localdepth_train.trainer import train
from tests.conftest import tokenizer_json
from tests.training import heal_recipe, losses, records, tiny_recipe, toml

ROUNDING = 1e-5  # relative, of losses that two processes share
MUON_ROUNDING = 1e-4  # it works in bfloat16, which magnifies how sums were rounded

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def heal(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return heal_recipe(tmp_path_factory.mktemp("heal"), tokenizer_json())


def shared_recipe(per: DrawPer = DrawPer.BATCH, muon_lr: float = 0.0) -> Recipe:
    """Questions, in two phases of six steps; none is so long that processes would cut the batch in another place."""
    recipe = tiny_recipe()
    plan = recipe.phases[0]
    assert plan.tasks is not None
    depth, optimizer = replace(plan.depth, per=per), replace(plan.optimizer, muon_lr=muon_lr)
    phase = replace(plan, steps=6, depth=depth, optimizer=optimizer, tasks=replace(plan.tasks, off_topic_share=0.0))
    return replace(recipe, phases=(phase, replace(phase, name="again")))


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize(
    ("what", "rounding"),
    [
        ("a depth per batch", ROUNDING),
        ("a depth per sequence", ROUNDING),
        ("text from random states", ROUNDING),
        ("Muon", MUON_ROUNDING),
    ],
)
def test_two_processes_lose_as_one_does(heal: Recipe, tmp_path: Path, what: str, rounding: float, shard: bool) -> None:
    recipe = {
        "a depth per batch": shared_recipe(),
        "a depth per sequence": shared_recipe(DrawPer.SEQUENCE),
        "text from random states": heal,
        "Muon": shared_recipe(muon_lr=4e-3),
    }[what]
    train(recipe, tmp_path / "alone")
    (tmp_path / "recipe").write_bytes(pickle.dumps(replace(recipe, shard=shard)))
    (tmp_path / "program.py").write_text(
        "import pickle, sys, torch; torch.set_num_threads(1)\n"
        "from localdepth_train.trainer import train\n"
        "train(pickle.load(open(sys.argv[1], 'rb')), sys.argv[2])\n"
    )
    together(tmp_path / "program.py", tmp_path / "recipe", tmp_path / "together")
    assert losses(tmp_path / "together") == pytest.approx(losses(tmp_path / "alone"), rel=rounding)
    one, other = records(tmp_path / "alone"), records(tmp_path / "together")
    assert [record["flops"] for record in one] == [record["flops"] for record in other]


def together(*command: object) -> "subprocess.CompletedProcess[str]":
    """A program by two processes, under settings that ``accelerate config`` may have left."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    settings = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}
    environment = {**os.environ, **settings, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *map(str, command)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def test_of_two_processes_one_speaks(heal: Recipe, tmp_path: Path) -> None:
    recipe = toml(heal, tmp_path / "recipe.toml", steps=4)
    words = ("run", recipe, "-o", tmp_path / "run", "--json", "--track", "tensorboard")
    done = together("-m", "localdepth", "train", *words)
    assert json.loads(done.stdout)["steps"] == 4
    assert done.stderr.count("step 1 of 4: loss") == 1
    assert len(list((tmp_path / "run/tensorboard").iterdir())) == 1
