"""Text to token ids and back, and the stop strings of a stream.

A tokenizer comes from the model file as Hugging Face JSON and is not trusted. Decoding is defined on bytes: every
token stands for fixed bytes (other ones if it opens the text, because some decoders strip a leading space), their
concatenation is UTF-8, and bytes that are no UTF-8 become U+FFFD, one for each maximal broken part as the Unicode
standard advises. So a stream needs no look-back and joined pushes always equal ``decode``.
"""

import codecs
import json
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import tokenizers

from localdepth.errors import LocalDepthError, ModelFileError, PromptError, SamplingError
from localdepth.tokenizer_limits import MAX_JSON_CHARS, limited

__all__ = ["StopStrings", "TextDecoder", "Tokenizer"]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """The vocabulary of one model and its rules. Safe to share between threads.

    Attributes:
        n_vocab: rows of the model's embedding; the file may name fewer tokens.
        bos: id put before every text when ``add_bos``.
    """

    def __init__(
        self, library: tokenizers.Tokenizer, *, n_vocab: int, bos: int | None, eos: tuple[int, ...], add_bos: bool
    ) -> None:
        """Take over a checked tokenizer; ``from_json`` is the way in."""
        self.n_vocab = n_vocab
        self.bos = bos
        self._eos = frozenset(eos)
        self._add_bos = add_bos
        self._library = library
        self._lock = threading.Lock()  # encode_special_tokens is state of the library's object
        self._pieces: dict[int, tuple[bytes, bytes]] = {}
        self._control = frozenset(i for i, token in library.get_added_tokens_decoder().items() if token.special)

    @classmethod
    def from_json(cls, text: str, *, n_vocab: int, bos: int | None, eos: tuple[int, ...], add_bos: bool) -> "Tokenizer":
        """Read a ``tokenizer.json``.

        Args:
            text: the whole file.
            n_vocab: rows of the embedding; no id may reach it.
            bos, eos: id that begins a text, ids that end an answer.
            add_bos: whether ``encode`` begins with ``bos``.
        Raises:
            ModelFileError: when the JSON is damaged, hostile, not streamable, or does not fit the model.
        """
        if len(text) > MAX_JSON_CHARS:
            raise ModelFileError(
                f"tokenizer of {len(text)} characters is over {MAX_JSON_CHARS}; export the model again"
            )
        with _library_errors(ModelFileError, "the file's tokenizer cannot be read; export the model again"):
            library = tokenizers.Tokenizer.from_str(json.dumps(limited(json.loads(text), n_vocab)))
            ids = library.get_vocab().values()
        if not ids or max(ids) >= n_vocab:
            raise ModelFileError(
                f"tokenizer ids up to {max(ids, default=None)} do not fit a model of {n_vocab} tokens; "
                "export the model again with its own tokenizer"
            )
        for name, token_id in (("bos", bos), *(("eos", i) for i in eos)):
            if token_id is not None and not 0 <= token_id < n_vocab:
                raise ModelFileError(f"{name}={token_id} is outside 0..{n_vocab - 1}; export the model again")
        if add_bos and bos is None:
            raise ModelFileError("the tokenizer adds a bos token but the file names none; export the model again")
        return cls(library, n_vocab=n_vocab, bos=bos, eos=eos, add_bos=add_bos)

    @property
    def control_names(self) -> tuple[str, ...]:
        """Spellings of the control tokens, the longest first."""
        return tuple(sorted(map(self.token, self._control), key=len, reverse=True))

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of ``text``, with ``bos`` before them if the model wants it and they lack it.

        Args:
            text: any Unicode text.
            special: read the names of control tokens as these tokens, as a rendered chat template needs; otherwise
                they are plain text, so that a user cannot forge the end of a turn.
        Raises:
            PromptError: when ``text`` is no Unicode text, or this tokenizer has no ids for it.
        """
        return self.encode_parts([(text, special)])

    def encode_parts(self, parts: Sequence[tuple[str, bool]]) -> list[int]:
        """Token ids of texts in a row, each with its own ``special``; otherwise as ``encode``."""
        ids = [token_id for text, special in parts for token_id in self._encode(text, special)]
        if self._add_bos and self.bos is not None and ids[:1] != [self.bos]:
            return [self.bos, *ids]
        return ids

    def _encode(self, text: str, special: bool) -> list[int]:
        if not isinstance(text, str):
            raise PromptError(f"a text of type {type(text).__name__} cannot be encoded; pass a str")
        _check_unicode(text)
        with self._lock, _library_errors(PromptError, "the tokenizer has no ids for this text; reword it"):
            self._library.encode_special_tokens = not special
            ids: list[int] = self._library.encode(text, add_special_tokens=False).ids
        if not special:
            self._refuse_forged(text, ids)
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of ``ids``; control tokens are left out unless ``skip_special`` is false.

        Raises:
            PromptError: for an id outside the vocabulary.
        """
        decoder = self.decoder(skip_special=skip_special)
        return "".join(map(decoder.push, ids)) + decoder.flush()

    def decoder(self, *, skip_special: bool = True) -> "TextDecoder":
        """A decoder for one stream of ids."""
        return TextDecoder(self, skip_special=skip_special)

    def is_eos(self, token_id: int) -> bool:
        """Whether this token ends an answer."""
        return token_id in self._eos

    def is_control(self, token_id: int) -> bool:
        """Whether this token steers the model and is no text."""
        return token_id in self._control

    def token(self, token_id: int) -> str:
        """The token as the vocabulary spells it; empty where the vocabulary has a hole.

        Raises:
            PromptError: for an id outside the vocabulary.
        """
        if not 0 <= token_id < self.n_vocab:
            raise PromptError(f"token id {token_id} is outside 0..{self.n_vocab - 1}; use ids of this model")
        return self._library.id_to_token(token_id) or ""

    def pieces(self, token_id: int) -> tuple[bytes, bytes]:
        """Bytes the token adds to a text: as its first token, and anywhere later.

        Raises:
            PromptError: for an id outside the vocabulary.
            ModelFileError: when the file's decoder fails on it.
        """
        found = self._pieces.get(token_id)
        if found is None:
            found = self._pieces[token_id] = self._read_pieces(token_id)
        return found

    def _read_pieces(self, token_id: int) -> tuple[bytes, bytes]:
        name = self.token(token_id)
        with self._lock, _library_errors(ModelFileError, f"the file's tokenizer cannot decode {name!r}"):
            alone = self._library.decode([token_id], skip_special_tokens=False)
            twice = self._library.decode([token_id, token_id], skip_special_tokens=False)
        if "\ufffd" in alone:  # part of a character: only the token's name has the bytes
            raw = _bytes_of_name(name)
            return raw, raw
        return alone.encode(), twice[len(alone) :].encode()

    def _refuse_forged(self, text: str, ids: list[int]) -> None:
        # Vocabularies of whole words (WordLevel, Unigram) may spell a control token themselves.
        for token_id in self._control.intersection(ids):
            if (name := self.token(token_id)).casefold() in text.casefold():
                raise PromptError(f"the text contains {name!r}, which is a control token here; remove it")


class TextDecoder:
    """Decodes one stream of ids as they arrive, in constant time for each."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        """Start an empty text. ``skip_special`` leaves control tokens out."""
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._started = False

    def push(self, token_id: int) -> str:
        """Text completed by this token; at most three bytes of an unfinished character stay behind.

        Raises:
            PromptError: for an id outside the vocabulary.
        """
        if self._skip_special and self._tokenizer.is_control(token_id):
            return ""
        first, later = self._tokenizer.pieces(token_id)
        piece = later if self._started else first
        self._started = self._started or bool(later)
        return self._utf8.decode(piece)

    def flush(self) -> str:
        """What is left at the end of the stream: U+FFFD for an unfinished character."""
        return self._utf8.decode(b"", final=True)


class StopStrings:
    """Finds the first stop string of a stream, however it is cut into pushes.

    The first is the one whose last character comes first; of several ending there, the longest. Text before it is
    passed on, it and everything behind it are not. Held back is only a tail that may be the beginning of a stop string.
    Source: Knuth, Morris, Pratt 1977, one automaton for each stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Watch for ``stops``.

        Raises:
            SamplingError: unless ``stops`` is a sequence of strings that are not empty.
        """
        listed = isinstance(stops, Sequence) and not isinstance(stops, str)
        if not listed or not all(isinstance(stop, str) and stop for stop in stops):
            raise SamplingError(f'stop={stops!r} must be a list of strings that are not empty, such as stop=["\\n"]')
        self._stops = tuple(stops)
        self._borders = tuple(_borders(stop) for stop in stops)
        self._matched = [0] * len(stops)  # of each stop string, how much the text now ends with
        self._held = ""
        self._hit = False

    def push(self, text: str) -> tuple[str, bool]:
        """Text that is safe to show, and whether a stop string has been found by now."""
        if self._hit:
            return "", True
        pending = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            if length := self._advance(char):
                self._hit, self._held = True, ""
                return pending[: end - length], True
        safe = len(pending) - max(self._matched, default=0)
        self._held = pending[safe:]
        return pending[:safe], False

    def flush(self) -> str:
        """The held tail, once the stream has ended without completing a stop string."""
        held, self._held = self._held, ""
        return held

    def _advance(self, char: str) -> int:
        """Feed one character; the length of the longest stop string that ends with it, else 0."""
        found = 0
        for i, stop in enumerate(self._stops):
            n = self._matched[i]
            while n and stop[n] != char:
                n = self._borders[i][n - 1]
            self._matched[i] = n = n + (stop[n] == char)
            if n == len(stop):
                found = max(found, n)
        return found


def _borders(stop: str) -> list[int]:
    """For each prefix of ``stop``, the length of its longest proper prefix that is also its suffix."""
    borders = [0]
    for char in stop[1:]:
        n = borders[-1]
        while n and stop[n] != char:
            n = borders[n - 1]
        borders.append(n + (stop[n] == char))
    return borders


def _byte_alphabet() -> dict[str, int]:
    """The characters that stand for bytes in byte-level vocabularies. Source: GPT-2, ``bytes_to_unicode``."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _bytes_of_name(name: str) -> bytes:
    if match := _BYTE_TOKEN.fullmatch(name):
        return bytes.fromhex(match[1])
    if all(char in _BYTE_OF for char in name):
        return bytes(_BYTE_OF[char] for char in name)
    return name.encode()


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"the text has the lone surrogate {text[error.start]!r} at {error.start}, which is no Unicode character; "
            "read it as UTF-8"
        ) from None


@contextmanager
def _library_errors(kind: type[LocalDepthError], message: str) -> Iterator[None]:
    """Turn any failure of the tokenizers library into ``kind``; our own errors pass."""
    try:
        yield
    except LocalDepthError:
        raise
    except Exception as error:
        raise kind(f"{message} ({error})") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # a Rust panic, whose class cannot be imported
            raise
        raise kind(f"{message} ({error})") from error
