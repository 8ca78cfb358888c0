"""The text stream of a training run: settings in, packed rows out, without end."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from typing import Any

from localdepth.errors import TrainError
from localdepth_train.text.documents import Document, is_held_out
from localdepth_train.text.encoding import DocumentTokenizer
from localdepth_train.text.mixture import Ingredient, Mark, Mixture
from localdepth_train.text.packing import PackedRow, pack
from localdepth_train.text.settings import TextRecipe
from localdepth_train.text.shuffling import Position, ShuffledDocuments
from localdepth_train.text.sources import open_source

__all__ = ["TextStream"]

_NOT_DECIDING = ("held_out_documents", "on_bad_row", "isolate")


class TextStream(Iterator[PackedRow]):
    """Rows of ``recipe.n_tokens`` tokens. Not safe to share between threads.

    Of ``world`` processes, process ``rank`` gets the rows rank, rank + world, ... of the one order that a single
    process sees. Each prepares all rows, so a state means the same in every process, and in another number of them.
    """

    def __init__(
        self, recipe: TextRecipe, tokenizer: DocumentTokenizer, *, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        """Open all sources and stand before the first row.

        Raises:
            TrainError: for a source that cannot be opened, or a rank that does not exist.
            MissingExtra: when a source needs a library that is not installed.
        """
        if not 0 <= rank < world:
            raise TrainError(f"rank={rank} is outside 0..{world - 1}")
        self._rank, self._world = rank, world
        self._n_tokens = recipe.n_tokens
        sources = [open_source(source) for source in recipe.sources]
        self._identity = {"seed": seed, "settings": _digest(_deciding(recipe)), "tokenizer": tokenizer.identity}
        for what in dict.fromkeys(what for source in sources for what in source.identity):
            self._identity[what] = _digest([source.identity.get(what) for source in sources])

        def wanted(document: Document) -> bool:
            return not is_held_out(document, recipe.held_out_one_in)

        self._documents = {
            f"{source.path} (source {i + 1})": ShuffledDocuments(
                source.path, opened, f"{seed} {i}", recipe.shuffle_buffer, wanted, recipe.on_bad_row
            )
            for i, (source, opened) in enumerate(zip(recipe.sources, sources, strict=True))
        }
        self._mixture = Mixture(
            [
                Ingredient(documents, tokenizer, source.weight)
                for source, documents in zip(recipe.sources, self._documents.values(), strict=True)
            ]
        )
        self._begin(self._mixture.marks(before_last=False), done=0)

    def __next__(self) -> PackedRow:
        """The next row of this rank.

        Raises:
            TrainError: for a bad row or a part that cannot be read. The stream is over then; ``state`` stays good.
        """
        rows = [next(self._rows) for _ in range(self._world)]
        row, self._done = rows[self._rank][0], rows[-1][1]
        self._marks = self._mixture.marks(before_last=self._done > 0)
        return row

    @property
    def skipped(self) -> dict[str, int]:
        """Bad rows passed over so far, by source, counted again in every epoch."""
        return {name: documents.skipped for name, documents in self._documents.items()}

    @property
    def epochs(self) -> dict[str, int]:
        """Times each source has been given to its end."""
        names = zip(self._documents, self._marks, strict=True)
        return {name: mark.position.epoch for name, mark in names}

    def state(self) -> dict[str, Any]:
        """Everything it takes to go on after the last row given, as JSON."""
        return {"identity": self._identity, "done": self._done, "sources": [asdict(mark) for mark in self._marks]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to where ``state`` was taken; the same rows follow.

        Raises:
            TrainError: when it is no state, or one of other settings, another tokenizer or changed files.
        """
        try:
            self._check_identity(state["identity"])
            marks = tuple(_mark(record) for record in state["sources"])
            self._mixture.seek(marks)
            self._begin(marks, _count(state["done"]))
        except (KeyError, TypeError, ValueError) as error:
            raise TrainError(
                f"the saved place in the text is damaged: {error!r}; start over in a new folder"
            ) from error

    def _check_identity(self, saved: Mapping[str, Any]) -> None:
        saved, now = dict(saved), self._identity
        if differing := [what for what in {**now, **saved} if now.get(what) != saved.get(what)]:
            raise TrainError(
                f"the saved place belongs to other text; what differs: {', '.join(differing)}; bring back what was "
                "there, or start over in a new folder"
            )

    def _begin(self, marks: tuple[Mark, ...], done: int) -> None:
        self._marks, self._done = marks, done
        self._rows: Iterator[tuple[PackedRow, int]] = pack(self._mixture, self._n_tokens, done)


def _mark(record: Mapping[str, Any]) -> Mark:
    position = record["position"]
    return Mark(
        Position(**{item.name: _count(position[item.name]) for item in fields(Position)}), _count(record["tokens"])
    )


def _deciding(recipe: TextRecipe) -> dict[str, Any]:
    """The settings that decide the rows; files may move, and a run that met a bad row may go on by skipping it."""
    settings = {key: value for key, value in asdict(recipe).items() if key not in _NOT_DECIDING}
    return {**settings, "sources": [{**source, "path": ""} for source in settings["sources"]]}


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()
