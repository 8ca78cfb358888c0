"""Where an experiment takes place: data, and a plain base that is retrofitted."""

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from localdepth.config import Injection, ModelConfig
from localdepth.errors import TrainError
from localdepth_train.recipe import (
    DepthRecipe,
    EvaluationRecipe,
    OptimizerRecipe,
    Phase,
    Recipe,
    StepsRecipe,
    TasksRecipe,
)
from localdepth_train.start import open_checkpoint
from localdepth_train.text.settings import SourceRecipe, TextRecipe
from localdepth_train.trainer import train

__all__ = ["LONGEST_TRAINED", "Ground", "Layers", "TaskGround", "TextGround"]

LONGEST_TRAINED = 6  # steps
_DEPTHS = (1, 2, 4, 8, 16)
_PLAIN_DEPTH = DepthRecipe(mean=1, backprop=1, fixed=True)


@dataclass(frozen=True, slots=True)
class Layers:
    """Which layers of the base go where, as ``retrofit`` takes them."""

    prelude: str
    core: str
    coda: str


class Ground(Protocol):
    """Data and bases."""

    @property
    def steps(self) -> int:
        """Optimiser steps of the arm that others are matched to in FLOPs."""

    @property
    def layers(self) -> Layers:
        """The published choice: the core is taken from just before the coda, and something is dropped."""

    @property
    def early_layers(self) -> Layers:
        """As many, the core from just after the prelude."""

    @property
    def all_layers(self) -> Layers:
        """Nothing dropped."""

    def base(self, folder: Path, seed: int) -> Path:
        """The plain model to begin with, made once in ``folder``."""

    def recipe(self, start: Path, depth: DepthRecipe, steps: int, seed: int) -> Recipe:
        """Training from ``start``."""

    def shortened(self, steps: int) -> "Ground":
        """The same with other ``steps``."""


@dataclass(frozen=True, slots=True)
class TaskGround:
    """Questions of up to six steps, judged up to eight, and a plain model of six layers trained on them."""

    steps: int = 250
    base_steps: int = 900
    layers: Layers = Layers("0", "2-4", "5")
    early_layers: Layers = Layers("0", "1-3", "5")
    all_layers: Layers = Layers("0", "1-4", "5")

    def base(self, folder: Path, seed: int) -> Path:
        made = folder / "checkpoint"
        if not made.is_dir():
            train(self._recipe(_PLAIN_DEPTH, self.base_steps, seed, model=_PLAIN), folder)
        return made

    def recipe(self, start: Path, depth: DepthRecipe, steps: int, seed: int) -> Recipe:
        return self._recipe(depth, steps, seed, start=str(start))

    def shortened(self, steps: int) -> "TaskGround":
        return replace(self, steps=steps, base_steps=steps)

    def _recipe(
        self, depth: DepthRecipe, steps: int, seed: int, model: ModelConfig | None = None, start: str | None = None
    ) -> Recipe:
        growth = StepsRecipe(start=1, top=LONGEST_TRAINED, threshold=0.9, mastered_weight=1.0)
        tasks = TasksRecipe(
            families=("turn", "lift", "hop"),
            off_topic_share=0.0,
            near_miss_share=0.0,
            question_steps=growth,
            evaluate_questions=12,
            evaluate_steps=8,
        )
        optimizer = OptimizerRecipe(muon_lr=5e-3, adamw_lr=3e-3, weight_decay=0.1, warmup=0.02, cooldown=0.5)
        phase = Phase(name="questions", steps=steps, depth=depth, optimizer=optimizer, tasks=tasks)
        return Recipe(
            seed=seed,
            batch_size=64,
            save_every=steps,
            evaluation=EvaluationRecipe(every=max(1, steps // 4), depths=_DEPTHS),
            phases=(phase,),
            bf16=True,
            model=model,
            start=start,
            allow_plain=True,
        )


_PLAIN = ModelConfig(
    n_prelude=0,
    n_core=6,
    n_coda=0,
    n_embd=64,
    n_head=2,
    n_head_kv=2,
    head_dim=32,
    n_ff=192,
    n_vocab=1536,
    n_ctx=1024,
    norm_eps=1e-5,
    injection=Injection.NONE,
    default_depth=1,
    max_depth=64,
)


@dataclass(frozen=True, slots=True)
class TextGround:
    """A text and the checkpoint of a real plain model."""

    checkpoint: Path
    text: str
    steps: int = 100
    n_tokens: int = 128

    def __post_init__(self) -> None:
        if (n_layer := _n_layer(self.checkpoint)) < 5:
            raise TrainError(f"{self.checkpoint} has {n_layer} layers; experiments with surgery need at least 5")

    @property
    def layers(self) -> Layers:
        last = _n_layer(self.checkpoint) - 1
        return Layers("0", f"2-{last - 1}", str(last))

    @property
    def early_layers(self) -> Layers:
        last = _n_layer(self.checkpoint) - 1
        return Layers("0", f"1-{last - 2}", str(last))

    @property
    def all_layers(self) -> Layers:
        last = _n_layer(self.checkpoint) - 1
        return Layers("0", f"1-{last - 1}", str(last))

    def base(self, folder: Path, seed: int) -> Path:
        return self.checkpoint

    def shortened(self, steps: int) -> "TextGround":
        return replace(self, steps=steps)

    def recipe(self, start: Path, depth: DepthRecipe, steps: int, seed: int) -> Recipe:
        text = TextRecipe(
            sources=(SourceRecipe(path=self.text),), n_tokens=self.n_tokens, held_out_one_in=20, held_out_documents=48
        )
        optimizer = OptimizerRecipe(adamw_lr=5e-4, weight_decay=0.1, warmup=0.02, cooldown=0.5)
        return Recipe(
            seed=seed,
            batch_size=32,
            save_every=steps,
            evaluation=EvaluationRecipe(every=max(1, steps // 4), depths=_DEPTHS),
            phases=(Phase(name="text", steps=steps, depth=depth, optimizer=optimizer, text=text),),
            bf16=True,
            start=str(start),
            allow_plain=True,
        )


@lru_cache
def _n_layer(checkpoint: Path) -> int:
    return open_checkpoint(str(checkpoint)).config.n_core
