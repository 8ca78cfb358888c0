"""Accuracy against depth: the same questions answered at every depth, counted by steps and family."""

import json
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from localdepth.errors import RequestError
from localdepth.model import Model

__all__ = ["Asked", "Cell", "Curve", "Item", "is_same_answer", "measure", "read_questions"]

_MAX_TOKENS = 48


class Item(Protocol):  # read-only, so that any record with these names will do
    """A question with its answer, its kind, and how many steps it takes (0: unknown)."""

    @property
    def text(self) -> str: ...
    @property
    def answer(self) -> str: ...
    @property
    def family(self) -> str: ...
    @property
    def steps(self) -> int: ...


_Item = TypeVar("_Item", bound=Item)


@dataclass(frozen=True, slots=True)
class Asked:
    """One question of a user's own file."""

    text: str
    answer: str
    family: str = "all"
    steps: int = 0


@dataclass(slots=True)
class Cell:
    """Right answers among the questions of one kind at one depth."""

    n: int = 0
    right: int = 0

    @property
    def accuracy(self) -> float:
        return self.right / self.n if self.n else 0.0


@dataclass(frozen=True, slots=True)
class Curve:
    """Accuracy by depth; each table is keyed by what it is named for, then by depth.

    Attributes:
        ms: mean time of an answer by depth, in milliseconds.
    """

    depths: tuple[int, ...]
    total: dict[int, Cell] = field(default_factory=dict)
    by_steps: dict[int, dict[int, Cell]] = field(default_factory=dict)
    by_family: dict[str, dict[int, Cell]] = field(default_factory=dict)
    ms: dict[int, float] = field(default_factory=dict)

    def passes_to(self, share: float) -> dict[int, int | None]:
        """By number of steps, the smallest measured depth that answers this share right; None where none does."""
        return {
            steps: next((depth for depth in sorted(cells) if cells[depth].accuracy >= share), None)
            for steps, cells in sorted(self.by_steps.items())
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values; numbers as keys become text, as JSON wants."""
        return {
            "accuracy": _plain(self.total),
            "by_steps": {str(steps): _plain(cells) for steps, cells in sorted(self.by_steps.items())},
            "by_family": {family: _plain(cells) for family, cells in sorted(self.by_family.items())},
            "passes_to_90": {str(steps): depth for steps, depth in self.passes_to(0.9).items()},
            "n": {str(steps): min(c.n for c in cells.values()) for steps, cells in sorted(self.by_steps.items())},
            "ms": {str(depth): round(ms, 3) for depth, ms in self.ms.items()},
            "policies": {},
        }


def measure(
    model: Model,
    questions: Sequence[_Item],
    depths: Sequence[int],
    is_right: Callable[[_Item, str], bool],
    on_answer: Callable[[], None] = lambda: None,
) -> Curve:
    """Answer every question greedily at every depth.

    Args:
        depths: each in the model's measuring range.
        is_right: judges an answer.
        on_answer: called after each, for progress.
    Raises:
        DepthError: a depth outside the range, before anything is asked.
        ContextOverflow: a question longer than the context.
    """
    for depth in depths:
        model.config.check_depth(depth, measure=True)
    curve = Curve(tuple(depths))
    for depth in depths:
        began = time.perf_counter()
        for question in questions:
            right = is_right(question, model.answer_at(question.text, depth=depth, max_tokens=_MAX_TOKENS).text)
            for cell in (
                curve.total.setdefault(depth, Cell()),
                curve.by_steps.setdefault(question.steps, {}).setdefault(depth, Cell()),
                curve.by_family.setdefault(question.family, {}).setdefault(depth, Cell()),
            ):
                cell.n += 1
                cell.right += right
            on_answer()
        curve.ms[depth] = 1000 * (time.perf_counter() - began) / len(questions)
    return curve


def read_questions(path: str | os.PathLike[str]) -> list[Asked]:
    """Questions of a JSONL file: ``{"question": …, "answer": …, "family": …, "steps": …}``, the last two optional.

    Raises:
        RequestError: the file cannot be read, or a line is no such record, with its number.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read {path}: {error}; pass a JSONL file in UTF-8") from error
    questions = [_parse(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not questions:
        raise RequestError(f"{path} holds no questions; write one JSON object a line")
    return questions


def is_same_answer(question: Item, answer: str) -> bool:
    """Whether the words of the answer are those expected; case, punctuation and white space do not count."""
    return re.findall(r"\w+", answer.casefold()) == re.findall(r"\w+", question.answer.casefold())


def _parse(path: str | os.PathLike[str], number: int, line: str) -> Asked:
    try:
        record = json.loads(line)
        text, answer = record["question"], record["answer"]
        family, steps = record.get("family", "all"), record.get("steps", 0)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RequestError(f'{path}, line {number}: not a record with "question" and "answer" ({error})') from error
    if not all(isinstance(value, str) for value in (text, answer, family)) or not isinstance(steps, int):
        raise RequestError(f"{path}, line {number}: question, answer and family are texts, steps is a whole number")
    return Asked(text, answer, family, steps)


def _plain(cells: dict[int, Cell]) -> dict[str, float]:
    return {str(depth): round(cell.accuracy, 4) for depth, cell in cells.items()}
