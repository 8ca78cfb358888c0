"""A training run as a TOML file: everything that decides the result, nothing else."""

import math
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

from localdepth.config import ModelConfig
from localdepth.errors import TrainError
from localdepth_train.curriculum import Ramp
from localdepth_train.tasks.families import FAMILIES
from localdepth_train.text.settings import TextRecipe
from localdepth_train.toml_records import parse

__all__ = [
    "DepthRecipe",
    "DrawPer",
    "EvaluationRecipe",
    "ObjectiveRecipe",
    "OptimizerRecipe",
    "Phase",
    "Recipe",
    "StepsRecipe",
    "TasksRecipe",
    "load_recipe",
    "parse_recipe",
]

_SEEDS = 1 << 32  # as many as torch tells apart
_SHIPPED = Path(__file__).with_name("recipes")
_OPEN_START, _OPEN_TEXT = "--start", "--text"  # values that leave it to the option of that name


class DrawPer(StrEnum):
    """What shares one draw of the depth."""

    BATCH = "batch"  # a micro-batch, on all processes: as published
    SEQUENCE = "sequence"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepsRecipe:
    """How question length grows; see ``StepsCurriculum``."""

    start: int
    top: int
    threshold: float
    mastered_weight: float

    def __post_init__(self) -> None:
        _check_counts("tasks.question_steps", start=self.start)
        _check_above_zero("tasks.question_steps", mastered_weight=self.mastered_weight)
        if not 0 < self.threshold < 1:
            raise TrainError(
                f"tasks.question_steps.threshold={self.threshold} must lie between 0 and 1, where an accuracy can "
                "exceed it; give 0.9"
            )
        if self.start > self.top:
            raise TrainError(f"question_steps.start={self.start} exceeds question_steps.top={self.top}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TasksRecipe:
    """Generated questions; ``evaluate_questions`` are judged per family and number of steps, up to ``evaluate_steps``.

    Without that number questions are judged up to the longest trained. ``dense`` labels the value after every step, not
    the answer alone.
    """

    families: tuple[str, ...]
    off_topic_share: float  # of questions, answered by the refusal
    near_miss_share: float  # of those off topic: nearly a question that we know
    question_steps: StepsRecipe
    evaluate_questions: int
    evaluate_steps: int | None = None
    dense: bool = True

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.families) - set(FAMILIES)):
            raise TrainError(f"tasks.families names {', '.join(unknown)}; known are {', '.join(FAMILIES)}")
        if not self.families:
            raise TrainError(f"tasks.families is empty; name some of {', '.join(FAMILIES)}")
        _check_shares("tasks", off_topic_share=self.off_topic_share, near_miss_share=self.near_miss_share)
        _check_counts("tasks", evaluate_questions=self.evaluate_questions)
        if self.evaluate_steps is not None:
            _check_counts("tasks", evaluate_steps=self.evaluate_steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class DepthRecipe:
    """How deep to train; see ``sample_passes``, ``mean_depth_at`` and ``backprop_depth_at``."""

    mean: int
    backprop: int  # passes that carry gradient
    sigma: float = 0.5
    per: DrawPer = DrawPer.BATCH
    ramp: Ramp = Ramp.NONE
    ramp_share: float = 0.0  # of the steps
    backprop_start: int = 1
    backprop_ramp_share: float = 0.0  # of the steps
    follow_steps: bool = False  # a mean no deeper than questions may be long, averaged over their families
    fixed: bool = False  # always ``mean`` passes: no draw

    def __post_init__(self) -> None:
        _check_counts("depth", mean=self.mean, backprop=self.backprop, backprop_start=self.backprop_start)
        _check_shares("depth", ramp_share=self.ramp_share, backprop_ramp_share=self.backprop_ramp_share)
        _check_not_negative("depth", sigma=self.sigma)
        if self.ramp is not Ramp.NONE and not self.ramp_share:
            raise TrainError(
                f"depth.ramp={str(self.ramp)!r} has no steps to rise in, depth.ramp_share={self.ramp_share}; "
                "give the share of the steps it takes"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerRecipe:
    """Learning rates and their schedule; see ``Optimizers`` and ``lr_multiplier``."""

    adamw_lr: float
    muon_lr: float = 0.0  # 0: AdamW for everything
    weight_decay: float = 0.0
    clip: float = 1.0
    warmup: float = 0.0  # share of the steps
    cooldown: float = 0.0  # share of the steps

    def __post_init__(self) -> None:
        _check_above_zero("optimizer", adamw_lr=self.adamw_lr, clip=self.clip)
        _check_not_negative("optimizer", muon_lr=self.muon_lr, weight_decay=self.weight_decay)
        _check_shares("optimizer", warmup=self.warmup, cooldown=self.cooldown)
        if self.warmup + self.cooldown > 1:
            raise TrainError(
                f"optimizer.warmup={self.warmup} and optimizer.cooldown={self.cooldown} are shares of the same steps; "
                "give 1 at most together"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveRecipe:
    """What is added to the cross entropy.

    Attributes:
        teacher: checkpoint of the untouched base, whose predictions are distilled.
        distillation: weight of KL(teacher || model) at ``temperature``, per labelled position.
        consistency: weight of KL(after all passes || half way through those with gradient), both decoded, per
            labelled position; teaches the shallower to say what the deeper says. Counts where two passes or more
            carry gradient.
    """

    teacher: str | None = None
    distillation: float = 0.0
    temperature: float = 1.0
    consistency: float = 0.0

    def __post_init__(self) -> None:
        _check_not_negative("objective", distillation=self.distillation, consistency=self.consistency)
        _check_above_zero("objective", temperature=self.temperature)
        if (self.teacher is None) != (self.distillation == 0):
            raise TrainError(
                f"objective.teacher={self.teacher!r} and objective.distillation={self.distillation} belong together; "
                "give both or neither"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One stretch of a run, such as healing and then the target; each begins with a fresh optimiser.

    It trains on generated questions or on text.
    """

    name: str
    steps: int
    depth: DepthRecipe
    optimizer: OptimizerRecipe
    tasks: TasksRecipe | None = None
    text: TextRecipe | None = None
    objective: ObjectiveRecipe = field(default_factory=ObjectiveRecipe)

    def __post_init__(self) -> None:
        _check_counts(f"phase {self.name!r}:", steps=self.steps)
        if (self.tasks is None) == (self.text is None):
            raise TrainError(f"phase {self.name!r} needs either tasks or text to train on")
        if self.depth.follow_steps and self.tasks is None:
            raise TrainError(f"phase {self.name!r}: depth.follow_steps needs tasks, text has no steps")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRecipe:
    """Every how many steps held-out data are judged, at which depths; the end of a phase always is."""

    every: int
    depths: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_counts("evaluation", every=self.every)
        if not self.depths or any(depth < 1 for depth in self.depths):
            raise TrainError(f"evaluation.depths={list(self.depths)} must be one or more depths of at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One training run: a fresh model, or one to start from, and the phases it goes through.

    Attributes:
        seed: of everything random, 0 to 2**32 - 1.
        batch_size: sequences of one optimiser step, over all micro-batches and processes.
        micro_batches: parts of that which are computed one after the other, each at its own depth.
        threads: micro-batches computed side by side, a thread each: small models gain; 1 leaves the threads to torch.
        bf16: matrix products in bfloat16: several times faster where the processor has instructions for it.
        recompute: see ``run_passes``; memory no longer grows with the layers of the core.
        shard: several processes keep a part of the model each.
        compile: let torch compile the layers; takes a minute to begin.
        start: checkpoint folder to start from, as ``localdepth retrofit`` writes it; "--start" leaves it to ``given``,
            as "--text" does for the path of a text.
        allow_plain: that may also be a plain model, which trains as one that runs its layers once.
    Raises:
        TrainError: when a value is out of its range.
    """

    seed: int
    batch_size: int
    save_every: int
    evaluation: EvaluationRecipe
    phases: tuple[Phase, ...]
    micro_batches: int = 1
    threads: int = 1
    bf16: bool = False
    recompute: bool = False
    shard: bool = False
    compile: bool = False
    model: ModelConfig | None = None
    start: str | None = None
    allow_plain: bool = False

    def __post_init__(self) -> None:
        _check_counts(
            "",
            batch_size=self.batch_size,
            micro_batches=self.micro_batches,
            threads=self.threads,
            save_every=self.save_every,
        )
        if not 0 <= self.seed < _SEEDS:
            raise TrainError(f"seed={self.seed} must lie in 0..{_SEEDS - 1}")
        if self.micro_batches > self.batch_size:
            raise TrainError(f"micro_batches={self.micro_batches} exceeds batch_size={self.batch_size}")
        if self.model is None and self.start is None:
            raise TrainError(
                "a recipe needs [model], for a fresh one, or start, a checkpoint folder; "
                'start = "--start" leaves the folder to the option'
            )
        if self.model is not None and self.start is not None:
            raise TrainError(
                f"start={self.start!r} and [model] exclude each other; keep start to go on from that checkpoint, or "
                "[model] for a fresh one"
            )
        if self.start is not None and not self.start.strip():
            raise TrainError(
                f"start={self.start!r} names no folder; give a checkpoint folder, or [model] for a fresh one"
            )
        if not self.phases:
            raise TrainError("a recipe needs at least one [[phases]]")
        if self.model is not None:
            for depth in self.evaluation.depths:
                self.model.check_depth(depth, measure=True)

    def given(self, start: str | None = None, text: str | None = None) -> "Recipe":
        """This recipe with another checkpoint to start from, or with one text for all text phases; None keeps.

        Raises:
            TrainError: when it starts from nothing, or trains on no text.
        """
        changed = self if start is None else replace(self, start=start, model=None)
        if text is None:
            return changed
        if all(phase.text is None for phase in self.phases):
            raise TrainError(f"text={text!r}: no phase of this recipe trains on text")
        return replace(changed, phases=tuple(_with_text(phase, text) for phase in self.phases))

    def check_given(self) -> None:
        """Whether nothing is left to ``given``.

        Raises:
            TrainError: it names the options that say what is.
        """
        left = ["--start FOLDER, the checkpoint to start from"] if self.start == _OPEN_START else []
        paths = [source.path for phase in self.phases if phase.text for source in phase.text.sources]
        if _OPEN_TEXT in paths:
            left.append("--text PATH, the text to train on")
        if left:
            raise TrainError(f"this recipe leaves open what it runs on; give {' and '.join(left)}")

    @property
    def steps(self) -> int:
        """Optimiser steps of all phases."""
        return sum(phase.steps for phase in self.phases)


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe file.

    Raises:
        TrainError: for a file that is missing or no TOML, unknown or missing keys, wrong types or values.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        shipped = ", ".join(map(str, sorted(_SHIPPED.glob("*.toml"))))
        raise TrainError(
            f"no recipe at {path}; give the path of a TOML file, or one that comes along: {shipped}"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise TrainError(f"cannot read recipe {path}: {error}") from error
    return parse_recipe(text, str(path))


def parse_recipe(text: str, name: str = "recipe") -> Recipe:
    """Like ``load_recipe``, from the file's text."""
    return parse(Recipe, text, name)


def _with_text(phase: Phase, path: str) -> Phase:
    if phase.text is None:
        return phase
    return replace(phase, text=replace(phase.text, sources=(replace(phase.text.sources[0], path=path),)))


def _check_counts(where: str, **values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise TrainError(f"{_path(where, name)}={value} must be at least 1")


def _check_shares(where: str, **values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise TrainError(f"{_path(where, name)}={value} is a share; give 0 to 1")


def _check_above_zero(where: str, **values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise TrainError(f"{_path(where, name)}={value} must be above 0 and finite")


def _check_not_negative(where: str, **values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise TrainError(f"{_path(where, name)}={value} must be 0 or more and finite")


def _path(where: str, name: str) -> str:
    return f"{where} {name}" if where.endswith(":") else f"{where}.{name}" if where else name
