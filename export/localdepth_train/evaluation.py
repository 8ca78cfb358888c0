"""Accuracy of the torch model on questions, by family, steps and depth."""

from collections import defaultdict
from collections.abc import Sequence

import torch

from localdepth_train.data import Encoder, micro_batches
from localdepth_train.objective import decode, right_rows
from localdepth_train.reference import ReferenceModel
from localdepth_train.tasks import Question

__all__ = ["Accuracy", "accuracy_at", "evaluate"]

Accuracy = dict[tuple[str, int, int], float]  # (family, steps, depth) -> share of whole answers right
_ROWS = 256  # questions run at a time


def evaluate(model: ReferenceModel, encoder: Encoder, questions: Sequence[Question], depths: Sequence[int]) -> Accuracy:
    """Judge ``questions`` at every depth, all in one run to the deepest.

    Every answer token is predicted from the right ones before it. All are the likeliest exactly when greedy decoding
    gives the whole answer and then stops, so nothing is decoded. ``encoder`` must not label densely.
    """
    outcomes: dict[tuple[str, int, int], list[bool]] = defaultdict(list)
    for batch in micro_batches(encoder, questions, -(-len(questions) // _ROWS)):
        with torch.inference_mode():
            for depth, s in enumerate(model.states(batch.ids, max(depths)), start=1):
                if depth in depths:
                    right = right_rows(decode(model, s, batch.labels), batch.labels)
                    for question, outcome in zip(batch.questions, right.tolist(), strict=True):
                        outcomes[question.family, question.steps, depth].append(outcome)
    return {cell: sum(right) / len(right) for cell, right in sorted(outcomes.items())}


def accuracy_at(accuracy: Accuracy, depth: int) -> float:
    """Mean over the cells of ``depth``."""
    cells = [share for (_, _, at), share in accuracy.items() if at == depth]
    return sum(cells) / len(cells)
