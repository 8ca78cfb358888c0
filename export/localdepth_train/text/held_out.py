"""Documents that are never trained on, as a fixed list of rows."""

from collections.abc import Iterator
from itertools import islice

import numpy as np

from localdepth.errors import TrainError
from localdepth_train.text.documents import BadRow, Document, is_held_out
from localdepth_train.text.encoding import DocumentTokenizer
from localdepth_train.text.packing import IGNORED, PackedRow, TokenDocument, pack
from localdepth_train.text.settings import OnBadRow, SourceRecipe, TextRecipe
from localdepth_train.text.shuffling import part_order, refuse
from localdepth_train.text.sources import open_source

__all__ = ["held_out_rows"]


def held_out_rows(recipe: TextRecipe, tokenizer: DocumentTokenizer) -> list[PackedRow]:
    """Rows of at most ``recipe.held_out_documents`` held-out documents, equally many of every source that has them.

    They depend on neither seed nor process. The last row is filled up with eos that no label asks for.

    Raises:
        TrainError: when a source cannot be read, or no document is held out.
    """
    n_each = -(-recipe.held_out_documents // len(recipe.sources))
    chosen = [document for source in recipe.sources for document in islice(_kept(source, recipe), n_each)]
    if not chosen:
        raise TrainError(
            f"held_out_one_in={recipe.held_out_one_in} keeps no document for evaluation; "
            "give a smaller number of at least 2"
        )
    documents = tokenizer.encode(chosen[: recipe.held_out_documents])
    n_missing = -sum(len(document.ids) for document in documents) % recipe.n_tokens
    filler = TokenDocument(np.full(n_missing, tokenizer.eos, np.int32), np.full(n_missing, IGNORED, np.int32))
    return [row for row, _ in pack([*documents, filler], recipe.n_tokens)]


def _kept(source: SourceRecipe, recipe: TextRecipe) -> Iterator[Document]:
    """Held-out documents of one source, its parts in an order that favours no name."""
    opened = open_source(source)
    for part in part_order("held out", opened.n_parts):
        for item in opened.read(part, 0):
            if isinstance(item, BadRow):
                if recipe.on_bad_row is OnBadRow.STOP:
                    refuse(item)
            elif not item.is_blank and is_held_out(item, recipe.held_out_one_in):
                yield item
