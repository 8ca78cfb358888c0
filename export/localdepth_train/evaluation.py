"""How good the torch model is on held-out data, by depth: loss on text and answers, accuracy on questions."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from localdepth_train.data import Encoder, MicroBatch, micro_batches
from localdepth_train.objective import attends, decode, right_rows
from localdepth_train.reference import ReferenceModel
from localdepth_train.tasks import Question
from localdepth_train.text.packing import IGNORED

__all__ = ["Accuracy", "Evaluation", "accuracy_at", "evaluate", "judge_questions"]

Accuracy = dict[tuple[str, int, int], float]  # (family, steps, depth) -> share of whole answers right
_ROWS = 256  # questions run at a time


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One look at a model: mean loss of labelled positions by depth, and accuracy where there were questions.

    Both are empty where nothing was labelled.
    """

    loss: dict[int, float] = field(default_factory=dict)
    accuracy: Accuracy = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """For the log: means by depth, and every cell as {family: {steps: {depth: share}}}."""
        record: dict[str, Any] = {"loss": {str(depth): round(value, 6) for depth, value in self.loss.items()}}
        if self.accuracy:
            depths = sorted({depth for _, _, depth in self.accuracy})
            cells: dict[str, dict[str, dict[str, float]]] = {}
            for (family, steps, depth), share in self.accuracy.items():
                cells.setdefault(family, {}).setdefault(str(steps), {})[str(depth)] = round(share, 4)
            record["accuracy"] = {str(depth): round(accuracy_at(self.accuracy, depth), 4) for depth in depths}
            record["cells"] = cells
        return record


def evaluate(model: ReferenceModel, batches: Sequence[MicroBatch], depths: Sequence[int]) -> Evaluation:
    """Judge ``batches`` at every depth, each in one run to the deepest.

    Every answer token is predicted from the right ones before it. All are the likeliest exactly when greedy decoding
    gives the whole answer and then stops, so nothing is decoded. Questions must not be labelled densely.
    """
    outcomes: dict[tuple[str, int, int], list[bool]] = defaultdict(list)
    loss: dict[int, float] = dict.fromkeys(sorted(depths), 0.0)
    n_labels = sum(int((batch.labels != IGNORED).sum()) for batch in batches)
    if not n_labels:
        return Evaluation()
    device = model.token_embd.weight.device
    with torch.inference_mode():
        for batch in (batch.to(device) for batch in batches):
            for depth, logits in _logits_by_depth(model, batch, depths):
                targets = batch.labels[batch.labels != IGNORED]
                loss[depth] += functional.cross_entropy(logits.float(), targets, reduction="sum").item() / n_labels
                right = right_rows(logits, batch.labels).tolist() if batch.questions else []
                for question, outcome in zip(batch.questions, right, strict=True):
                    outcomes[question.family, question.steps, depth].append(outcome)
    return Evaluation(loss, {cell: sum(right) / len(right) for cell, right in sorted(outcomes.items())})


def judge_questions(
    model: ReferenceModel, encoder: Encoder, questions: Sequence[Question], depths: Sequence[int]
) -> Evaluation:
    """``evaluate`` on questions; ``encoder`` must not label densely."""
    return evaluate(model, micro_batches(encoder, questions, -(-len(questions) // _ROWS)), depths)


def _logits_by_depth(model: ReferenceModel, batch: MicroBatch, depths: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    attend = attends(batch.documents)
    e = model.embeds(batch.ids, attend)
    s = torch.zeros_like(e)
    for r in range(max(depths)):
        s = model.core_pass(s, e, r, attend)
        if r + 1 in depths:
            yield r + 1, decode(model, s, batch.labels, attend)


def accuracy_at(accuracy: Accuracy, depth: int) -> float:
    """Mean over the cells of ``depth``."""
    cells = [share for (_, _, at), share in accuracy.items() if at == depth]
    return sum(cells) / len(cells)
