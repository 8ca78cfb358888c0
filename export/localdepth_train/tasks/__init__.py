"""Generated questions: kinds, wordings, the held-out split, off-topic text, and the tokenizer made for them."""

from localdepth_train.tasks.questions import (
    EVALUATED_STEPS,
    TRAINED_STEPS,
    Question,
    Split,
    draw,
    evaluation,
    is_right,
    overlap,
    questions,
    split,
)

__all__ = [
    "EVALUATED_STEPS",
    "TRAINED_STEPS",
    "Question",
    "Split",
    "draw",
    "evaluation",
    "is_right",
    "overlap",
    "questions",
    "split",
]
