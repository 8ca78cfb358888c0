"""What a phase trains on: generated questions or text, as one interface for the loop."""

import random
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from localdepth.errors import TrainError
from localdepth_train.curriculum import StepsCurriculum
from localdepth_train.data import Encoder, MicroBatch, draw_questions, micro_batches
from localdepth_train.depth_sampler import Passes
from localdepth_train.evaluation import Evaluation, evaluate, judge_questions
from localdepth_train.recipe import Phase, Recipe
from localdepth_train.reference import ReferenceModel
from localdepth_train.start import Start
from localdepth_train.tasks import evaluation
from localdepth_train.text.documents import BadRow
from localdepth_train.text.encoding import DocumentTokenizer
from localdepth_train.text.held_out import held_out_rows
from localdepth_train.text.packing import PackedRow
from localdepth_train.text.settings import OnBadRow, TextRecipe
from localdepth_train.text.shuffling import refuse
from localdepth_train.text.sources import open_source as open_text
from localdepth_train.text.stream import TextStream

__all__ = ["QuestionSource", "Source", "TextSource", "open_source"]

_EVALUATION_SEED = 1
_EVALUATION_ROWS = 8  # of text, run at a time


class Source(Protocol):
    """Batches without end; everything random is a function of the seed and of what ``state`` keeps."""

    def draw(self, step: int) -> list[MicroBatch]:
        """This process's rows of the micro-batches of optimiser step ``step`` (from 0); steps come in order."""

    def learn(self, batch: Sequence[tuple[str, int]], passes: Sequence[Passes], right: Sequence[bool]) -> None:
        """Note how the model did on each question (family, steps) of a micro-batch, over all processes."""

    @property
    def mean_level(self) -> float | None:
        """How long questions may be, averaged over their families; None where there are none."""

    def evaluate(self, model: ReferenceModel, depths: Sequence[int]) -> Evaluation:
        """Judge a model on held-out data, the same every time."""

    def state(self) -> dict[str, Any]:
        """What a saved run keeps."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state``."""


def open_source(recipe: Recipe, phase: Phase, start: Start, rank: int, size: int) -> Source:
    """The source of a phase, for one of ``size`` processes; of a text, what is held out is read here.

    Raises:
        TrainError: when the data cannot be opened, or do not fit the model or the number of processes.
    """
    kind = TextSource if phase.tasks is None else QuestionSource
    return kind(recipe, phase, start, rank, size)


class QuestionSource:
    """Generated questions of lengths that grow as they are mastered."""

    def __init__(self, recipe: Recipe, phase: Phase, start: Start, rank: int, size: int) -> None:
        assert phase.tasks is not None
        if size > 1:
            _rows_each(recipe, size)
        self._recipe, self._tasks, self._share = recipe, phase.tasks, (rank, size)
        tokenizer = start.tokenizer
        self._train, self._judge = Encoder(tokenizer, dense=phase.tasks.dense), Encoder(tokenizer, dense=False)
        growth = phase.tasks.question_steps
        self.curriculum = StepsCurriculum.begin(
            phase.tasks.families, growth.start, growth.top, growth.threshold, growth.mastered_weight
        )

    @property
    def mean_level(self) -> float:
        return self.curriculum.mean_level

    def draw(self, step: int) -> list[MicroBatch]:
        rng = random.Random(f"{self._recipe.seed} {step}")
        drawn = draw_questions(self.curriculum, self._recipe.batch_size, self._tasks, rng)
        batches = micro_batches(self._train, drawn, self._recipe.micro_batches, self._share[1])
        return [batch.share(*self._share) for batch in batches]

    def learn(self, batch: Sequence[tuple[str, int]], passes: Sequence[Passes], right: Sequence[bool]) -> None:
        for (family, steps), drawn, outcome in zip(batch, passes, right, strict=True):
            self.curriculum.record(family, steps, drawn.depth, outcome)

    def evaluate(self, model: ReferenceModel, depths: Sequence[int]) -> Evaluation:
        tasks = self._tasks
        steps = range(1, (tasks.evaluate_steps or tasks.question_steps.top) + 1)
        questions = evaluation(_EVALUATION_SEED, tasks.evaluate_questions, tasks.families, steps)
        return judge_questions(model, self._judge, questions, depths)

    def state(self) -> dict[str, Any]:
        return {"curriculum": self.curriculum.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.curriculum.restore(state["curriculum"])


class TextSource:
    """Packed rows of documents."""

    mean_level = None

    def __init__(self, recipe: Recipe, phase: Phase, start: Start, rank: int, size: int) -> None:
        assert phase.text is not None
        if recipe.start is None:
            raise TrainError("text needs a tokenizer: give start, a checkpoint folder that has one")
        config = start.model.config
        if phase.text.n_tokens > config.n_ctx:
            raise TrainError(
                f"phase {phase.name!r}: text.n_tokens={phase.text.n_tokens} exceeds the model's n_ctx={config.n_ctx}; "
                f"give {config.n_ctx} at most"
            )
        self._rows, self._parts = _rows_each(recipe, size), recipe.micro_batches
        self._text = phase.text
        self._tokenizer = DocumentTokenizer.from_folder(recipe.start, config.n_vocab)
        self._stream = TextStream(phase.text, self._tokenizer, seed=recipe.seed, rank=rank, world=size)
        self._held_out = self._read_held_out()

    def draw(self, step: int) -> list[MicroBatch]:
        return [self._batch([next(self._stream) for _ in range(self._rows)]) for _ in range(self._parts)]

    def learn(self, batch: Sequence[tuple[str, int]], passes: Sequence[Passes], right: Sequence[bool]) -> None:
        pass  # text is neither right nor wrong

    def evaluate(self, model: ReferenceModel, depths: Sequence[int]) -> Evaluation:
        return evaluate(model, self._held_out, depths)

    def state(self) -> dict[str, Any]:
        return {"text": self._stream.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._stream.restore(state["text"])

    def _read_held_out(self) -> list[MicroBatch]:
        if not self._text.held_out_one_in:
            _check_first_rows(self._text)
            return []
        rows = held_out_rows(self._text, self._tokenizer)
        return [self._batch(rows[i : i + _EVALUATION_ROWS]) for i in range(0, len(rows), _EVALUATION_ROWS)]

    def _batch(self, rows: Sequence[PackedRow]) -> MicroBatch:
        ids, labels, documents = (
            torch.from_numpy(np.stack([getattr(row, name) for row in rows]).astype(np.int64))
            for name in ("ids", "labels", "documents")
        )
        return MicroBatch(ids, labels, documents if self._text.isolate else None)


def _check_first_rows(text: TextRecipe) -> None:
    """Refuse now what the rarest source would be refused for long after the first step."""
    for source in text.sources:
        first = next(open_text(source).read(0, 0), None)
        if isinstance(first, BadRow) and text.on_bad_row is OnBadRow.STOP:
            refuse(first)


def _rows_each(recipe: Recipe, size: int) -> int:
    """Rows of a micro-batch for each of ``size`` processes."""
    whole = recipe.micro_batches * size
    n_rows, rest = divmod(recipe.batch_size, whole)
    if rest:
        raise TrainError(
            f"batch_size={recipe.batch_size} must be a multiple of micro_batches x processes = {whole}; "
            f"give {whole * (n_rows + 1)}"
        )
    return n_rows
