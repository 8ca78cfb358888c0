"""Opening spans: a cache carries one at a time, and none is left open where another cannot be made."""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from localdepth.engine.base import Kv, Span
from localdepth.errors import EngineError

__all__ = ["OpenKv", "OpenSpan", "check_free", "open_all"]


class OpenKv(Kv, Protocol):
    """A cache that knows its state: ``busy`` while a span of it is open, ``closed`` for good."""

    busy: bool
    closed: bool


class OpenSpan(Span, Protocol):
    """A span of such a cache."""

    @property
    def kv(self) -> OpenKv: ...


def check_free(kv: OpenKv) -> None:
    """Refuse a cache whose memory is gone; native code would run into it.

    Raises:
        EngineError: it is closed.
    """
    if kv.closed:
        raise EngineError("this cache is closed; open another")
    assert not kv.busy, "a Kv carries one open span"


def open_all(spans: Iterable[OpenSpan], drop: Callable[[Sequence[Span]], None]) -> list[Span]:
    """Make spans one by one, each of which takes its cache; if one cannot be made, ``drop`` those before it."""
    opened: list[Span] = []
    try:
        for span in spans:
            span.kv.busy = True
            opened.append(span)
    except BaseException:
        drop(opened)
        raise
    return opened
