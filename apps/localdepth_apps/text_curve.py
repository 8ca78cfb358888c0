"""Loss against depth: how well a model predicts a text when every position runs the same number of passes."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from localdepth.engine.base import F32
from localdepth.errors import RequestError
from localdepth.model import Model

__all__ = ["TextCurve", "measure"]

_WINDOW = 256  # positions run at a time at most; logits and attention stay small


@dataclass(frozen=True, slots=True)
class TextCurve:
    """How well a text was predicted, by depth.

    Attributes:
        n_tokens: how many were predicted.
        n_characters: of the text that they are.
        loss: mean negative log-likelihood of a token, in nats.
        top1: share of the tokens that were the likeliest.
    """

    n_tokens: int
    n_characters: int
    loss: dict[int, float] = field(default_factory=dict)
    top1: dict[int, float] = field(default_factory=dict)

    @property
    def bits_per_character(self) -> dict[int, float]:
        """The loss in bits for each character, which does not depend on the tokenizer."""
        scale = self.n_tokens / self.n_characters / math.log(2)
        return {depth: loss * scale for depth, loss in self.loss.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain values; numbers as keys become text, as JSON wants."""
        return {
            "loss": _plain(self.loss),
            "bits_per_character": _plain(self.bits_per_character),
            "top1": _plain(self.top1),
            "n_tokens": self.n_tokens,
            "n_characters": self.n_characters,
        }


def measure(
    model: Model,
    documents: Iterable[str],
    depths: Sequence[int],
    max_tokens: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> TextCurve:
    """Predict every token of some documents from those before it, at every depth.

    Documents are run in windows that overlap by half: a token is predicted from at least 128 tokens before it (fewer
    in a short context), or from all there are. Reading stops at ``max_tokens``; the last document is cut there.

    Args:
        depths: each in the model's measuring range.
        on_progress: told after each window how many are done, and how many there are.
    Raises:
        DepthError: a depth outside the range, before anything is run.
        PromptError: the model has no tokenizer, or it has no tokens for the text.
        RequestError: nothing is left to predict.
    """
    for depth in depths:
        model.config.check_depth(depth, measure=True)
    passages = list(_passages(model, documents, max_tokens))
    curve = TextCurve(sum(p.n_predicted for p in passages), sum(p.n_characters for p in passages))
    if curve.n_tokens < 1 or curve.n_characters < 1:
        raise RequestError(f"max_tokens={max_tokens} and the text leave nothing to predict; give more of both")
    length = min(_WINDOW, model.limits.n_ctx)
    windows = [window for passage in passages for window in passage.windows(length)]
    for i, depth in enumerate(depths):
        surprise, n_best = 0.0, 0
        for n_done, (read, expected) in enumerate(windows, start=i * len(windows) + 1):
            logits = model.logits(read, depth=depth)[-len(expected) :]
            surprise += _surprise(logits, expected)
            n_best += int((logits.argmax(-1) == expected).sum())
            on_progress(n_done, len(depths) * len(windows))
        curve.loss[depth], curve.top1[depth] = surprise / curve.n_tokens, n_best / curve.n_tokens
    return curve


@dataclass(frozen=True, slots=True)
class _Passage:
    """A text as tokens, of which all but the first are predicted, and the number of characters those are.

    The first is the token that begins every text; for a model without one it is the first of the text itself.
    """

    ids: list[int]
    n_characters: int

    @classmethod
    def of(cls, model: Model, text: str) -> "_Passage":
        ids, begins = model.tokenize(text), bool(model.tokenize(""))
        given = "" if begins else "".join(map(model.token_text, ids[:1]))
        return cls(ids, len(text) - len(given))

    @property
    def n_predicted(self) -> int:
        return max(len(self.ids) - 1, 0)

    def windows(self, length: int) -> Iterator[tuple[list[int], list[int]]]:
        """What is read, at most ``length`` tokens, and what its last positions should predict: half as many."""
        half = max(1, length // 2)
        for i in range(1, len(self.ids), half):
            expected = self.ids[i : i + half]
            yield self.ids[max(0, i - half) : i - 1 + len(expected)], expected


def _passages(model: Model, documents: Iterable[str], max_tokens: int) -> Iterator[_Passage]:
    room = max_tokens
    for text in documents:
        passage = _Passage.of(model, text)
        if passage.n_predicted >= room:
            yield _cut(model, text, room)
            return
        yield passage
        room -= passage.n_predicted


def _cut(model: Model, text: str, n: int) -> _Passage:
    """The beginning of a text, at most ``n`` tokens of it; cut between characters, of which a token may be a part."""
    while (passage := _Passage.of(model, text)).n_predicted > n:
        text = text[: len(text) * n // len(passage.ids)]
    return passage


def _surprise(logits: F32, expected: Sequence[int]) -> float:
    """Negative log-likelihood of these tokens together, in nats."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_sums = np.log(np.exp(shifted).sum(axis=-1, dtype=np.float64))
    return float((log_sums - shifted[np.arange(len(expected)), expected]).sum())


def _plain(by_depth: dict[int, float]) -> dict[str, float]:
    return {str(depth): round(value, 6) for depth, value in by_depth.items()}
