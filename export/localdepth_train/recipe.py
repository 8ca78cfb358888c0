"""A training run as a TOML file: everything that decides the result, nothing else."""

import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from types import GenericAlias
from typing import Any, TypeVar

from localdepth.config import ModelConfig
from localdepth.errors import ConfigError, TrainError
from localdepth_train.curriculum import Ramp
from localdepth_train.families import FAMILIES

__all__ = ["DepthRecipe", "OptimizerRecipe", "Recipe", "StepsRecipe", "TasksRecipe", "load_recipe", "parse_recipe"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class TasksRecipe:
    """What to train on."""

    families: tuple[str, ...]
    off_topic_share: float  # of questions, answered by the refusal
    near_miss_share: float  # of those


@dataclass(frozen=True, slots=True, kw_only=True)
class StepsRecipe:
    """How question length grows; see ``StepsCurriculum``."""

    start: int
    top: int
    threshold: float
    mastered_weight: float
    even: int  # steps in which all families are drawn alike; later, those at a lower level are drawn more often


@dataclass(frozen=True, slots=True, kw_only=True)
class DepthRecipe:
    """How deep to train; see ``sample_passes`` and ``mean_depth_at``."""

    mean: int
    sigma: float
    backprop: int  # passes that carry gradient
    ramp: Ramp
    ramp_share: float  # of the steps
    follow_steps: bool  # never deeper on average than questions are long on average


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerRecipe:
    """Learning rates and their schedule; see ``Optimizers`` and ``lr_multiplier``."""

    muon_lr: float
    adamw_lr: float
    weight_decay: float
    clip: float
    warmup: float  # share of the steps
    cooldown: float  # share of the steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One training run.

    ``evaluate_questions`` are drawn per family and number of steps and judged at every one of ``evaluate_depths``.
    Raises:
        TrainError: when a value is out of its range.
    """

    seed: int
    steps: int
    batch_size: int
    micro_batches: int
    threads: int
    bf16: bool  # matrix products in bfloat16: several times faster where the CPU has instructions for it
    log_every: int
    save_every: int
    evaluate_every: int
    evaluate_questions: int
    evaluate_depths: tuple[int, ...]
    model: ModelConfig
    tasks: TasksRecipe
    question_steps: StepsRecipe
    depth: DepthRecipe
    optimizer: OptimizerRecipe

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.tasks.families) - set(FAMILIES)):
            raise TrainError(f"tasks.families names {', '.join(unknown)}; known are {', '.join(FAMILIES)}")
        if not self.tasks.families:
            raise TrainError(f"tasks.families is empty; name some of {', '.join(FAMILIES)}")
        for name, value in (
            ("steps", self.steps),
            ("batch_size", self.batch_size),
            ("micro_batches", self.micro_batches),
            ("threads", self.threads),
            ("log_every", self.log_every),
            ("save_every", self.save_every),
            ("evaluate_every", self.evaluate_every),
            ("evaluate_questions", self.evaluate_questions),
            ("question_steps.start", self.question_steps.start),
            ("depth.mean", self.depth.mean),
            ("depth.backprop", self.depth.backprop),
        ):
            if value < 1:
                raise TrainError(f"{name}={value} must be at least 1")
        if self.micro_batches > self.batch_size:
            raise TrainError(f"micro_batches={self.micro_batches} exceeds batch_size={self.batch_size}")
        if self.question_steps.start > self.question_steps.top:
            raise TrainError(
                f"question_steps.start={self.question_steps.start} exceeds question_steps.top={self.question_steps.top}"
            )
        for name, share in (
            ("tasks.off_topic_share", self.tasks.off_topic_share),
            ("tasks.near_miss_share", self.tasks.near_miss_share),
            ("depth.ramp_share", self.depth.ramp_share),
            ("optimizer.warmup", self.optimizer.warmup),
            ("optimizer.cooldown", self.optimizer.cooldown),
        ):
            if not 0 <= share <= 1:
                raise TrainError(f"{name}={share} is a share; give 0 to 1")
        for depth in self.evaluate_depths:
            self.model.check_depth(depth, measure=True)


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe file.

    Raises:
        TrainError: for a file that is missing or no TOML, unknown or missing keys, wrong types or values.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TrainError(f"cannot read recipe {path}: {error}") from error
    return parse_recipe(text, str(path))


def parse_recipe(text: str, name: str = "recipe") -> Recipe:
    """Like ``load_recipe``, from the file's text."""
    try:
        return _build(Recipe, tomllib.loads(text), "")
    except tomllib.TOMLDecodeError as error:
        raise TrainError(f"{name} is not valid TOML: {error}") from error
    except (ConfigError, TrainError) as error:
        raise TrainError(f"{name}: {error}") from error


def _build(kind: type[T], table: Mapping[str, Any], where: str) -> T:
    """A record from a TOML table: no unknown key, and none missing that has no default."""
    known = {item.name: item for item in fields(kind)}  # type: ignore[arg-type]  # every kind here is a dataclass
    if unknown := sorted(set(table) - set(known)):
        raise TrainError(f"unknown key {where}{unknown[0]}; known here are {', '.join(known)}")
    if missing := [key for key, item in known.items() if item.default is MISSING and key not in table]:
        raise TrainError(f"missing key {where}{missing[0]}")
    return kind(**{key: _value(known[key].type, value, f"{where}{key}") for key, value in table.items()})


def _value(kind: Any, value: Any, where: str) -> Any:
    """One TOML value as the type of its field."""
    if isinstance(kind, GenericAlias):  # tuple[item, ...]
        if not isinstance(value, list):
            raise TrainError(f"{where}={value!r} must be a list")
        return tuple(_value(kind.__args__[0], item, where) for item in value)
    if isinstance(kind, type) and is_dataclass(kind):
        if not isinstance(value, dict):
            raise TrainError(f"{where}={value!r} must be a table")
        return _build(kind, value, f"{where}.")
    if issubclass(kind, StrEnum):
        if value not in list(kind):
            raise TrainError(f"{where}={value!r} is not one of {', '.join(kind)}")
        return kind(value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise TrainError(f"{where}={value!r} must be of type {kind.__name__}")
    return value
