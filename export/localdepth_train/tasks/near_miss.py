"""Text that is nearly one of our questions: cut, crossed, out of order, with a word or a sentence that does not fit."""

import random
from collections.abc import Callable, Sequence
from itertools import pairwise

from localdepth_train.tasks.families import FAMILIES, Family
from localdepth_train.tasks.off_topic_text import OTHER_ENDINGS, QUESTIONS, SENTENCES, WORDS
from localdepth_train.tasks.questions import TRAINED_STEPS, Question, Split, draw

__all__ = ["KINDS", "fill", "near_miss"]

_TOLD = tuple(family for family in FAMILIES.values() if family.name != "hop")  # a story and a question about it


def near_miss(rng: random.Random, side: Split = Split.TRAIN) -> str:
    """One such text, of a kind drawn from ``KINDS``."""
    return rng.choice(list(KINDS.values()))(rng, side)


def fill(template: str, rng: random.Random, words: Sequence[str] = WORDS) -> str:
    """``template`` with a word for every ``{}`` and a number of one to four digits for every ``{n}``."""
    pieces = template.split("{n}")
    numbers = [*(str(rng.randint(1, 10 ** rng.randint(1, 4))) for _ in pieces[1:]), ""]
    return "".join(
        piece.format(*(rng.choice(words) for _ in range(piece.count("{}")))) + number
        for piece, number in zip(pieces, numbers, strict=True)
    )


def _parts(question: Question) -> list[str]:
    """Opening, steps and closing."""
    ends = [0, *(end for end, _ in question.labels), len(question.text)]
    return [question.text[a:b] for a, b in pairwise(ends)]


def _told(rng: random.Random, side: Split, family: Family | None = None) -> list[str]:
    return _parts(draw(family or rng.choice(_TOLD), rng.randint(1, TRAINED_STEPS), side, rng))


def _no_question(rng: random.Random, side: Split) -> str:
    return "".join(_told(rng, side)[:-1])


def _no_story(rng: random.Random, side: Split) -> str:
    _, *steps, closing = _told(rng, side)
    return rng.choice((closing, "".join((*steps, closing)))).strip()


def _crossed(rng: random.Random, side: Split) -> str:
    """The story of one kind with the question of another."""
    one, other = rng.sample(_TOLD, 2)
    return "".join((*_told(rng, side, one)[:-1], _told(rng, side, other)[-1]))


def _strange_step(rng: random.Random, side: Split) -> str:
    """Steps of one kind in the story of another, or a sentence from elsewhere."""
    one, other = rng.sample(_TOLD, 2)
    parts = _told(rng, side, one)
    elsewhere = f" {fill(rng.choice(SENTENCES), rng)}"
    strange = rng.choice(_told(rng, side, other)[1:-1]) if rng.random() < 0.6 else elsewhere
    parts.insert(rng.randint(1, len(parts) - 1), strange)
    return "".join(parts)


def _strange_word(rng: random.Random, side: Split) -> str:
    """One word of one step is another."""
    parts = _told(rng, side)
    i = rng.randint(1, len(parts) - 2)
    words = parts[i].split(" ")
    j = rng.randint(1, len(words) - 1)
    strange = rng.choice(WORDS)
    words[j] = strange + ("." if words[j].endswith(".") else "")
    parts[i] = " ".join(words)
    return "".join(parts) if strange not in _OWN_WORDS else _strange_word(rng, side)


def _half(rng: random.Random, side: Split) -> str:
    """A question that breaks off, in the middle of a word or before one."""
    family = rng.choice(list(FAMILIES.values()))
    text = draw(family, rng.randint(1, TRAINED_STEPS), side, rng).text
    end = text.rindex(" ") if family.name != "hop" else text.index("'s") + 1
    return text[: rng.randint(2, end)].strip()


def _other_question(rng: random.Random, side: Split) -> str:
    """A story that is asked something we do not know."""
    ending = rng.choice(OTHER_ENDINGS) if rng.random() < 0.7 else rng.choice(QUESTIONS)
    return f"{_no_question(rng, side)} {fill(ending, rng)}"


def _out_of_order(rng: random.Random, side: Split) -> str:
    """The sentences of a question, the opening not first."""
    opening, *rest = _told(rng, side)
    rest.insert(rng.randint(1, len(rest)), f" {opening}")
    return "".join(rest).strip()


def _two_at_once(rng: random.Random, side: Split) -> str:
    return " ".join("".join(_told(rng, side)) for _ in range(2))


def _surrounded(rng: random.Random, side: Split) -> str:
    """A whole question before or after something else."""
    other, question = fill(rng.choice((*SENTENCES, *QUESTIONS)), rng), "".join(_told(rng, side))
    return f"{other} {question}" if rng.random() < 0.5 else f"{question} {other}"


def _stranger(rng: random.Random, side: Split) -> str:
    """The closed-book kind with a person or a relation that is not in its world."""
    parts = _parts(draw(FAMILIES["hop"], rng.randint(1, TRAINED_STEPS), side, rng))
    if rng.random() < 0.5:
        parts[0] = parts[0].rsplit(" ", 1)[0] + f" {rng.choice(WORDS).capitalize()}"
        return "".join(parts) if parts[0].split()[-1] not in _OWN_WORDS else _stranger(rng, side)
    i = rng.randint(1, len(parts) - 2)
    relation = rng.choice([word for word in WORDS if word not in _OWN_WORDS])
    parts[i] = f"'s {relation}"
    return "".join(parts)


def _salad(rng: random.Random, side: Split) -> str:
    """Words of our questions in any order."""
    words = " ".join("".join(_told(rng, side)) for _ in range(2)).split(" ")
    return " ".join(rng.sample(words, rng.randint(1, len(words))))


_OWN_WORDS = frozenset(
    word.strip(".?")
    for family in FAMILIES.values()
    for text in (
        *(step.text for step in family.steps),
        *(part for frame in family.frames for part in frame),
        *(family.value(state) for state in family.starts),
    )
    for word in text.replace("'s ", "").split()
)
KINDS: dict[str, Callable[[random.Random, Split], str]] = {
    "no question": _no_question,
    "no story": _no_story,
    "crossed": _crossed,
    "strange step": _strange_step,
    "strange word": _strange_word,
    "half": _half,
    "other question": _other_question,
    "out of order": _out_of_order,
    "two at once": _two_at_once,
    "surrounded": _surrounded,
    "stranger": _stranger,
    "salad": _salad,
}
