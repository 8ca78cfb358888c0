"""What grows during training: mean depth, backprop depth, question length, and the learning rate's rise and fall.

``mean_depth_at``, ``backprop_depth_at`` and ``lr_multiplier`` equal the published trainers' schedules.
``StepsCurriculum`` is ours.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

__all__ = ["Ramp", "StepsCurriculum", "backprop_depth_at", "lr_multiplier", "mean_depth_at"]


class Ramp(StrEnum):
    """How the mean depth grows over the first part of a run."""

    NONE = "none"
    LINEAR = "linear"
    ONE_MINUS_SQRT = "1-sqrt"  # slow start, steep end: cheaper than linear
    COSINE = "cosine"  # slow start, slow end


def mean_depth_at(step: int, steps: int, mean_depth: int, ramp: Ramp, share: float) -> int:
    """Mean depth of optimiser step ``step`` (from 0): max(1, ceil(mean_depth · f(step / W))), W = ceil(share · steps).

    Source: McLeish et al. 2025, arXiv:2511.07384, section on curricula, and its published trainer.
    """
    width = math.ceil(share * steps)
    if ramp is Ramp.NONE or step >= width:
        return mean_depth
    part = step / width
    match ramp:
        case Ramp.LINEAR:
            grown = part
        case Ramp.ONE_MINUS_SQRT:
            grown = 1 - math.sqrt(1 - part)
        case Ramp.COSINE:
            grown = (1 - math.cos(math.pi * part)) / 2
    return max(1, math.ceil(mean_depth * grown))


def backprop_depth_at(step: int, steps: int, mean_depth: int, backprop: int, start: int, share: float) -> int:
    """Passes that carry gradient at optimiser step ``step`` (from 0), never more than its ``mean_depth``.

    Grows linearly from ``start`` to ``backprop`` over ``share`` of the steps; a share of 0 means no growth. The
    published schedule is one step ahead of the others and ends with the run: its very last step is back at ``start``.
    """
    width = math.ceil(share * steps)
    if not width:
        return min(backprop, mean_depth)
    at = step + 1
    grown = at / width if at < width else float(at < steps)
    return min(mean_depth, math.ceil(start + (backprop - start) * grown))


def lr_multiplier(step: int, steps: int, warmup: float, cooldown: float, floor: float = 1e-3) -> float:
    """Factor on the learning rates: linear warm-up, constant, cosine decay to ``floor`` over the last ``cooldown``.

    Args:
        step: optimiser step, from 0.
        warmup, cooldown: shares of ``steps``.
    """
    rise, fall = math.ceil(warmup * steps), math.ceil(cooldown * steps)
    if step < rise:
        factor = step / rise
    elif step < steps - fall:
        factor = 1.0
    else:
        factor = (1 + math.cos(math.pi * (step - (steps - fall)) / fall)) / 2 if fall else 1.0
    return floor + (1 - floor) * factor


@dataclass(slots=True)
class StepsCurriculum:
    """How long questions may be, family by family; a family grows when it has mastered its longest.

    A family at level L is asked L steps in ``longest_share`` of its questions and 1..L otherwise. ``accuracy`` is a
    moving average over questions of exactly L steps run at L passes or more: fewer cannot be expected to do. Above
    ``threshold`` the level rises. Families are drawn at weight 1 / L, ``mastered_weight`` / L once ``max_steps`` are
    mastered.
    """

    levels: dict[str, int]
    accuracy: dict[str, float]
    max_steps: int
    threshold: float
    mastered_weight: float
    longest_share: float = 0.3
    memory: float = 0.99  # of the moving average, per question

    @classmethod
    def begin(
        cls, families: Sequence[str], start: int, max_steps: int, threshold: float, mastered_weight: float
    ) -> "StepsCurriculum":
        """Every family at level ``start``."""
        return cls(dict.fromkeys(families, start), dict.fromkeys(families, 0.0), max_steps, threshold, mastered_weight)

    @property
    def mean_level(self) -> float:
        """Average level of the families."""
        return sum(self.levels.values()) / len(self.levels)

    def is_mastered(self, family: str) -> bool:
        """Whether nothing longer is left for it."""
        return self.levels[family] == self.max_steps and self.accuracy[family] > self.threshold

    def draw(self, rng: random.Random) -> tuple[str, int]:
        """A family and a number of steps."""
        names = list(self.levels)
        family = rng.choices(names, [self._weight(name) for name in names])[0]
        level = self.levels[family]
        return family, level if rng.random() < self.longest_share else rng.randint(1, level)

    def _weight(self, family: str) -> float:
        """How often a family is drawn; those that grow fast would otherwise take most tokens from those that lag."""
        return (self.mastered_weight if self.is_mastered(family) else 1.0) / self.levels[family]

    def record(self, family: str, steps: int, depth: int, right: bool) -> None:
        """Learn the outcome of one training question; one of no family here, or of another length, says nothing."""
        if steps != self.levels.get(family) or depth < steps:
            return
        self.accuracy[family] = self.memory * self.accuracy[family] + (1 - self.memory) * right
        if self.accuracy[family] > self.threshold and steps < self.max_steps:
            self.levels[family] += 1
            self.accuracy[family] = 0.0

    def state(self) -> dict[str, dict[str, Any]]:
        """What a checkpoint keeps."""
        return {"levels": dict(self.levels), "accuracy": dict(self.accuracy)}

    def restore(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Inverse of ``state``."""
        self.levels, self.accuracy = dict(state["levels"]), dict(state["accuracy"])
