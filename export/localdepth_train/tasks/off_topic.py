"""Text that is none of our questions, and the reply it gets.

A third is nearly a question (``near_miss``). The rest is a patchwork of talk, code, tables, word problems, choices,
other languages and noise, mostly short, sometimes as long as the context allows.
"""

import random

from localdepth_train.tasks.near_miss import fill, near_miss
from localdepth_train.tasks.off_topic_text import (
    CODE,
    FOREIGN,
    INSTRUCTIONS,
    OTHER_ENDINGS,
    QUESTIONS,
    SENTENCES,
    SUMS,
    WORDS,
)
from localdepth_train.tasks.questions import Question

__all__ = ["OFF_TOPIC", "REFUSAL", "off_topic", "refused", "stray"]

OFF_TOPIC = "off-topic"  # stands where a question's family would
REFUSAL = "I only know these kinds of questions."

_LETTERS = "eeeeaaaiiooutttnnnsssrrrhhlldcmfpgwybvkxjqzETAOINSHRDLU0123456789.,;:!?'-()äéüß"
_ALPHABETS = ((0x20, 0x7E), (0xA0, 0x2FF), (0x300, 0xD7FF))  # ASCII, Latin, all others in two and three bytes
_NEAR_MISS_SHARE = 0.35
_LENGTHS = ((0.5, 80), (0.86, 320), (0.98, 1000), (1.0, 3000))  # (share of texts up to it, characters at most)


def off_topic(n: int, seed: int) -> list[Question]:
    """``n`` off-topic texts with the refusal as answer, the same for the same arguments."""
    rng = random.Random(f"{seed} {OFF_TOPIC}")
    return [stray(rng) for _ in range(n)]


def stray(rng: random.Random, near_miss_share: float = _NEAR_MISS_SHARE) -> Question:
    """One off-topic text."""
    return refused(near_miss(rng) if rng.random() < near_miss_share else _patchwork(rng))


def refused(text: str) -> Question:
    """``text`` with the refusal as its answer."""
    return Question(text=text, answer=REFUSAL, family=OFF_TOPIC, steps=0, composition=(), labels=())


def _patchwork(rng: random.Random) -> str:
    """Pieces of one to three kinds up to a drawn length, shorter ones far more often."""
    draw = rng.random()
    longest = next(longest for share, longest in _LENGTHS if draw <= share)
    aim = rng.randint(1, longest)
    kinds = rng.sample(_PIECES, rng.randint(1, 3))
    between, text = rng.choice((" ", " ", " ", "\n", "\n\n")), rng.choice(kinds)(rng)
    while len(text) < aim:
        text += between + rng.choice(kinds)(rng)
    return text[:longest]


def _talk(rng: random.Random) -> str:
    return fill(rng.choice(rng.choice((QUESTIONS, INSTRUCTIONS, SENTENCES))), rng, [_word(rng) for _ in range(8)])


def _paragraph(rng: random.Random) -> str:
    return " ".join(fill(rng.choice(SENTENCES), rng) for _ in range(rng.randint(1, 6)))


def _code(rng: random.Random) -> str:
    return fill(rng.choice(CODE), rng)


def _word_problem(rng: random.Random) -> str:
    facts = (rng.choice(SUMS) for _ in range(rng.randint(1, 4)))
    return " ".join(fill(sentence, rng) for sentence in (*facts, rng.choice(OTHER_ENDINGS)))


def _choice(rng: random.Random) -> str:
    """A question with answers to choose from."""
    options = (" ".join(_words(rng, rng.randint(1, 6))) for _ in range(4))
    stem = rng.choice((_talk, _paragraph, _word_problem))(rng)
    marks, form = rng.choice(("ABCD", "abcd", "1234")), rng.choice(("{}. {}", "({}) {}", "{}) {}"))
    listed = (form.format(mark, option) for mark, option in zip(marks, options, strict=True))
    return "\n".join((stem, *listed)) + rng.choice(("", "\nAnswer:"))


def _foreign(rng: random.Random) -> str:
    return rng.choice(FOREIGN)


def _noise(rng: random.Random) -> str:
    """Words without grammar, letters without words, or one sign again and again."""
    match rng.randrange(4):
        case 0:
            return " ".join(_words(rng, rng.randint(1, 12)))
        case 1:
            return " ".join(_gibberish(rng) for _ in range(rng.randint(1, 8)))
        case 2:
            return "".join(chr(rng.randint(*rng.choice(_ALPHABETS))) for _ in range(rng.randint(1, 20)))
        case _:
            sign: str = rng.choice((*_LETTERS, "ha", "no ", "=", "*", "0", " ."))
            return sign * rng.randint(1, 300)


def _words(rng: random.Random, n: int) -> list[str]:
    return [_word(rng) for _ in range(n)]


def _word(rng: random.Random) -> str:
    """A known word, an ending on it or a capital, or one nobody knows."""
    if rng.random() < 0.15:
        return _gibberish(rng)
    word = rng.choice(WORDS) + rng.choice(("", "", "", "s", "ed", "ing", "ly", "er", "ation"))
    return word.capitalize() if rng.random() < 0.15 else word


def _gibberish(rng: random.Random) -> str:
    return "".join(rng.choices(_LETTERS, k=rng.randint(1, 9)))


_PIECES = (_talk, _talk, _paragraph, _code, _word_problem, _choice, _foreign, _noise)
