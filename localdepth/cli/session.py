"""A chat session: a model, a conversation, and how its next question is asked; answers are shown as they come."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import Self

from localdepth import console
from localdepth.cli.common import stop_on_interrupt
from localdepth.conversation import Conversation, Reply
from localdepth.errors import DepthError, LocalDepthError
from localdepth.model import Model
from localdepth.policy.fixed import as_policy
from localdepth.sampling import Sampling

__all__ = ["Session", "Settings"]

_ENDINGS = {
    "length": "cut off at --max-tokens",
    "context": "cut off, the context is full",
    "interrupted": "stopped",
}


@dataclass(kw_only=True)
class Settings:
    """What every question is asked with, until a command changes it."""

    depth: int | str
    sampling: Sampling
    max_tokens: int
    stop: tuple[str, ...]
    state_seed: int | None


class Session:
    """Owns the model it talks to; a context manager.

    Attributes:
        conversation: what was said; replaced by a new one.
        settings: for the next question.
        is_over: whether the person has said goodbye.
    """

    def __init__(
        self,
        open_model: Callable[[Path | None], Model],
        file: Path | None,
        conversation: Conversation,
        settings: Settings,
        show: Callable[[Iterable[str]], None],
        *,
        is_live: bool,
    ) -> None:
        """Load the model.

        Args:
            open_model: loads a model file; None is the default model.
            show: prints an answer that arrives in pieces.
            is_live: a person is typing, whose Ctrl-C stops an answer and not the session.
        Raises:
            LocalDepthError: the model cannot be loaded, takes no text, or not this depth.
        """
        self.conversation, self.settings, self.is_live = conversation, settings, is_live
        self.is_over = False
        self._open, self._show = open_model, show
        self._has_spoken = False  # a token of the answer has come
        self._tries = 0  # of the last question; each draws other tokens
        self._n_forgotten = 0
        self._name, self.model = self._load(file)
        try:
            as_policy(settings.depth, self.model.config)
        except DepthError:
            self.model.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.model.close()

    def describe(self) -> str:
        """The model in one line."""
        config = self.model.config
        return f"{self._name}, depth 1 to {config.max_depth}, {config.default_depth} by default"

    def note(self, text: str) -> None:
        """Say something that is no answer."""
        console.notes.print(console.plain(text), style="dim")

    def switch(self, file: Path) -> None:
        """Go on with another model; where it cannot be loaded, with the one there is."""
        name, model = self._load(file)
        self.model.close()
        self._name, self.model = name, model
        try:
            as_policy(self.settings.depth, model.config)
        except DepthError:
            self.note(f"this model has no depth {self.settings.depth}; it is auto now")
            self.settings.depth = "auto"

    def ask(self, question: str) -> None:
        """Put a question and show the answer."""
        now, self._tries = self.settings, 0
        self._answer(
            lambda: self.conversation.ask(
                self.model,
                question,
                depth=now.depth,
                sampling=now.sampling,
                max_tokens=now.max_tokens,
                stop=now.stop,
                state_seed=now.state_seed,
            )
        )

    def again(self, depth: int | str) -> None:
        """Put the last question again, drawing other tokens than before where tokens are drawn."""
        now, self._tries = self.settings, self._tries + 1
        self._answer(
            lambda: self.conversation.again(
                self.model,
                depth=depth,
                sampling=replace(now.sampling, seed=now.sampling.seed + self._tries),
                max_tokens=now.max_tokens,
                stop=now.stop,
                state_seed=now.state_seed,
            )
        )

    def _answer(self, begin: Callable[[], Reply]) -> None:
        """Show an answer and what it took. Where a person types, Ctrl-C stops it; a second one does not wait."""
        self._has_spoken = False
        guard: AbstractContextManager[Event] = stop_on_interrupt(self._stop) if self.is_live else nullcontext(Event())
        with guard as stopped, begin() as reply:
            if reply.n_forgotten > self._n_forgotten:
                self.note(f"the context is full: the model no longer sees questions 1 to {reply.n_forgotten}")
            self._n_forgotten = reply.n_forgotten
            try:
                self._show(self._pieces(reply, stopped))
            except KeyboardInterrupt:
                if not self.is_live:
                    raise
        self.note(_summary(reply))

    def _pieces(self, reply: Reply, stopped: Event) -> Iterator[str]:
        for token in reply:
            self._has_spoken = True
            yield token.text
            if stopped.is_set():
                return

    def _stop(self) -> None:
        """While the question is still being read there is nothing to end well."""
        if not self._has_spoken:
            raise KeyboardInterrupt

    def _load(self, file: Path | None) -> tuple[str, Model]:
        with console.waiting("loading"):
            model = self._open(file)
        try:
            model.tokenize("a")  # a file without tokenizer says so now
        except LocalDepthError:
            model.close()
            raise
        if not model.has_chat_template:
            self.note("this file has no chat template: the model continues the conversation as a text")
        return file.name if file else "default model", model


def _summary(reply: Reply) -> str:
    exchange, stats = reply.exchange, reply.stats
    if exchange is None:
        return "stopped; the conversation is as it was before"
    facts = [f"depth {exchange.depth} by {exchange.chosen_by}", f"{stats.n_generated} tokens"]
    if stats.n_generated > 1:
        facts.append(f"{1000 * (stats.n_generated - 1) / stats.decode_ms:.0f} tok/s")
    if exchange.finish_reason in _ENDINGS:
        facts.append(_ENDINGS[exchange.finish_reason])
    return " · ".join(facts)
