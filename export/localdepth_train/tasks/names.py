"""Names that mean nothing to an answer: known ones and invented ones, some of which training never shows."""

import random
from functools import lru_cache
from hashlib import blake2b

__all__ = ["is_held_out", "pick_name"]

_KNOWN_TEXT = """
Ada Alan Alice Amir Anita Anton Bella Boris Carla Carlos Chen Clara Daria David Diego Elena Emil Emma Farid Felix
Fiona Grace Greta Hana Hugo Igor Ines Irene Ivan Jack Jana Jonas Julia Kenji Lara Lena Lila Lucas Luis Marco Maria
Maya Mei Nadia Nina Noah Nora Olga Omar Oscar Paula Pedro Petra Priya Raj Rosa Ruth Samir Sara Simon Sofia Tara Theo
Tina Uma Vera Victor Wanda Yara Yusuf Zoe
"""
_KNOWN = tuple(_KNOWN_TEXT.split())
_BEGINNINGS = (*"bcdfghjklmnprstvwyz", "br", "ch", "dr", "fl", "gl", "kr", "pr", "qu", "sh", "st", "tr")
_MIDDLES = (*"aeiouy", "ai", "ea", "ou")
_ENDS = ("", "", "l", "n", "r", "s", "k", "m", "nd", "x")
_KNOWN_SHARE = 0.4
_HELD_OUT_ONE_IN = 5


@lru_cache(maxsize=1 << 16)
def is_held_out(name: str) -> bool:
    """Whether training must not show ``name``; the same on every machine."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big") % _HELD_OUT_ONE_IN == 0


def pick_name(rng: random.Random, *, held_out: bool) -> str:
    """A name of one side of the split."""
    while True:
        name = rng.choice(_KNOWN) if rng.random() < _KNOWN_SHARE else _invented(rng)
        if is_held_out(name) is held_out:
            return name


def _invented(rng: random.Random) -> str:
    syllables = (rng.choice(_BEGINNINGS) + rng.choice(_MIDDLES) for _ in range(rng.choice((1, 2, 2, 3))))
    return ("".join(syllables) + rng.choice(_ENDS)).capitalize()
