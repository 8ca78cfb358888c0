"""The training loop: draw a batch, run to a sampled depth, backpropagate through the last passes, step, repeat.

Everything random is a function of the recipe's seed and the step, so a run that was stopped and started again ends
bit for bit where an undisturbed one does.
"""

import math
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate, zip_longest
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor

from localdepth.config import StateInit
from localdepth.errors import TrainError
from localdepth_train.checkpoint import save
from localdepth_train.curriculum import backprop_depth_at, lr_multiplier, mean_depth_at
from localdepth_train.data import MicroBatch, check_room
from localdepth_train.depth_sampler import Passes, expected_depth, numbered, sample_rows, seeded
from localdepth_train.evaluation import Evaluation
from localdepth_train.flops import Flops
from localdepth_train.optim import Optimizers
from localdepth_train.recipe import Recipe
from localdepth_train.reference import Block
from localdepth_train.resuming import changes, settings_of
from localdepth_train.run_folder import RunFolder
from localdepth_train.sources import open_source
from localdepth_train.start import Start, trained_at
from localdepth_train.team import WHOLE, free_bytes, is_first, open_team
from localdepth_train.terms import Job, Objective, open_teacher
from localdepth_train.text.packing import IGNORED

__all__ = ["Report", "Trainer", "train"]


@dataclass(frozen=True, slots=True)
class Report:
    """How a run stands when ``train`` returns.

    Attributes:
        began: the step it went on from, 0 for a new run; that of a finished run is its last.
        steps: those made so far.
        loss: the last step's.
        evaluation: the last one, None if there was none since it began.
        checkpoint: None while steps are left.
    """

    began: int
    steps: int
    loss: float
    evaluation: Evaluation | None
    checkpoint: Path | None


def train(
    recipe: Recipe,
    folder: str | os.PathLike[str],
    *,
    until: int | None = None,
    on_record: Callable[[Mapping[str, Any]], None] = lambda record: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Report:
    """Run ``recipe`` in ``folder``, going on from what a stopped run left there; a finished one stays as it is.

    Args:
        until: stop after this step with everything saved; None runs to the recipe's end.
        on_record: sees every record as it was logged, for progress; of several processes in the first alone.
        should_stop: asked after every step; once true, the run is saved and ends early, to be gone on with.
    Raises:
        TrainError: when the recipe cannot be run or leaves open what on, the folder holds or is used by another run, or
            the loss is no longer a number.
        CheckpointError: for a start or a teacher that is no checkpoint.
        StorageError: when the folder cannot be written; the last saved state is kept.
    """
    recipe.check_given()
    with RunFolder(folder, writes=is_first()) as run:
        trainer = Trainer(recipe, run.read_state())
        began = trainer.step
        if began == recipe.steps and run.checkpoint.is_dir():
            return Report(began, began, trainer.loss, None, run.checkpoint)
        run.rewind_log(began)

        def tell(record: Mapping[str, Any]) -> None:
            logged = run.log({**trainer.position, **record})
            if is_first():
                on_record(logged)

        if trainer.changed:
            tell({"changed": trainer.changed})
        evaluation = None
        last = recipe.steps if until is None else min(until, recipe.steps)
        stopped = False
        while trainer.step < last and not stopped:
            try:
                tell(trainer.advance())
            except _Diverged as error:
                raise TrainError(f"{error}{run.ways_on}") from error
            is_due = trainer.step % recipe.evaluation.every == 0 or trainer.ends_phase
            if is_due and (found := trainer.evaluate()).loss:
                evaluation = found
                tell({"evaluation": evaluation.record()})
            stopped = any(trainer.team.gather(should_stop()))
            if trainer.step % recipe.save_every == 0 or trainer.ends_phase or trainer.step == last or stopped:
                run.write_state(trainer.state())
        done = trainer.step == recipe.steps
        return Report(began, trainer.step, trainer.loss, evaluation, trainer.export(run.checkpoint) if done else None)


class _Diverged(TrainError):
    """The loss is no longer a number."""


class Trainer:
    """A model in training and everything that changes with it.

    Args:
        state: what ``state`` gave, to go on from; None begins.
    Attributes:
        changed: settings that are not those of ``state``, by name: what they were and what they are.
    Raises:
        TrainError: when model, data, processes or ``state`` do not fit the recipe, that of any phase.
        CheckpointError: for a start or a teacher that is no checkpoint.
    """

    def __init__(self, recipe: Recipe, state: Mapping[str, Any] | None = None) -> None:
        self.recipe, self.team = recipe, open_team(recipe.threads, recipe.shard)
        self._ends = list(accumulate(phase.steps for phase in recipe.phases))  # step after which each phase is over
        self._start = Start.of(recipe)
        self.model, self.tokenizer = self._start.model.to(self.team.device), self._start.tokenizer
        config, rank, size = self.model.config, self.team.rank, self.team.size
        self._settings = settings_of(recipe, config)
        self.changed = {} if state is None else changes(state["settings"], self._settings)
        for depth in recipe.evaluation.depths:
            config.check_depth(depth, measure=True)
        for phase in recipe.phases:  # here, not when it begins
            check_room(recipe, phase, config, size, free_bytes(self.team.device))
            open_teacher(phase.objective, config)
        self._sources = [open_source(recipe, phase, self._start, rank, size) for phase in recipe.phases]
        self._cost = Flops.of(config)
        if recipe.compile:
            for module in self.model.modules():
                if isinstance(module, Block):
                    module.compile()
        self._terms = Objective(self.model, recipe.recompute)
        self.objective = self.team.prepare(self._terms)
        self.step = self.n_tokens = 0
        self.flops, self.loss = 0.0, math.nan  # the last step's
        if state is None:
            self._enter(0)
        else:
            self._restore(state)

    @property
    def ends_phase(self) -> bool:
        """Whether the step just made was the last of its phase."""
        return self.step in self._ends

    @property
    def position(self) -> dict[str, Any]:
        """Where the run stands, for the log."""
        return {"step": self.step, "phase": self._phase.name, "tokens": self.n_tokens, "flops": self.flops}

    def advance(self) -> dict[str, Any]:
        """One optimiser step; returns its log record.

        Raises:
            TrainError: when the loss is no longer a number.
        """
        began = time.perf_counter()
        if self.ends_phase:
            self._enter(self._ends.index(self.step) + 1)
        at, phase, plan = self.step - self._begin, self._phase, self._phase.optimizer
        mean_depth, backprop = self._depths(at)
        jobs = self._draw_jobs(mean_depth, backprop)
        parts = self.team.gradients(self.objective, self._loss, jobs)
        loss = sum(self.team.gather(sum(value for value, _ in parts)))
        clipped = nn.utils.clip_grad_norm_(self.objective.parameters(), plan.clip)
        norm = float(clipped.full_tensor() if isinstance(clipped, DTensor) else clipped)
        if not math.isfinite(loss) or not math.isfinite(norm):
            rates = f"adamw_lr={plan.adamw_lr}" + (f" and muon_lr={plan.muon_lr}" if plan.muon_lr else "")
            raise _Diverged(
                f"loss={loss}, gradient_norm={norm} at step {self.step + 1}; lower the learning rate of phase "
                f"{phase.name!r}, {rates}, and start over in a new folder"
            )
        factor = lr_multiplier(at, phase.steps, plan.warmup, plan.cooldown)
        self.optimizers.step(factor)
        self._learn(jobs, [right for _, right in parts])
        tokens, depths = self._count(jobs)
        self.step, self.loss = self.step + 1, loss
        return {
            **self.position,
            "loss": loss,
            "mean_depth": mean_depth,
            "expected_depth": expected_depth(phase.depth, mean_depth),
            "backprop_depth": backprop,
            "depths": {str(depth): n for depth, n in sorted(depths.items())},
            "lr": factor,
            "gradient_norm": norm,
            "tokens_per_second": round(tokens / (time.perf_counter() - began)),
        }

    def evaluate(self) -> Evaluation:
        """The phase's held-out data, the same every time."""
        with self._precision(), self.team.whole(self.objective):
            return self.source.evaluate(self.model, self.recipe.evaluation.depths)

    def state(self) -> dict[str, Any]:
        """Everything it takes to go on."""
        return {
            "settings": self._settings,
            **self.position,
            "loss": self.loss,
            "model": get_model_state_dict(self.model, options=WHOLE),
            "optimizers": self.optimizers.state(),
            "source": self.source.state(),
        }

    def export(self, path: Path) -> Path:
        """Write the model as a checkpoint in our own layout, float32, tokenizer included.

        One that started from a checkpoint gets the depth it was trained for as its default.
        """
        weights = cast(dict[str, Tensor], get_model_state_dict(self.model, options=WHOLE))  # by all, for the first
        config = self.model.config
        if self.recipe.start is not None:
            config = trained_at(config, self._phase.depth.mean)
        if self.team.rank == 0:
            save(path, config, {name: tensor.numpy() for name, tensor in weights.items()}, self._start.files)
        self.team.gather(None)  # it is there when any process says so
        return path

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.step, self.n_tokens, self.flops, self.loss = (state[name] for name in ("step", "tokens", "flops", "loss"))
        set_model_state_dict(self.model, state["model"], options=WHOLE)
        self._enter(next(i for i, end in enumerate(self._ends) if self.step <= end))
        self.optimizers.restore(state["optimizers"])
        self.source.restore(state["source"])

    def _enter(self, index: int) -> None:
        """Begin a phase: its data, a fresh optimiser."""
        self._phase, self._begin = self.recipe.phases[index], [0, *self._ends][index]
        self.source, plan = self._sources[index], self._phase.optimizer
        self._terms.pursue(self._phase.objective)
        self.optimizers = Optimizers(self.model, plan.muon_lr, plan.adamw_lr, plan.weight_decay)

    def _depths(self, at: int) -> tuple[int, int]:
        """Mean depth and backprop depth of step ``at`` of the phase."""
        plan, steps = self._phase.depth, self._phase.steps
        mean = mean_depth_at(at, steps, plan.mean, plan.ramp, plan.ramp_share)
        if plan.follow_steps and self.source.mean_level is not None:
            mean = min(mean, max(1, round(self.source.mean_level)))
        return mean, backprop_depth_at(at, steps, mean, plan.backprop, plan.backprop_start, plan.backprop_ramp_share)

    def _draw_jobs(self, mean_depth: int, backprop: int) -> list[Job]:
        """The micro-batches of this process, with passes and s_0 of their rows."""
        batches = [batch.to(self.team.device) for batch in self.source.draw(self.step)]
        n_labels = sum(self.team.gather(sum(int((batch.labels != IGNORED).sum()) for batch in batches)))
        jobs = []
        for i, batch in enumerate(batches):
            mine, others = self._draw_passes(mean_depth, backprop, i, len(batch.ids))
            jobs.append(Job(batch, mine, others, self._draw_state(i, batch), max(1, n_labels)))
        return jobs

    def _draw_passes(self, mean_depth: int, backprop: int, part: int, n: int) -> tuple[list[Passes], list[Passes]]:
        """Passes of this process's ``n`` rows of micro-batch ``part``, and of the rows of others."""
        rank, size = self.team.rank, self.team.size
        generator = seeded(self._data_step(part), self.recipe.seed)
        drawn = sample_rows(self._phase.depth, n * size, mean_depth, backprop, generator)
        return drawn[rank::size], [one for i, one in enumerate(drawn) if i % size != rank]

    def _data_step(self, part: int) -> int:
        """Number of a micro-batch in the whole run, from 1."""
        return self.step * self.recipe.micro_batches + part + 1

    def _draw_state(self, part: int, batch: MicroBatch) -> Tensor | None:
        """s_0 of the rows of micro-batch ``part``, from the model's distribution; None where it starts from zeros."""
        config, (n, n_tokens) = self.model.config, batch.ids.shape
        if config.state_init is StateInit.ZEROS:
            return None
        generator = numbered(self._data_step(part), self.recipe.seed)
        noise = torch.randn((n * self.team.size, n_tokens, config.n_embd), generator=generator)
        return (noise[self.team.rank :: self.team.size] * config.state_std).to(self.team.device)

    def _loss(self, objective: nn.Module, job: Job) -> tuple[Tensor, list[bool]]:
        with self._precision():
            loss, right = objective(job)
        return loss, right.tolist()

    def _learn(self, jobs: list[Job], right: list[list[bool]]) -> None:
        """Tell the source how every row of every process did, in the order they were drawn."""
        mine = [
            list(zip(((q.family, q.steps) for q in job.batch.questions), job.passes, outcome, strict=True))
            for job, outcome in zip(jobs, right, strict=True)
            if job.batch.questions
        ]
        for parts in zip(*self.team.gather(mine), strict=True):
            rows = [row for together in zip_longest(*parts) for row in together if row is not None]
            self.source.learn(*zip(*rows, strict=True))

    def _count(self, jobs: list[Job]) -> tuple[int, Counter[int]]:
        """Add this step to tokens and FLOPs of all processes; returns its tokens, and its sequences by depth."""
        tokens = sum(job.batch.ids.numel() for job in jobs)
        depths = Counter(drawn.depth for job in jobs for drawn in job.passes)
        flops = sum(self._flops(job) for job in jobs)
        everyone = self.team.gather((tokens, flops, depths))
        new = sum(tokens for tokens, _, _ in everyone)
        self.n_tokens += new
        self.flops += sum(flops for _, flops, _ in everyone)
        return new, sum((depths for _, _, depths in everyone), Counter())

    def _flops(self, job: Job) -> float:
        n_labels = int((job.batch.labels != IGNORED).sum())
        return self._cost.training([*job.passes, *job.others], job.batch.ids.numel(), n_labels, self.recipe.recompute)

    def _precision(self) -> torch.autocast:
        # no cache of cast weights: threads would share it, and weights that passes without gradient cast carry none
        return torch.autocast(self.team.device.type, torch.bfloat16, enabled=self.recipe.bf16, cache_enabled=False)
