"""One text to train on, and the rule by which a row of a file is one."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from localdepth_train.text.settings import PROMPT, SourceRecipe

__all__ = ["MAX_BYTES", "BadRow", "Document", "document_from", "is_held_out"]

MAX_BYTES = 4 << 20  # of one row: a tokenizer needs up to some 200 bytes for each


@dataclass(frozen=True, slots=True)
class Document:
    """A text, after a prompt if it answers one.

    ``frame`` is what the recipe puts before and after the prompt; control tokens may be named there.
    """

    text: str
    prompt: str = ""
    frame: tuple[str, str] = ("", "")

    @property
    def n_chars(self) -> int:
        """Size of text and prompt together."""
        return len(self.text) + len(self.prompt)

    @property
    def is_blank(self) -> bool:
        """Whether there is nothing to learn; such rows are passed over, as blank lines are."""
        return not self.text or self.text.isspace()


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that is no document: where it is and what is wrong with it."""

    place: str
    reason: str


def document_from(record: object, source: SourceRecipe, place: str) -> Document | BadRow:
    """The document that a row of ``source`` holds."""
    if not isinstance(record, Mapping):
        return BadRow(place, f"holds {type(record).__name__}, not an object with fields")
    for name in source.columns:
        if name not in record:
            return BadRow(place, f"has no field {name!r}, only {', '.join(map(str, record)) or 'none at all'}")
        if reason := _fault(record[name]):
            return BadRow(place, f"has a field {name!r} that {reason}")
    if source.prompt_field:
        if empty := [name for name in source.columns if not record[name].strip()]:
            return BadRow(place, f"has a field {empty[0]!r} that is empty")
        before, after = source.prompt_format.split(PROMPT)
        return Document(record[source.answer_field], record[source.prompt_field], (before, after))
    return Document(record[source.field])


def is_held_out(document: Document, one_in: int) -> bool:
    """Whether evaluation keeps this document: a function of its text, so equal texts are all kept or all trained on.

    A question is chosen by its prompt, whatever the answer. ``one_in`` = 0 keeps nothing.
    """
    if one_in == 0:
        return False
    text = (document.prompt or document.text).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") % one_in == 0


def _fault(value: object) -> str:
    """Why a field is no text; empty where it is one."""
    if not isinstance(value, str):
        return f"is {type(value).__name__}, not text"
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        return "holds half of a surrogate pair, which is no character"
    return f"takes {size:,} bytes, over the limit of {MAX_BYTES:,}; split it" if size > MAX_BYTES else ""
