"""From what a caller passes as a prompt to token ids: text, chat messages, or ids."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from localdepth.chat import ChatTemplate
from localdepth.errors import PromptError
from localdepth.record import TokenizerRecord
from localdepth.tokenizer import Tokenizer

__all__ = ["Prompt", "PromptReader", "Reading", "build_tokenizer"]

_DIGIT = 0xF8E0  # private-use characters stand for the digits of a mark
_MARK = re.compile("\uf8f0[\uf8e0-\uf8e9]+\uf8f1")

Prompt = str | Sequence[Mapping[str, str]] | Sequence[int]


@dataclass(frozen=True, slots=True)
class Reading:
    """A prompt as the model sees it, and as people do (empty where ids were passed)."""

    ids: tuple[int, ...]
    text: str


def build_tokenizer(record: TokenizerRecord, n_vocab: int) -> Tokenizer:
    """The tokenizer that a model file's record describes.

    Raises:
        ModelFileError: when it is damaged, hostile, or does not fit the model.
    """
    return Tokenizer.from_json(record.json, n_vocab=n_vocab, bos=record.bos, eos=record.eos, add_bos=record.add_bos)


class PromptReader:
    """Tokenizer and chat template of one model file; both may be missing.

    Text is taken as one user message where the file has a chat template, else as it is.
    """

    def __init__(self, record: TokenizerRecord | None, n_vocab: int) -> None:
        self.tokenizer: Tokenizer | None = None
        self.template: ChatTemplate | None = None
        self._n_vocab = n_vocab
        if record is None:
            return
        self.tokenizer = build_tokenizer(record, n_vocab)
        names = filter(None, self.tokenizer.control_names)
        # a mark of the user's own is hidden too, so that it cannot stand for another
        self._hidden = re.compile("|".join((_MARK.pattern, *map(re.escape, names))))
        if record.chat_template is not None:
            bos = "" if record.bos is None else self.tokenizer.token(record.bos)
            eos = self.tokenizer.token(record.eos[0]) if record.eos else ""
            self.template = ChatTemplate(record.chat_template, bos=bos, eos=eos)

    def read(self, prompt: Prompt) -> Reading:
        """Ids of a prompt.

        Raises:
            PromptError: empty, of a type or with ids we cannot use, or text for a file without tokenizer.
            TemplateError: the file's chat template fails on these messages.
        """
        if isinstance(prompt, str):
            return self._read_text(prompt)
        if isinstance(prompt, Mapping | bytes) or not isinstance(prompt, Sequence | np.ndarray):
            raise PromptError(
                f"a prompt is text, a list of messages or a list of token ids, not {type(prompt).__name__}"
            )
        if isinstance(prompt, np.ndarray) and prompt.ndim == 0:
            raise PromptError(f"a prompt of token ids is a flat list, not the single number {prompt!r}")
        if len(prompt) == 0:
            raise PromptError("the prompt is empty; pass at least one token, message or character")
        if all(isinstance(item, Mapping) for item in prompt):
            return self._read_messages(list(prompt))  # type: ignore[arg-type]  # checked above
        return Reading(tuple(self._id(item) for item in prompt), "")

    def tokenize(self, text: str) -> list[int]:
        """Ids of plain text, without any template.

        Raises:
            PromptError: the file has no tokenizer.
        """
        return self._need_tokenizer().encode(text)

    def token_text(self, token_id: int) -> str:
        """What a token adds to a text; part of a character shows as U+FFFD.

        Raises:
            PromptError: the file has no tokenizer, or the id is outside the vocabulary.
        """
        return self._need_tokenizer().pieces(token_id)[1].decode("utf-8", "replace")

    def _read_text(self, text: str) -> Reading:
        if not text.strip():
            raise PromptError("the prompt is empty; ask something")
        if self.template is not None:
            return self._read_messages([{"role": "user", "content": text}])
        return Reading(tuple(self.tokenize(text)), text)

    def _read_messages(self, messages: Sequence[Mapping[str, str]]) -> Reading:
        tokenizer = self._need_tokenizer()
        if self.template is None:
            raise PromptError("this model file has no chat template; pass the prompt as text or token ids")
        veil = _Veil(self._hidden)
        rendered = self.template.render(
            [{**message, "content": veil.hide(message.get("content"))} for message in messages]
        )
        spoken = "\n".join(str(message.get("content", "")) for message in messages)
        return Reading(tuple(tokenizer.encode_parts(veil.parts(rendered))), spoken)

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise PromptError(
                "this model file has no tokenizer, so it takes token ids, from Python: model.generate([1, 2, 3]); "
                "to ask in text, put tokenizer.json into the checkpoint and export again"
            )
        return self.tokenizer

    def _id(self, item: Any) -> int:
        if isinstance(item, bool) or not isinstance(item, int | np.integer):
            raise PromptError(f"token id {item!r} is not a whole number; a list prompt holds only ids or only messages")
        if not 0 <= item < self._n_vocab:
            raise PromptError(f"token id {item} is outside 0..{self._n_vocab - 1}, the vocabulary of this model")
        return int(item)


class _Veil:
    """Keeps the names of control tokens inside messages from becoming these tokens.

    Before a template sees a message, each such name is replaced by a mark of private-use characters; afterwards the
    rendered text is cut at the marks, and the names are encoded as the plain text they are.
    """

    def __init__(self, hidden: "re.Pattern[str]") -> None:
        self._pattern = hidden
        self._hidden: list[str] = []

    def hide(self, content: Any) -> Any:
        """The message with marks; what is no text is left for the template to judge."""
        return self._pattern.sub(self._mark, content) if isinstance(content, str) else content

    def parts(self, rendered: str) -> list[tuple[str, bool]]:
        """Pieces of the rendered text, and whether names of control tokens count in them."""
        parts: list[tuple[str, bool]] = []
        end = 0
        for mark in _MARK.finditer(rendered):
            if (number := _number(mark.group())) < len(self._hidden):
                parts += [(rendered[end : mark.start()], True), (self._hidden[number], False)]
                end = mark.end()
        return [(text, special) for text, special in (*parts, (rendered[end:], True)) if text]

    def _mark(self, name: "re.Match[str]") -> str:
        self._hidden.append(name.group())
        digits = "".join(chr(_DIGIT + int(d)) for d in str(len(self._hidden) - 1))
        return f"\uf8f0{digits}\uf8f1"


def _number(mark: str) -> int:
    return int("".join(str(ord(char) - _DIGIT) for char in mark[1:-1]))
