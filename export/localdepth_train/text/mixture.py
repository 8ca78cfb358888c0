"""Documents of several sources by weight: weights are shares of tokens.

The source that is furthest behind its share goes next, so the shares are met to within a document at any time, and
the choice needs no chance and no memory beyond the tokens counted so far.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from localdepth_train.text.encoding import DocumentTokenizer
from localdepth_train.text.packing import TokenDocument
from localdepth_train.text.shuffling import Position, ShuffledDocuments

__all__ = ["Ingredient", "Mark", "Mixture"]

_GROUP = 64  # documents tokenised together, on as many threads as the tokenizer library takes


@dataclass(frozen=True, slots=True)
class Mark:
    """How far one source has been used."""

    position: Position
    tokens: int


class Ingredient:
    """One source's documents as tokens, and how many were used."""

    def __init__(self, documents: ShuffledDocuments, tokenizer: DocumentTokenizer, weight: float) -> None:
        self.documents = documents
        self._tokenizer = tokenizer
        self._weight = weight
        self._ahead: deque[TokenDocument] = deque()  # of documents that are still to be advanced over
        self._tokens = 0

    @property
    def mark(self) -> Mark:
        """Where the next document comes from."""
        return Mark(self.documents.position, self._tokens)

    @property
    def used(self) -> float:
        """Tokens given for each unit of weight."""
        return self._tokens / self._weight

    def seek(self, mark: Mark) -> None:
        """Go to where ``mark`` was taken."""
        self.documents.seek(mark.position)
        self._ahead.clear()
        self._tokens = mark.tokens

    def draw(self) -> TokenDocument:
        """The next document."""
        if not self._ahead:
            self._ahead.extend(self._tokenizer.encode(self.documents.upcoming(_GROUP)))
        document = self._ahead.popleft()
        self.documents.advance()
        self._tokens += len(document.ids)
        return document


class Mixture(Iterator[TokenDocument]):
    """An endless iterator over the documents of all sources."""

    def __init__(self, ingredients: Sequence[Ingredient]) -> None:
        self._ingredients = ingredients
        self._before = self._now()

    def __next__(self) -> TokenDocument:
        chosen = min(range(len(self._ingredients)), key=lambda i: (self._ingredients[i].used, i))
        self._before = self._now()
        return self._ingredients[chosen].draw()

    def marks(self, *, before_last: bool) -> tuple[Mark, ...]:
        """How far every source is, or was before the last document was drawn."""
        return self._before if before_last else self._now()

    def seek(self, marks: Sequence[Mark]) -> None:
        """Go to where ``marks`` were taken; the same documents follow."""
        for ingredient, mark in zip(self._ingredients, marks, strict=True):
            ingredient.seek(mark)
        self._before = self._now()

    def _now(self) -> tuple[Mark, ...]:
        return tuple(ingredient.mark for ingredient in self._ingredients)
