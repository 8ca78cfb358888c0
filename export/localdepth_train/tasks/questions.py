"""Questions that need several steps: generator, train / held-out split, judge. No torch.

The *composition* of a question is its sequence of steps, without the start and without spelling (``Swap red and
blue`` is ``Swap blue and red``; ``Add 17`` acts on the last digit as ``Take away 3`` does). A composition is held out
when it, or any beginning of it longer than its family's ``seen_steps``, hashes into one fifth. Beginnings count
because the trainer's dense labels show the value after every step: no held-out composition is ever labelled.
Names are split in the same way: held-out questions name people that training never shows.
Compositions of at most ``seen_steps`` steps (1 for sum, day and month, 2 for the others) are the facts longer
questions are made of. They have no split: an evaluation there draws the same few questions as training does.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from hashlib import blake2b

from localdepth.errors import ConfigError
from localdepth_train.tasks.families import FAMILIES, Family, Step
from localdepth_train.tasks.names import pick_name

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

TRAINED_STEPS = 8
EVALUATED_STEPS = range(1, 11)  # 9 and 10 are never trained
_HELD_OUT_ONE_IN = 5
_SUBJECT_SHARE = 0.4  # of questions about nobody by name, where a family's wording asks for somebody
_PATIENCE = 64  # refused steps after which a walk starts over


class Split(StrEnum):
    """Which side of the split a composition lies on."""

    TRAIN = "train"
    HELD_OUT = "held_out"


@dataclass(frozen=True, slots=True)
class Question:
    """One question and everything known about it.

    ``labels`` are pairs (offset just past a character of ``text``, value there): the value after the start and after
    every step. They teach the trainer; the model never sees them.
    """

    text: str
    answer: str
    family: str
    steps: int
    composition: tuple[str, ...]
    labels: tuple[tuple[int, str], ...]

    @property
    def is_split(self) -> bool:
        """Whether compositions of this length are divided into train and held out at all."""
        return self.family in FAMILIES and self.steps > FAMILIES[self.family].seen_steps

    @property
    def is_extrapolation(self) -> bool:
        """Longer than anything trained."""
        return self.steps > TRAINED_STEPS


@lru_cache(maxsize=1 << 18)
def _is_drawn(family: str, composition: tuple[str, ...]) -> bool:
    """Whether exactly this composition hashes into the held-out fifth."""
    digest = blake2b(" ".join((family, *composition)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % _HELD_OUT_ONE_IN == 0


def split(family: str, composition: Sequence[str]) -> Split:
    """The side of a composition; the same on every machine."""
    first = FAMILIES[family].seen_steps + 1
    beginnings = (tuple(composition[:end]) for end in range(first, len(composition) + 1))
    return Split.HELD_OUT if any(_is_drawn(family, b) for b in beginnings) else Split.TRAIN


def questions(family: str, steps: int, n: int, seed: int, side: Split) -> list[Question]:
    """``n`` questions of ``steps`` steps, the same for the same arguments.

    In cells without a split (``steps`` <= the family's ``seen_steps``) both sides draw from the same questions.
    Raises:
        ConfigError: for an unknown family or steps < 1.
    """
    if family not in FAMILIES:
        raise ConfigError(f"family={family!r} is not one of {', '.join(FAMILIES)}")
    if steps < 1:
        raise ConfigError(f"steps={steps} must be at least 1")
    rng = random.Random(f"{seed} {family} {steps} {side}")
    return [draw(FAMILIES[family], steps, side, rng) for _ in range(n)]


def draw(family: Family, steps: int, side: Split, rng: random.Random) -> Question:
    """One question from ``rng``; names in it are of the same side as the composition."""
    while True:
        state = rng.choice(family.starts)
        taken = _walk(family, steps, state, side, rng)
        who = family.subject if rng.random() < _SUBJECT_SHARE else pick_name(rng, held_out=side is Split.HELD_OUT)
        question = _assemble(family, who, state, taken, rng.choice(family.frames))
        if not question.is_split or split(family.name, question.composition) is side:
            return question


def _walk(family: Family, steps: int, state: int, side: Split, rng: random.Random) -> list[Step]:
    """Random possible steps from ``state``; for training, none that leads to a held-out composition."""
    start, taken, keys, misses = state, list[Step](), tuple[str, ...](), 0
    while len(taken) < steps:
        step = rng.choice(family.steps)
        after, longer = step.change(state), (*keys, step.key)
        leaves = side is Split.TRAIN and len(longer) > family.seen_steps and _is_drawn(family.name, longer)
        if after is not None and not leaves:
            taken.append(step)
            state, keys = after, longer
        elif (misses := misses + 1) > _PATIENCE:  # every way on is held out
            state, taken, keys, misses = start, [], (), 0
    return taken


def _assemble(family: Family, who: str, state: int, taken: Sequence[Step], frame: tuple[str, str]) -> Question:
    opening, closing = (_filled(part, who, family.told(state)) for part in frame)
    text, labels = opening, [(len(opening), family.value(state))]
    for step in taken:
        after = step.change(state)
        assert after is not None
        text, state = text + step.text, after
        labels.append((len(text), family.value(state)))
    return Question(
        text=text + closing,
        answer=family.answer.format(family.value(state)),
        family=family.name,
        steps=len(taken),
        composition=tuple(step.key for step in taken),
        labels=tuple(labels),
    )


def _filled(template: str, who: str, start: str) -> str:
    text = template.format(who=who, start=start)
    return text[:1].upper() + text[1:]


def evaluation(
    seed: int, per_cell: int, families: Iterable[str] = tuple(FAMILIES), steps: Iterable[int] = EVALUATED_STEPS
) -> list[Question]:
    """Fresh held-out questions, ``per_cell`` for every family and number of steps; 9 and 10 are extrapolation."""
    cells = [(family, n) for family in families for n in steps]
    return [q for family, n in cells for q in questions(family, n, per_cell, seed, Split.HELD_OUT)]


def is_right(question: Question, answer: str) -> bool:
    """Whether ``answer`` is the whole right answer; only surrounding white space is forgiven."""
    return answer.strip() == question.answer


def overlap(held_out: Iterable[Question], *, per_cell: int = 2000, seed: int = 0) -> float:
    """Share of the held-out questions of split cells whose composition training shows, measured.

    Draws ``per_cell`` training questions of every cell up to ``TRAINED_STEPS`` and collects all their beginnings,
    because each of those is labelled in training. 0.0 is what the split promises.
    """
    shown = {
        (family, q.composition[:end])
        for family in FAMILIES
        for steps in range(1, TRAINED_STEPS + 1)
        for q in questions(family, steps, per_cell, seed, Split.TRAIN)
        for end in range(1, steps + 1)
    }
    divided = [q for q in held_out if q.is_split]
    return sum((q.family, q.composition) in shown for q in divided) / max(1, len(divided))
