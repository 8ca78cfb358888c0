"""Batches for the trainer: drawn questions as token rows with dense labels, cut into micro-batches by length."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from localdepth_train.curriculum import StepsCurriculum
from localdepth_train.families import FAMILIES
from localdepth_train.objective import IGNORED
from localdepth_train.off_topic import stray
from localdepth_train.recipe import TasksRecipe
from localdepth_train.tasks import Question, Split, draw
from localdepth_train.vocabulary import BOS, EOS, prompt, value_ids

__all__ = ["Encoder", "MicroBatch", "Row", "draw_questions", "micro_batches"]

_LONG = 104  # tokens; the longest question of eight steps has fewer


@dataclass(frozen=True, slots=True)
class Row:
    """One question as the trainer sees it; both lists have the length of the row."""

    question: Question
    ids: list[int]
    labels: list[int]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Questions of similar length: ids and labels [B,T], short rows filled up at the end with ignored labels."""

    questions: Sequence[Question]
    ids: Tensor
    labels: Tensor


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
        return MicroBatch([row.question for row in rows], torch.tensor(ids), torch.tensor(labels))


def draw_questions(
    curriculum: StepsCurriculum, n: int, tasks: TasksRecipe, rng: random.Random, *, by_length: bool = False
) -> list[Question]:
    """``n`` training questions of lengths the curriculum allows, some of them off topic."""
    drawn = []
    for _ in range(n):
        if rng.random() < tasks.off_topic_share:
            drawn.append(stray(rng, tasks.near_miss_share))
        else:
            family, steps = curriculum.draw(rng, by_length=by_length)
            drawn.append(draw(FAMILIES[family], steps, Split.TRAIN, rng))
    return drawn


def micro_batches(encoder: Encoder, questions: Sequence[Question], parts: int) -> list[MicroBatch]:
    """``questions`` sorted by length and cut into at most ``parts``, so that little is padding; the costliest last.

    Rows longer than ``_LONG`` have a part of their own, the others are cut into parts of equal count.
    """
    rows = sorted(encoder.rows(questions), key=lambda row: len(row.ids))
    n_short = sum(len(row.ids) <= _LONG for row in rows) if parts > 1 else len(rows)
    size = -(-n_short // max(1, parts - (n_short < len(rows))))
    cuts = [rows[i : min(i + size, n_short)] for i in range(0, n_short, max(1, size))]
    if n_short < len(rows):
        cuts.append(rows[n_short:])
    return sorted((encoder.batch(cut) for cut in cuts), key=lambda batch: batch.ids.numel())
