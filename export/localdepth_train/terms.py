"""What is trained for: cross entropy, and on request a teacher's predictions and agreement between depths."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from localdepth.config import ModelConfig
from localdepth.errors import TrainError
from localdepth_train.checkpoint import Checkpoint
from localdepth_train.data import MicroBatch
from localdepth_train.depth_sampler import Passes
from localdepth_train.objective import attends, decode, divergence, right_rows, run_passes
from localdepth_train.recipe import ObjectiveRecipe
from localdepth_train.reference import ReferenceModel
from localdepth_train.reference_engine import load_reference
from localdepth_train.start import open_checkpoint
from localdepth_train.text.packing import IGNORED

__all__ = ["Job", "Objective", "open_teacher"]


@dataclass(frozen=True, slots=True)
class Job:
    """One micro-batch of a process, the passes of its rows, and the labels of the whole step."""

    batch: MicroBatch
    passes: list[Passes]
    others: list[Passes]  # of its rows in other processes
    state: Tensor | None  # s_0 [B,T,E]; zeros if None
    n_labels: int


class Objective(nn.Module):
    """A model with what it is trained for, as one module that processes can share."""

    def __init__(self, model: ReferenceModel, recompute: bool) -> None:
        super().__init__()
        self.model, self._recompute = model, recompute
        self.pursue(ObjectiveRecipe())

    def pursue(self, recipe: ObjectiveRecipe) -> None:
        """Train for these terms from now on."""
        checkpoint = open_teacher(recipe, self.model.config)
        teacher = None if checkpoint is None else load_reference(checkpoint)
        self._recipe = recipe
        self._teacher = (teacher,)  # hidden from the module: its weights are not trained

    def forward(self, job: Job) -> tuple[Tensor, Tensor]:
        """Loss, as a share of the mean over ``n_labels``, and which rows are all right [B]."""
        batch, recipe = job.batch, self._recipe
        attend = attends(batch.documents)
        half, s = run_passes(
            self.model, batch.ids, job.passes, job.state, attend, recompute=self._recompute, others=job.others
        )
        logits = decode(self.model, s, batch.labels, attend).float()
        loss = functional.cross_entropy(logits, batch.labels[batch.labels != IGNORED], reduction="sum")
        if recipe.consistency:
            earlier = decode(self.model, half, batch.labels, attend)
            loss = loss + recipe.consistency * divergence(earlier, logits)
        if (teacher := self._teacher[0]) is not None:
            deep = [Passes(teacher.config.default_depth, 0)] * len(batch.ids)
            with torch.no_grad():
                _, taught = run_passes(teacher.to(batch.ids.device), batch.ids, deep, attend=attend)
                wanted = decode(teacher, taught, batch.labels, attend)
            loss = loss + recipe.distillation * divergence(logits, wanted, recipe.temperature)
        return loss / job.n_labels, right_rows(logits, batch.labels)


def open_teacher(recipe: ObjectiveRecipe, config: ModelConfig) -> Checkpoint | None:
    """The checkpoint a model learns from, its weights still unread; None where there is none.

    Raises:
        TrainError: when it knows other tokens than the model.
        CheckpointError: for a folder that is no checkpoint.
    """
    if recipe.teacher is None:
        return None
    teacher = open_checkpoint(recipe.teacher)
    if teacher.config.n_vocab != config.n_vocab:
        raise TrainError(
            f"objective.teacher={recipe.teacher!r} has n_vocab={teacher.config.n_vocab}, the model {config.n_vocab}; "
            "name the base that the model was made from"
        )
    return teacher
