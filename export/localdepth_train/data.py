"""Batches for the trainer, and questions as token rows with dense labels, cut into micro-batches by length."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from localdepth.config import ModelConfig
from localdepth.errors import TrainError
from localdepth.memory import as_size
from localdepth_train.curriculum import StepsCurriculum
from localdepth_train.recipe import Phase, Recipe, TasksRecipe
from localdepth_train.tasks import Question, Split, draw
from localdepth_train.tasks.families import FAMILIES
from localdepth_train.tasks.off_topic import stray
from localdepth_train.tasks.vocabulary import BOS, EOS, prompt, value_ids
from localdepth_train.text.packing import IGNORED

__all__ = ["Encoder", "MicroBatch", "Row", "check_room", "draw_questions", "micro_batches"]

_LONG = 104  # tokens; the longest question of eight steps has fewer
_SHORT = 8  # tokens; no question has fewer
_TOKEN_BYTES = 16  # id and label


@dataclass(frozen=True, slots=True)
class Row:
    """One question as the trainer sees it; both lists have the length of the row."""

    question: Question
    ids: list[int]
    labels: list[int]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows that are computed together: ids and labels [B,T], short rows filled up at the end with ignored labels.

    Attributes:
        documents: [B,T] which document of its row a position belongs to, where attention keeps to documents.
        questions: [B] what the rows ask, where they are questions.
    """

    ids: Tensor
    labels: Tensor
    documents: Tensor | None = None
    questions: Sequence[Question] = ()

    def share(self, rank: int, size: int) -> "MicroBatch":
        """The rows of one of ``size`` processes."""
        mine = slice(rank, None, size)
        documents = None if self.documents is None else self.documents[mine]
        return MicroBatch(self.ids[mine], self.labels[mine], documents, self.questions[mine])

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on a device."""
        documents = None if self.documents is None else self.documents.to(device)
        return MicroBatch(self.ids.to(device), self.labels.to(device), documents, self.questions)


class Encoder:
    """Questions as token rows: the answer is labelled and, if ``dense``, every position where a value becomes known."""

    def __init__(self, tokenizer: Tokenizer, *, dense: bool) -> None:
        self._tokenizer = tokenizer
        self._dense = dense
        self._values = value_ids(tokenizer)
        self._pad: int = tokenizer.encode(EOS).ids[0]

    def rows(self, questions: Sequence[Question]) -> list[Row]:
        """One row for each question, in order."""
        encodings = self._tokenizer.encode_batch([prompt(q) + q.answer + EOS for q in questions])
        return [self._row(q, e.ids, e.offsets) for q, e in zip(questions, encodings, strict=True)]

    def _row(self, question: Question, ids: list[int], offsets: list[tuple[int, int]]) -> Row:
        position = {end: i for i, (_, end) in enumerate(offsets)}
        labels = [IGNORED] * len(ids)
        for end, value in question.labels if self._dense else ():
            pieces, last = self._values[value], position[len(BOS) + end]
            labels[last - len(pieces) + 1 : last + 1] = pieces
        first = position[len(prompt(question))]  # the answer is predicted from here on
        labels[first:-1] = ids[first + 1 :]
        return Row(question, ids[:-1], labels[:-1])

    def batch(self, rows: Sequence[Row]) -> MicroBatch:
        """Fill rows up to one length."""
        width = max(len(row.ids) for row in rows)
        ids = [row.ids + [self._pad] * (width - len(row.ids)) for row in rows]
        labels = [row.labels + [IGNORED] * (width - len(row.labels)) for row in rows]
        return MicroBatch(torch.tensor(ids), torch.tensor(labels), questions=[row.question for row in rows])


def draw_questions(curriculum: StepsCurriculum, n: int, tasks: TasksRecipe, rng: random.Random) -> list[Question]:
    """``n`` training questions of lengths the curriculum allows, some of them off topic."""
    drawn = []
    for _ in range(n):
        if rng.random() < tasks.off_topic_share:
            drawn.append(stray(rng, tasks.near_miss_share))
        else:
            family, steps = curriculum.draw(rng)
            drawn.append(draw(FAMILIES[family], steps, Split.TRAIN, rng))
    return drawn


def micro_batches(encoder: Encoder, questions: Sequence[Question], parts: int, processes: int = 1) -> list[MicroBatch]:
    """``questions`` sorted by length and cut into at most ``parts``, so that little is padding; the costliest last.

    Rows longer than ``_LONG`` have a part of their own, the others are cut into parts of equal count. Where the number
    of questions is a multiple of ``parts`` x ``processes``, that of every part is one of ``processes``.
    """
    rows = sorted(encoder.rows(questions), key=lambda row: len(row.ids))
    n_short = sum(len(row.ids) <= _LONG for row in rows) if parts > 1 else len(rows)
    n_short -= n_short % processes
    size = -(-n_short // max(1, parts - (n_short < len(rows))))
    size += -size % processes
    cuts = [rows[i : min(i + size, n_short)] for i in range(0, n_short, max(1, size))]
    if n_short < len(rows):
        cuts.append(rows[n_short:])
    return sorted((encoder.batch(cut) for cut in cuts), key=lambda batch: batch.ids.numel())


def check_room(recipe: Recipe, phase: Phase, config: ModelConfig, processes: int, room: int) -> None:
    """Compare ``room``, in bytes, with what a step of one of ``processes`` takes at the very least.

    That is one state, in half precision, for each token computed at a time, and what the batch holds of all tokens.
    Raises:
        TrainError: it would not even hold that.
    """
    n_tokens = _SHORT if phase.text is None else phase.text.n_tokens
    n_rows = recipe.batch_size // processes
    at_a_time = n_rows * min(recipe.threads, recipe.micro_batches) // recipe.micro_batches
    least = n_tokens * (n_rows * _TOKEN_BYTES + at_a_time * config.n_embd * 2)
    if least > room:
        raise TrainError(
            f"batch_size={recipe.batch_size} in micro_batches={recipe.micro_batches} takes more than {as_size(least)} "
            f"in phase {phase.name!r}, for rows of {n_tokens} tokens, and {as_size(room)} are free; give a smaller "
            "batch_size, or more micro_batches"
        )
