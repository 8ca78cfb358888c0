"""The training loop: draw questions, run to a sampled depth, backpropagate through the last passes, step, repeat.

Everything random is a function of the recipe's seed and the step, so a run that was stopped and started again ends
bit for bit where an undisturbed one does.
"""

import hashlib
import json
import math
import os
import random
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from localdepth.errors import TrainError
from localdepth_train.checkpoint import save
from localdepth_train.curriculum import StepsCurriculum, lr_multiplier, mean_depth_at
from localdepth_train.data import Encoder, MicroBatch, draw_questions, micro_batches
from localdepth_train.depth_sampler import Passes, sample_passes, seeded
from localdepth_train.evaluation import Accuracy, accuracy_at, evaluate
from localdepth_train.objective import IGNORED, labelled_logits, right_rows
from localdepth_train.optim import Optimizers
from localdepth_train.recipe import Recipe
from localdepth_train.reference import ReferenceModel
from localdepth_train.run_folder import RunFolder
from localdepth_train.tasks import evaluation
from localdepth_train.vocabulary import tokenizer_files, train_tokenizer

__all__ = ["Report", "Trainer", "train"]

_EVALUATION_SEED = 1


@dataclass(frozen=True, slots=True)
class Report:
    """How a run stands when ``train`` returns.

    ``loss`` is the last step's; ``accuracy`` the last evaluation, by (family, steps, depth), empty if there was none;
    ``checkpoint`` is None while steps are left.
    """

    steps: int
    loss: float
    accuracy: Accuracy
    checkpoint: Path | None


def train(
    recipe: Recipe,
    folder: str | os.PathLike[str],
    *,
    until: int | None = None,
    on_record: Callable[[Mapping[str, Any]], None] = lambda record: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Report:
    """Run ``recipe`` in ``folder``, going on from what a stopped run left there.

    Args:
        until: stop after this step with everything saved; None runs to the recipe's end.
        on_record: sees every record of the log as it is written, for progress.
        should_stop: asked after every step; once true, the run is saved and ends early, to be gone on with.
    Raises:
        TrainError: when the folder belongs to another recipe, or the loss is no longer a number.
        StorageError: when the folder cannot be written.
    """
    torch.set_num_threads(1)  # micro-batches run side by side instead: nothing spins when the machine is shared
    run, trainer = RunFolder(folder), Trainer(recipe)
    if state := run.read_state():
        trainer.restore(state)
    run.rewind_log(trainer.step)
    loss, accuracy = math.nan, Accuracy()
    last = recipe.steps if until is None else min(until, recipe.steps)
    stopped = False
    while trainer.step < last and not stopped:
        record = trainer.advance()
        step, loss = trainer.step, record["loss"]
        if step % recipe.log_every == 0:
            run.log(record)
            on_record(record)
        if step % recipe.evaluate_every == 0 or step == recipe.steps:
            accuracy = trainer.evaluate()
            summary = {"step": step, **_summary(accuracy)}
            run.log(summary)
            on_record(summary)
        stopped = should_stop()
        if step % recipe.save_every == 0 or step == last or stopped:
            run.write_state(trainer.state())
    done = trainer.step == recipe.steps
    return Report(trainer.step, loss, accuracy, trainer.export(run.checkpoint) if done else None)


@dataclass(frozen=True, slots=True)
class _Part:
    """What one micro-batch gives: its share of loss and gradients, and which questions were all right."""

    loss: float
    gradients: tuple[Tensor, ...]
    right: list[bool]


class Trainer:
    """A model in training and everything that changes with it."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.step = 0
        self.tokenizer = train_tokenizer(recipe.model.n_vocab, recipe.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.model = ReferenceModel(recipe.model)
        plan = recipe.optimizer
        self.optimizers = Optimizers(self.model, plan.muon_lr, plan.adamw_lr, plan.weight_decay)
        growth = recipe.question_steps
        self.curriculum = StepsCurriculum.begin(
            recipe.tasks.families, growth.start, growth.top, growth.threshold, growth.mastered_weight
        )
        self._dense = Encoder(self.tokenizer, dense=True)
        self._pool = ThreadPoolExecutor(recipe.threads)

    def advance(self) -> dict[str, Any]:
        """One optimiser step; returns its log record.

        Raises:
            TrainError: when the loss is no longer a number.
        """
        recipe, plan = self.recipe, self.recipe.optimizer
        rng = random.Random(f"{recipe.seed} {self.step}")
        by_length = self.step >= recipe.question_steps.even
        questions = draw_questions(self.curriculum, recipe.batch_size, recipe.tasks, rng, by_length=by_length)
        batches = micro_batches(self._dense, questions, recipe.micro_batches)
        n_labels = sum(int((batch.labels != IGNORED).sum()) for batch in batches)
        mean_depth = self._mean_depth()
        passes = [self._draw_passes(mean_depth, i) for i in range(len(batches))]
        # the longest first, or one thread would end up alone with it
        parts = list(self._pool.map(self._part, batches[::-1], passes[::-1], [n_labels] * len(batches)))[::-1]
        loss = sum(part.loss for part in parts)
        if not math.isfinite(loss):
            raise TrainError(f"loss={loss} at step {self.step}; lower the learning rates, muon_lr={plan.muon_lr} first")
        for parameter, *gradients in zip(self.model.parameters(), *(part.gradients for part in parts), strict=True):
            parameter.grad = sum(gradients[1:], start=gradients[0])
        nn.utils.clip_grad_norm_(self.model.parameters(), plan.clip)
        self.optimizers.step(lr_multiplier(self.step, recipe.steps, plan.warmup, plan.cooldown))
        for batch, drawn, part in zip(batches, passes, parts, strict=True):
            for question, right in zip(batch.questions, part.right, strict=True):
                self.curriculum.record(question.family, question.steps, drawn.depth, right)
        self.step += 1
        return {"step": self.step, "loss": loss, "mean_depth": mean_depth, "levels": dict(self.curriculum.levels)}

    def evaluate(self) -> Accuracy:
        """Accuracy on held-out questions, the same ones every time."""
        families, steps = self.recipe.tasks.families, range(1, self.recipe.question_steps.top + 1)
        questions = evaluation(_EVALUATION_SEED, self.recipe.evaluate_questions, families, steps)
        with self._precision():
            return evaluate(self.model, Encoder(self.tokenizer, dense=False), questions, self.recipe.evaluate_depths)

    def state(self) -> dict[str, Any]:
        """Everything it takes to go on."""
        return {
            "recipe": _fingerprint(self.recipe),
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizers": self.optimizers.state(),
            "curriculum": self.curriculum.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``.

        Raises:
            TrainError: when it belongs to another recipe.
        """
        if state["recipe"] != _fingerprint(self.recipe):
            raise TrainError("the folder holds a run of another recipe; give a new folder or the recipe it began with")
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.optimizers.restore(state["optimizers"])
        self.curriculum.restore(state["curriculum"])

    def export(self, path: Path) -> Path:
        """Write the model as a checkpoint in our own layout, float32, tokenizer included."""
        tensors = {name: tensor.numpy() for name, tensor in self.model.state_dict().items()}
        return save(path, self.recipe.model, tensors, tokenizer_files(self.tokenizer))

    def _mean_depth(self) -> int:
        plan = self.recipe.depth
        mean = mean_depth_at(self.step, self.recipe.steps, plan.mean, plan.ramp, plan.ramp_share)
        return min(mean, max(1, round(self.curriculum.mean_level))) if plan.follow_steps else mean

    def _draw_passes(self, mean_depth: int, part: int) -> Passes:
        data_step = self.step * self.recipe.micro_batches + part + 1
        backprop = min(self.recipe.depth.backprop, mean_depth)
        return sample_passes(mean_depth, backprop, seeded(data_step), self.recipe.depth.sigma)

    def _part(self, batch: MicroBatch, passes: Passes, n_labels: int) -> _Part:
        """Run one micro-batch, as its share of the mean over ``n_labels``."""
        with self._precision():
            logits = labelled_logits(self.model, batch.ids, batch.labels, passes.n_nograd, passes.k_grad).float()
            targets = batch.labels[batch.labels != IGNORED]
            loss = functional.cross_entropy(logits, targets, reduction="sum") / n_labels
        gradients = torch.autograd.grad(loss, list(self.model.parameters()))
        return _Part(loss.item(), gradients, right_rows(logits, batch.labels).tolist())

    def _precision(self) -> torch.autocast:
        # threads would share the cache of cast weights, so it stays off
        return torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.bf16, cache_enabled=False)


def _summary(accuracy: Accuracy) -> dict[str, Any]:
    """Mean accuracy by depth, and every cell as {family: {steps: {depth: share}}}."""
    cells: dict[str, dict[str, dict[str, float]]] = {}
    for (family, steps, depth), share in accuracy.items():
        cells.setdefault(family, {}).setdefault(str(steps), {})[str(depth)] = round(share, 4)
    depths = sorted({depth for _, _, depth in accuracy})
    return {"accuracy": {str(depth): round(accuracy_at(accuracy, depth), 4) for depth in depths}, "cells": cells}


def _fingerprint(recipe: Recipe) -> str:
    """What two recipes share exactly when they train the same."""
    return hashlib.blake2b(json.dumps(asdict(recipe), sort_keys=True).encode(), digest_size=16).hexdigest()
