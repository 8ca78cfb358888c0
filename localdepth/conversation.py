"""A conversation: questions and answers in order, which can be taken back, asked again at another depth, and saved.

It is plain data without a model inside, so the next question may go to another one. A file with a chat template gets
the messages; one without continues the conversation as a text. When question and history outgrow the context, the
oldest exchanges are left out of the prompt, and ``Reply.n_forgotten`` says how many; they stay in the conversation.
"""

import json
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

from localdepth.config import ModelConfig
from localdepth.errors import ContextOverflow, DepthError, PromptError, RequestError
from localdepth.generate import Stats, Stream, Token
from localdepth.model import Model
from localdepth.policy.base import Decision, DepthPolicy
from localdepth.prompt import Prompt
from localdepth.sampling import GREEDY, Sampling

__all__ = ["INTERRUPTED", "Conversation", "Exchange", "Reply"]

INTERRUPTED = "interrupted"  # the finish reason of an answer that was stopped from outside


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """One question with its answer.

    Attributes:
        depth: the deepest depth used.
        chosen_by: who decided it.
        finish_reason: a ``FinishReason``, or "interrupted": the answer is what was said by then.
    """

    question: str
    answer: str
    depth: int
    chosen_by: str
    finish_reason: str


class Conversation:
    """Questions and answers, oldest first.

    Attributes:
        system: stands before them in every prompt; empty for none.
        exchanges: what was said; free to change between answers.
    """

    def __init__(self, system: str = "", exchanges: Iterable[Exchange] = ()) -> None:
        self.system = system
        self.exchanges = list(exchanges)
        self._first = 0  # the oldest exchange that prompts still hold

    def ask(
        self,
        model: Model,
        question: str,
        *,
        depth: int | str | DepthPolicy = "auto",
        sampling: Sampling = GREEDY,
        max_tokens: int = 256,
        stop: Sequence[str] = (),
        state_seed: int | None = None,
    ) -> "Reply":
        """Begin an answer; the conversation holds the exchange once the reply has been read or closed.

        The settings are those of ``Model.stream``.

        Raises:
            RequestError: as ``Model.stream``; ContextOverflow only where the question does not fit even alone.
        """
        if not question.strip():
            raise PromptError("the question is empty; write at least one character")
        return self._begin(model, question, len(self.exchanges), depth, sampling, max_tokens, stop, state_seed)

    def again(
        self,
        model: Model,
        *,
        depth: int | str | DepthPolicy = "auto",
        sampling: Sampling = GREEDY,
        max_tokens: int = 256,
        stop: Sequence[str] = (),
        state_seed: int | None = None,
    ) -> "Reply":
        """Begin another answer to the last question; once complete it replaces the earlier one.

        Raises:
            RequestError: there is no last question, or as ``ask``.
        """
        question = self._last().question
        return self._begin(model, question, len(self.exchanges) - 1, depth, sampling, max_tokens, stop, state_seed)

    def deeper(self, config: ModelConfig) -> int:
        """The depth to ask the last question again with: twice that of its answer, at most ``max_depth``.

        Raises:
            RequestError: there is no answer; DepthError: it is as deep as this model goes.
        """
        depth = self._last().depth
        if depth >= config.max_depth:
            raise DepthError(f"the last answer took depth {depth}, the deepest of this model is {config.max_depth}")
        return min(2 * depth, config.max_depth)

    def undo(self) -> Exchange:
        """Take back the last question and its answer.

        Raises:
            RequestError: nothing has been said.
        """
        last = self._last()
        self.exchanges.pop()
        self._first = 0  # the context may hold the oldest ones again
        return last

    def messages(self) -> list[dict[str, str]]:
        """The whole conversation as chat messages."""
        return _messages(self.system, self.exchanges)

    def to_json(self) -> str:
        """The conversation as text that ``from_json`` reads."""
        record = {"system": self.system, "exchanges": [asdict(exchange) for exchange in self.exchanges]}
        return json.dumps(record, ensure_ascii=False, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Conversation":
        """Read what ``to_json`` wrote.

        Raises:
            RequestError: it is no such text.
        """
        try:
            record = json.loads(text)
            exchanges = [Exchange(**exchange) for exchange in record["exchanges"]]
            conversation = cls(record["system"], exchanges)
            conversation.to_json().encode()  # half characters cannot be sent nor saved
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise RequestError(f"this is no saved conversation ({error}); save one with Conversation.to_json") from None
        for name, value, kind in conversation._values():
            if not isinstance(value, kind) or isinstance(value, bool):
                raise RequestError(f"{name}={value!r:.60} in the saved conversation must be of type {kind.__name__}")
        return conversation

    def to_markdown(self) -> str:
        """The conversation for people to read."""
        parts = [f"*{self.system}*\n"] if self.system else []
        for exchange in self.exchanges:
            quoted = "\n".join(f"> {line}".rstrip() for line in exchange.question.splitlines())
            ended = f", {exchange.finish_reason}" if exchange.finish_reason != "stop" else ""
            parts.append(f"{quoted}\n\n{exchange.answer}\n\n*depth {exchange.depth}{ended}*\n")
        return "\n".join(parts)

    def _values(self) -> Iterator[tuple[str, Any, type]]:
        yield "system", self.system, str
        for exchange in self.exchanges:
            for name, value in asdict(exchange).items():
                yield name, value, int if name == "depth" else str

    def _last(self) -> Exchange:
        if not self.exchanges:
            raise RequestError("nothing has been asked yet; ask a question first")
        return self.exchanges[-1]

    def _begin(
        self,
        model: Model,
        question: str,
        place: int,
        depth: int | str | DepthPolicy,
        sampling: Sampling,
        max_tokens: int,
        stop: Sequence[str],
        state_seed: int | None,
    ) -> "Reply":
        """The reply to ``question`` as exchange number ``place``, forgetting what the context cannot hold.

        Half the context is freed at a time, so that a cached prefix of the prompt serves many questions.
        """
        n_ctx = model.limits.n_ctx

        def stream(first: int) -> Stream:
            prompt = _prompt(model, self.system, self.exchanges[first:place], question)
            return model.stream(
                prompt, depth=depth, sampling=sampling, max_tokens=max_tokens, stop=stop, state_seed=state_seed
            )

        def stream_within(n_tokens: int, first: int) -> Stream | None:
            try:
                begun = stream(first)
            except ContextOverflow:
                return None
            return begun if len(begun.request.ids) <= n_tokens else None

        first = min(self._first, place)
        begun = stream_within(n_ctx - min(max_tokens, n_ctx // 4), first)
        if begun is None:
            older = range(first, place)
            first += bisect_left(older, True, key=lambda start: stream_within(n_ctx // 2, start) is not None)
            begun = stream(first)
        self._first = first
        return Reply(self, begun, question, place, first)


class Reply:
    """One answer in the making: iterate over its tokens; leaving ``with`` before the end stops it.

    A stopped answer stays in the conversation with what was said by then, marked "interrupted"; without a word of it,
    or where it was to replace an earlier one, the conversation stays as it was.

    Attributes:
        n_forgotten: exchanges, the oldest, that the prompt leaves out because the context cannot hold them.
        exchange: what the conversation took over; None before the end, or where it took nothing.
    """

    def __init__(self, conversation: Conversation, stream: Stream, question: str, place: int, n_forgotten: int) -> None:
        self.n_forgotten = n_forgotten
        self.exchange: Exchange | None = None
        self._conversation, self._stream, self._question, self._place = conversation, stream, question, place
        self._tokens: list[Token] = []
        self._settled = False

    @property
    def decision(self) -> Decision:
        """Between which depths, by whom and why."""
        return self._stream.decision

    @property
    def stats(self) -> Stats:
        """Cost so far."""
        return self._stream.stats

    def __iter__(self) -> Iterator[Token]:
        return self

    def __next__(self) -> Token:
        try:
            token = next(self._stream)
        except StopIteration:
            self._settle()
            raise
        self._tokens.append(token)
        return token

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the answer here; safe to call twice, and after its end."""
        self._stream.close()
        self._settle()

    def _settle(self) -> None:
        """Give the exchange to the conversation, once."""
        if self._settled:
            return
        self._settled = True
        exchanges, reason = self._conversation.exchanges, self._stream.finish_reason
        text = "".join(token.text for token in self._tokens)
        if reason is None and (not text.strip() or self._place < len(exchanges)):
            return
        self.exchange = Exchange(
            question=self._question,
            answer=text,
            depth=max(token.depth for token in self._tokens),
            chosen_by=self.decision.chosen_by,
            finish_reason=str(reason or INTERRUPTED),
        )
        exchanges[self._place :] = [self.exchange]


def _prompt(model: Model, system: str, exchanges: Sequence[Exchange], question: str) -> Prompt:
    if model.has_chat_template:
        return [*_messages(system, exchanges), {"role": "user", "content": question}]
    said = (exchange.question + exchange.answer for exchange in exchanges)
    return "\n\n".join(filter(None, (system, *said, question)))


def _messages(system: str, exchanges: Iterable[Exchange]) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": system}] if system else []
    for exchange in exchanges:
        messages.append({"role": "user", "content": exchange.question})
        messages.append({"role": "assistant", "content": exchange.answer})
    return messages
