"""Token documents as rows of one length: nothing is padded, cut off or repeated.

A document that does not fit continues in the next row. Labels are shifted already: the label of a position is the
token after it, or ``IGNORED`` where that token belongs to another document or to a prompt. T is the row length.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["I32", "IGNORED", "PackedRow", "TokenDocument", "pack"]

IGNORED = -100  # label of a position that teaches nothing

I32 = NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class TokenDocument:
    """Ids of one document and their labels; both have its length."""

    ids: I32
    labels: I32

    @classmethod
    def labelled(cls, ids: I32, n_prompt: int) -> "TokenDocument":
        """A document whose first ``n_prompt`` tokens are given and not learned."""
        labels = np.full_like(ids, IGNORED)
        first = max(n_prompt, 1)  # the first token has none before it that could predict it
        labels[first - 1 : -1] = ids[first:]
        return cls(ids, labels)


@dataclass(frozen=True, slots=True, eq=False)
class PackedRow:
    """One row of a batch.

    Attributes:
        ids: int32 [T].
        labels: int32 [T], the next token or ``IGNORED``.
        documents: int32 [T], which document of this row a position belongs to, counted from 0.
    """

    ids: I32
    labels: I32
    documents: I32


def pack(documents: Iterable[TokenDocument], n_tokens: int, done: int = 0) -> Iterator[tuple[PackedRow, int]]:
    """Fill rows of ``n_tokens`` one after another; what is left at the end and fills no row is not given.

    Args:
        done: tokens of the first document that earlier rows hold.
    Returns:
        Each row with ``done`` of the last document drawn, 0 if the row ends with it.
    """
    pieces: list[TokenDocument] = []
    room = n_tokens
    for document in documents:
        while done < len(document.ids):
            piece = TokenDocument(document.ids[done : done + room], document.labels[done : done + room])
            pieces.append(piece)
            done += len(piece.ids)
            room -= len(piece.ids)
            if room == 0:
                yield _row(pieces), done % len(document.ids)
                pieces, room = [], n_tokens
        done = 0


def _row(pieces: list[TokenDocument]) -> PackedRow:
    return PackedRow(
        np.concatenate([piece.ids for piece in pieces]),
        np.concatenate([piece.labels for piece in pieces]),
        np.repeat(np.arange(len(pieces), dtype=np.int32), [len(piece.ids) for piece in pieces]),
    )
