"""Documents of one source, epoch after epoch, each in another order that only the seed decides.

The order of the parts is drawn for each epoch. Documents are read in blocks of ``buffer`` and shuffled within a
block, so a place in the order is a handful of numbers, and to return to it only one block has to be read again.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from localdepth.errors import TrainError
from localdepth_train.text.documents import BadRow, Document
from localdepth_train.text.settings import OnBadRow
from localdepth_train.text.sources import Source

__all__ = ["Position", "ShuffledDocuments", "part_order", "refuse"]

_BLOCK_CHARS = 1 << 25  # a block ends early where documents are long
_GROUP_CHARS = 1 << 20  # and so does what is shown of it


@dataclass(frozen=True, slots=True)
class Position:
    """A place in the endless order: where a block begins, and how much of it is behind.

    Attributes:
        part, row: in the epoch's order of parts, and within that part.
        taken: documents of the block that were taken.
        skipped: bad rows passed over before the block, in all epochs.
    """

    epoch: int = 0
    part: int = 0
    row: int = 0
    taken: int = 0
    skipped: int = 0


class ShuffledDocuments:
    """The endless order of one source's documents."""

    def __init__(
        self, name: str, source: Source, seed: str, buffer: int, wanted: Callable[[Document], bool], on_bad: OnBadRow
    ) -> None:
        """Begin at the beginning; documents that are not ``wanted`` are left out. ``name`` is for messages."""
        self._name = name
        self._source = source
        self._seed = seed
        self._buffer = buffer
        self._wanted = wanted
        self._on_bad = on_bad
        self.seek(Position())

    @property
    def position(self) -> Position:
        """Where the next document lies."""
        return replace(self._start, taken=self._taken) if self._taken < len(self._block) else self._next

    @property
    def skipped(self) -> int:
        """Bad rows passed over so far, counted again in every epoch."""
        return self._next.skipped

    def seek(self, position: Position) -> None:
        """Go to a place that ``position`` has given.

        Raises:
            TrainError: when the source no longer has that place.
        """
        self._start = self._next = replace(position, taken=0)
        self._rows: Iterator[tuple[int, int, Document | BadRow]] | None = None
        self._block: list[Document] = []
        self._taken = 0
        if position.taken:
            self._fill()
            if position.taken >= len(self._block):
                raise TrainError(f"{self._name} has changed: {position} is not in it; start over in a new folder")
            self._taken = position.taken

    def upcoming(self, n: int) -> list[Document]:
        """The next documents: one at least, ``n`` at most, fewer where they are long or the block ends.

        Raises:
            TrainError: for a bad row that is not to be skipped, a part that cannot be read, or an empty source.
        """
        while self._taken == len(self._block):
            self._fill()
        shown: list[Document] = []
        n_chars = 0
        for document in self._block[self._taken : self._taken + n]:
            n_chars += document.n_chars
            if shown and n_chars > _GROUP_CHARS:
                break
            shown.append(document)
        return shown

    def advance(self) -> None:
        """Leave one document of those ``upcoming`` behind."""
        assert self._taken < len(self._block)
        self._taken += 1

    def _fill(self) -> None:
        """Read the next block. If that fails, the next try begins with the same row."""
        start = self._next
        rows = self._rows or self._read(start)
        self._rows = None
        block: list[Document] = []
        n_chars, skipped = 0, start.skipped
        following = Position(start.epoch + 1)
        for part, row, item in rows:
            if isinstance(item, BadRow):
                if self._on_bad is OnBadRow.STOP:
                    refuse(item)
                skipped += 1
            elif not item.is_blank and self._wanted(item):
                block.append(item)
                n_chars += item.n_chars
                if len(block) == self._buffer or n_chars >= _BLOCK_CHARS:
                    following, self._rows = Position(start.epoch, part, row + 1), rows
                    break
        if not block and not (start.part or start.row):
            raise TrainError(f"{self._name} has no document to train on ({skipped - start.skipped} bad rows)")
        random.Random(f"{self._seed} {start.epoch} {start.part} {start.row}").shuffle(block)
        self._start, self._block, self._taken = start, block, 0
        self._next = replace(following, skipped=skipped)

    def _read(self, start: Position) -> Iterator[tuple[int, int, Document | BadRow]]:
        """(part, row, what is there) from ``start`` to the end of its epoch."""
        order = part_order(f"{self._seed} {start.epoch}", self._source.n_parts)
        for part in range(start.part, len(order)):
            skip = start.row if part == start.part else 0
            for row, item in enumerate(self._source.read(order[part], skip), skip):
                yield part, row, item


def part_order(seed: str, n_parts: int) -> list[int]:
    """Indices of all parts in the order that ``seed`` gives."""
    order = list(range(n_parts))
    random.Random(seed).shuffle(order)
    return order


def refuse(row: BadRow) -> None:
    """Stop at a bad row.

    Raises:
        TrainError: always.
    """
    raise TrainError(
        f'{row.place} {row.reason}; pass over such rows with on_bad_row = "skip" in [phases.text] and go on, or mend '
        "the file and start over"
    )
