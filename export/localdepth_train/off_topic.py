"""Text that is none of our questions, and the reply it gets."""

import random

from localdepth_train.families import FAMILIES
from localdepth_train.tasks import TRAINED_STEPS, Question, Split, draw

__all__ = ["OFF_TOPIC", "REFUSAL", "off_topic", "stray"]

OFF_TOPIC = "off-topic"  # stands where a question's family would
REFUSAL = "I only know these kinds of questions."

_LETTERS = "eeeeaaaiiooutttnnnsssrrrhhlldcmfpgwybvkxjqzETAOINSHRDLU0123456789.,;:!?'-()äéüß"
_FRAMES = (
    "What is {}?",
    "Who is {}?",
    "Where can I buy a {}?",
    "How do I {} a {}?",
    "Why is the {} so {}?",
    "Tell me about {}.",
    "Write a poem about a {} and a {}.",
    "Translate {} into {}.",
    "What is the capital of {}?",
    "Which {} is the best for {}?",
    "Can you help me with my {}?",
    "I think that {} is {}, what do you say?",
    "Explain {} to a {}.",
    "Hello {}!",
    "{}",
    "{} {} {} {}",
    "Please {} the {} before {}.",
    "How many {} are in a {}?",
    "Is it true that a {} can {}?",
    "Give me a list of {} for the {}.",
)
_WORDS_TEXT = """
apple bridge cat dance energy flower garden house island jacket kitchen lemon music night ocean paper quiet river
school train umbrella village winter yellow zebra cook paint write open travel learn sleep sing build happy cold
old strong France China Rome Paris history science money love weather python computer football coffee bread doctor
friend teacher boss coin cup robot lift floor day Monday red blue north left number digit seven Eve Tom Ann
"""
_WORDS = tuple(_WORDS_TEXT.split())


def off_topic(n: int, seed: int) -> list[Question]:
    """``n`` off-topic texts with the refusal as answer, the same for the same arguments."""
    rng = random.Random(f"{seed} {OFF_TOPIC}")
    return [stray(rng) for _ in range(n)]


def stray(rng: random.Random) -> Question:
    """One off-topic text: everyday talk, letters nobody knows, or our questions cut or crossed."""
    text = rng.choice((_small_talk, _small_talk, _letters, _broken))(rng)
    return Question(text=text, answer=REFUSAL, family=OFF_TOPIC, steps=0, composition=(), labels=())


def _small_talk(rng: random.Random) -> str:
    frame = rng.choice(_FRAMES)
    return frame.format(*(_word(rng) for _ in range(frame.count("{}"))))


def _word(rng: random.Random) -> str:
    return rng.choice(_WORDS) if rng.random() < 0.7 else _gibberish(rng)


def _letters(rng: random.Random) -> str:
    return " ".join(_gibberish(rng) for _ in range(rng.randint(1, 8)))


def _gibberish(rng: random.Random) -> str:
    return "".join(rng.choices(_LETTERS, k=rng.randint(1, 8)))


def _broken(rng: random.Random) -> str:
    """A story without its question, a question without its story, or two that do not belong together."""
    told, asked = rng.sample([family for family in FAMILIES.values() if family.name != "hop"], 2)
    question = draw(told, rng.randint(1, TRAINED_STEPS), Split.TRAIN, rng)
    story, closing = question.text[: question.labels[-1][0]], rng.choice(asked.closings)
    return rng.choice((story, closing.strip(), story + closing))
