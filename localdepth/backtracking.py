"""How much time a regular expression of a tokenizer can waste, told from its text.

The tokenizers library matches with Oniguruma, which tries every way in which the beginning of a pattern can match
before it gives up: a file could bring a pattern that takes minutes for a page of text. So the ways are counted first.
Those count that lie before something that may fail; what stands at the end of a pattern is matched in one go. A part
that is possessive or only looks ahead matches in one way, but reads on for as long, and so counts like any other.
Source: the Oniguruma syntax, doc/RE of github.com/kkos/oniguruma.
"""

import math
import re
from dataclasses import dataclass

__all__ = ["MANY", "count_ways"]

MANY = 1000.0  # ways of one repetition without an end: about the length of a line

_TOKEN = re.compile(
    r"(?P<foreign>\\[1-9kg]|\{\d+\}\?)|(?P<repeat>[*+?][?+]?|\{\d+\}|\{(?!,\})\d*,\d*\}\??)"
    r"|(?P<open>\((?:\?(?:<?[=!]|[>:]|<\w+>|[imWDSP-]+[:)]))?)|(?P<close>\))|(?P<either>\|)|(?P<class>\[)"
    r"|(?P<one>\\[pPxo]\{[^}]*\}|\\.|.)",
    re.DOTALL,
)
_INSIDE_CLASS = re.compile(r"\\.|\[:\^?\w+:\]|(?P<open>\[\^?\]?)|(?P<close>\])|.", re.DOTALL)


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of a pattern: in how many ways it can match, and how many are tried before it fails."""

    ways: float = 1.0
    tried: float = 1.0


def count_ways(pattern: str) -> float:
    """The most ways of matching that are tried at one place of a text; a simple repetition counts ``MANY``.

    Raises:
        ValueError: the pattern is no regular expression, or has back references, recursion or conditions.
        RecursionError: it is nested hundreds of levels deep.
    """
    reader = _Reader(pattern)
    part = reader.alternatives()
    if reader.position < len(pattern):
        raise ValueError("a bracket is closed that was never opened")
    return part.tried


class _Reader:
    """Reads a pattern from left to right."""

    def __init__(self, pattern: str) -> None:
        self.pattern, self.position = pattern, 0

    def alternatives(self) -> _Part:
        """What stands between two round brackets."""
        parts = [self._sequence()]
        while self._take("either"):
            parts.append(self._sequence())
        return _Part(sum(part.ways for part in parts), max(part.tried for part in parts))

    def _sequence(self) -> _Part:
        ways = tried = 1.0
        while (piece := self._piece()) is not None:
            part, low, high = piece
            # an optional part that fails is left out, any other sends the search back
            before = ways * _repeated(part.ways, low - 1, low - 1) if low else 1.0
            tried = max(tried, before * part.tried)
            ways *= _repeated(part.ways, low, high)
        return _Part(ways, tried)

    def _piece(self) -> tuple[_Part, int, float] | None:
        """An atom with the numbers of its repetitions, or None where a sequence ends."""
        part = self._atom()
        if part is None:
            return None
        low, high = 1, 1.0
        while repeat := self._take("repeat"):
            if (low, high) != (1, 1.0):  # repeated again
                part = _Part(_repeated(part.ways, low, high), part.tried)
            low, high = _bounds(repeat)
        return part, low, high

    def _atom(self) -> _Part | None:
        if self._take("one"):
            return _Part()
        if self._take("class"):
            self._skip_class()
            return _Part()
        if (bracket := self._take("open")) is None:
            if self._peek("repeat") or self._peek("foreign"):
                raise ValueError(f"{self.pattern[self.position : self.position + 10]!r} has no place in a tokenizer")
            return None
        inside = self.alternatives()
        if bracket[-1] == ")":  # options for the rest, which ends with the bracket around it
            return inside
        if not self._take("close"):
            raise ValueError("a bracket is not closed")
        return inside

    def _skip_class(self) -> None:
        """Go behind the end of a character class, which may hold others."""
        depth = 0
        for found in _INSIDE_CLASS.finditer(self.pattern, self.position - 1):
            depth += (found["open"] is not None) - (found["close"] is not None)
            if depth == 0:
                self.position = found.end()
                return
        raise ValueError("a character class is not closed")

    def _peek(self, kind: str) -> "re.Match[str] | None":
        found = _TOKEN.match(self.pattern, self.position)
        return found if found and found.lastgroup == kind else None

    def _take(self, kind: str) -> str | None:
        if found := self._peek(kind):
            self.position = found.end()
            return found.group()
        return None


def _bounds(repeat: str) -> tuple[int, float]:
    if repeat[0] != "{":
        return {"*": (0, math.inf), "+": (1, math.inf), "?": (0, 1.0)}[repeat[0]]
    low, comma, high = repeat.rstrip("?")[1:-1].partition(",")
    least = int(low or 0)
    most = (float(high) if high else math.inf) if comma else float(least)
    return min(least, int(min(most, 1e9))), max(least, most)  # Oniguruma swaps bounds that are the wrong way round


def _repeated(ways: float, low: int, high: float) -> float:
    """Ways of ``low`` to ``high`` repetitions of something that matches in ``ways``."""
    if ways == 1:
        return min(MANY, high - low + 1)
    return math.inf if high * math.log2(ways) > 100 else ways**high * (high - low + 1)
