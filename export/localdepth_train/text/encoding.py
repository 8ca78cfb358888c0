"""Documents as tokens of the model that is trained."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from localdepth.errors import TrainError
from localdepth_train.checkpoint.special_tokens import special_tokens
from localdepth_train.text.documents import Document
from localdepth_train.text.packing import TokenDocument

__all__ = ["DocumentTokenizer"]

_SETTINGS = ("tokenizer_config.json", "generation_config.json")


class DocumentTokenizer:
    """Turns documents into token documents: bos if the model wants one, prompt, text, eos.

    Text is never read as the name of a control token; only the frame of a prompt is.

    Attributes:
        identity: equal for tokenizers that give the same tokens.
        eos: id after every document.
    """

    def __init__(self, text: str, *, bos: int | None, eos: int) -> None:
        """Take a ``tokenizer.json``; ``bos`` begins every document unless it is None.

        Raises:
            TrainError: when the library cannot read it.
        """
        self.eos = eos
        self.identity = hashlib.blake2b(f"{bos} {eos} {text}".encode(), digest_size=16).hexdigest()
        self._bos = [] if bos is None else [bos]
        self._plain, self._framed = _library(text), _library(text)
        self._plain.encode_special_tokens = True
        added = self._plain.get_added_tokens_decoder().values()
        self._controls = tuple(token.content for token in added if token.special)

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str], n_vocab: int) -> "DocumentTokenizer":
        """The tokenizer of a checkpoint, which begins and ends texts as the files beside it say.

        Args:
            n_vocab: rows of the model's embedding; no id may reach it.
        Raises:
            TrainError: when a file is missing or unreadable, names no eos, or does not fit the model.
        """
        path = Path(folder) / "tokenizer.json"
        text = _read(path)
        settings, generation = (_read(path.with_name(name), "{}") for name in _SETTINGS)
        named = special_tokens(_parse(path, text), _parse(path, settings), _parse(path, generation))
        if named.end_of_text is None:
            raise TrainError(f"{folder} names no eos token, which ends every document; add eos_token to {_SETTINGS[0]}")
        tokenizer = cls(text, bos=named.bos if named.add_bos else None, eos=named.end_of_text)
        largest = max((*tokenizer._plain.get_vocab().values(), *tokenizer._bos, tokenizer.eos))
        if largest >= n_vocab:
            raise TrainError(f"{path} has ids up to {largest}, the model {n_vocab} tokens; they do not belong together")
        return tokenizer

    def encode(self, documents: Sequence[Document]) -> list[TokenDocument]:
        """One token document for each document, in order."""
        with _library_errors("the tokenizer has no ids for a document"):
            texts = self._plain.encode_batch_fast([document.text for document in documents], add_special_tokens=False)
            return [self._document(self._given(d), e.ids) for d, e in zip(documents, texts, strict=True)]

    def _document(self, given: list[int], ids: list[int]) -> TokenDocument:
        return TokenDocument.labelled(np.array([*given, *ids, self.eos], np.int32), len(given))

    def _given(self, document: Document) -> list[int]:
        """What is not learned: bos and prompt."""
        if not document.prompt:
            return self._bos
        before, after = document.frame
        if any(name in document.prompt for name in self._controls):
            parts = [(self._framed, before), (self._plain, document.prompt), (self._framed, after)]
        else:
            parts = [(self._framed, before + document.prompt + after)]  # as a chat template's text is read
        ids = [i for library, text in parts for i in library.encode(text, add_special_tokens=False).ids]
        return ids if ids[:1] == self._bos else self._bos + ids


def _library(text: str) -> tokenizers.Tokenizer:
    with _library_errors("tokenizer.json cannot be read"):
        library = tokenizers.Tokenizer.from_str(text)
    library.no_truncation()  # which a file may ask for
    library.no_padding()
    return library


@contextmanager
def _library_errors(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the library raises nothing narrower
        raise TrainError(f"{what}: {error}; use the tokenizer that belongs to the model") from error


def _read(path: Path, missing: str | None = None) -> str:
    """A text file, or ``missing`` where there is none."""
    if missing is not None and not path.exists():
        return missing
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TrainError(f"cannot read {path}: {error}; a model learns text with its own tokenizer") from error


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TrainError(f"{path} or a file beside it is not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise TrainError(f"{path} or a file beside it must hold a JSON object, not {type(record).__name__}")
    return record
