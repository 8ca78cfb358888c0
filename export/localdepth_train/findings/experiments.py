"""The claims, each as arms that are trained for equal FLOPs and compared."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from localdepth.config import ModelConfig
from localdepth_train.checkpoint import save
from localdepth_train.curriculum import Ramp, backprop_depth_at, mean_depth_at
from localdepth_train.depth_sampler import Passes, sample_passes, seeded
from localdepth_train.findings.grounds import Ground, Layers
from localdepth_train.flops import Flops
from localdepth_train.recipe import DepthRecipe
from localdepth_train.reference import ReferenceModel
from localdepth_train.start import open_checkpoint
from localdepth_train.surgery import retrofit
from localdepth_train.trainer import train

__all__ = ["EXPERIMENTS", "Arm", "Experiment", "flops_per_token", "make_base", "make_start", "run_arm", "steps_for"]

_LABEL_SHARE = 0.3  # of positions; the head counts in the same way for all arms, so this only has to be about right
_PUBLISHED = DepthRecipe(mean=4, backprop=4)
_PLAIN = DepthRecipe(mean=1, backprop=1, fixed=True)


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to train.

    Attributes:
        depth: how deep.
        start: what from: "retrofit" (surgery), "random" (the same model, drawn afresh) or "plain" (the base itself).
        layers: picks the layers that surgery keeps.
    """

    depth: DepthRecipe = _PUBLISHED
    start: str = "retrofit"
    layers: Callable[[Ground], Layers] = field(default=lambda ground: ground.layers)
    injection: str = "concat_linear"
    init: str = "identity"


@dataclass(frozen=True, slots=True)
class Experiment:
    """A claim and the arms that test it; the first arm sets the FLOPs of the others."""

    claim: str
    arms: Mapping[str, Arm]


EXPERIMENTS = {
    "pretrained": Experiment(
        "a retrofit of a pretrained model is better than the same model from random weights, at equal FLOPs",
        {"pretrained": Arm(), "random": Arm(start="random")},
    ),
    "curriculum": Experiment(
        "growing the mean depth during training saves FLOPs for the same loss",
        {
            "no curriculum": Arm(),
            "1-sqrt": Arm(replace(_PUBLISHED, ramp=Ramp.ONE_MINUS_SQRT, ramp_share=0.75)),
            "linear": Arm(replace(_PUBLISHED, ramp=Ramp.LINEAR, ramp_share=0.25)),
        },
    ),
    "retrofit": Experiment(
        "a retrofit is better than training the plain model on, at equal FLOPs",
        {"retrofit": Arm(), "plain": Arm(_PLAIN, start="plain")},
    ),
    "surgery": Experiment(
        "late core layers and the linear injection are the right choice",
        {
            "late, identity": Arm(),
            "late, paper": Arm(init="paper"),
            "late, pass-through": Arm(init="pass-through"),
            "late, add": Arm(injection="add", init="pass-through"),
            "early, identity": Arm(layers=lambda ground: ground.early_layers),
            "all, identity": Arm(layers=lambda ground: ground.all_layers),
        },
    ),
    "depth": Experiment(
        "depths beyond the training mean still help, or at least do no harm",
        {f"mean {mean}": Arm(replace(_PUBLISHED, mean=mean)) for mean in (4, 2, 8)},
    ),
}


def make_base(ground: Ground, folder: Path, seed: int) -> Path:
    """The plain model that the arms of one seed begin with, made once in ``folder``."""
    torch.set_num_threads(1)
    return ground.base(folder / f"base-seed{seed}", seed)


def make_start(name: str, arm: str, ground: Ground, folder: Path, seed: int) -> Path:
    """What an arm begins with, made once from the base of its seed."""
    chosen = EXPERIMENTS[name].arms[arm]
    base, start = make_base(ground, folder, seed), _start(chosen, ground, folder, seed)
    if start.exists() or start == base:
        return start
    layers = chosen.layers(ground)
    made = retrofit(
        base,
        start,
        prelude=layers.prelude,
        core=layers.core,
        coda=layers.coda,
        injection=chosen.injection,
        init=chosen.init,
        seed=seed,
    )
    if chosen.start == "random":
        save(start, made.config, _fresh(made.config, chosen.depth.mean, seed), open_checkpoint(str(start)).carried())
    return start


def run_arm(name: str, arm: str, ground: Ground, folder: Path, seed: int) -> list[dict[str, Any]]:
    """Train one arm of an experiment, or go on with it; returns its evaluations as logged.

    Its start and that of the first arm must have been made.
    """
    torch.set_num_threads(1)
    first, *_ = EXPERIMENTS[name].arms.values()
    chosen = EXPERIMENTS[name].arms[arm]
    starts = {one: _start(one, ground, folder, seed) for one in {first, chosen}}
    configs = {one: open_checkpoint(str(start)).config for one, start in starts.items()}
    budget = ground.steps * flops_per_token(configs[first], first.depth, ground.steps)
    steps = steps_for(budget, configs[chosen], chosen.depth)
    run = _place(chosen, folder, seed) / "run"
    train(ground.recipe(starts[chosen], chosen.depth, steps, seed), run)
    records = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [record for record in records if "evaluation" in record]


def _start(arm: Arm, ground: Ground, folder: Path, seed: int) -> Path:
    return make_base(ground, folder, seed) if arm.start == "plain" else _place(arm, folder, seed) / "start"


def _fresh(config: ModelConfig, mean_depth: int, seed: int) -> dict[str, np.ndarray]:
    """Random weights as Huginn's were drawn (Geiping et al. 2025, arXiv:2502.05171, section 4.1).

    Truncated normal of variance 2 / (5 n_embd), outputs of a branch less by the square root of twice the layers that a
    token meets.
    """
    std = math.sqrt(2 / (5 * config.n_embd))
    n_layer = config.n_prelude + config.n_core * mean_depth + config.n_coda
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ReferenceModel(config)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                ends_branch = name.endswith(("attn_output.weight", "ffn_down.weight"))
                own = std / math.sqrt(2 * n_layer) if ends_branch else std
                nn.init.trunc_normal_(parameter, std=own, a=-3 * own, b=3 * own)
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def steps_for(budget: float, config: ModelConfig, depth: DepthRecipe) -> int:
    """Steps that cost ``budget``, which is in FLOPs of a step for each of its tokens."""
    steps = 1
    for _ in range(4):  # a ramp's cost depends on the steps it is spread over
        steps = max(1, round(budget / flops_per_token(config, depth, steps)))
    return steps


def flops_per_token(config: ModelConfig, depth: DepthRecipe, steps: int) -> float:
    """Of a step on average, for a token of it; drawn as the trainer draws."""
    cost = Flops.of(config)
    drawn = list(_passes(depth, steps))
    return sum(cost.training([one], 1, 0, recompute=False) for one in drawn) / len(drawn) + 6 * cost.head * _LABEL_SHARE


def _passes(depth: DepthRecipe, steps: int) -> Iterator[Passes]:
    for step in range(max(steps, 200)):
        at = step * steps // max(steps, 200)
        mean = mean_depth_at(at, steps, depth.mean, depth.ramp, depth.ramp_share)
        k = backprop_depth_at(at, steps, mean, depth.backprop, depth.backprop_start, depth.backprop_ramp_share)
        always = Passes(max(mean - k, 0), min(mean, k))
        yield always if depth.fixed else sample_passes(mean, k, seeded(step + 1), depth.sigma)


def _place(arm: Arm, folder: Path, seed: int) -> Path:
    """Where an arm is trained; one that several experiments have is trained once, for the first of them."""
    same = ((name, title) for name, one in EXPERIMENTS.items() for title in one.arms if one.arms[title] == arm)
    name, title = next(same)
    return folder / name / f"{title.replace(', ', '-').replace(' ', '-')}-seed{seed}"
