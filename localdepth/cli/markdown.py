"""Markdown on a terminal while it is being written: finished blocks are printed for good, only the last one moves.

Nothing of a text is lost: HTML, link addresses and line breaks show as they were written, and an unfinished block that
is taller than the screen shows its end until it is finished and printed whole.
"""

import time
from collections.abc import Iterable
from itertools import pairwise
from typing import ClassVar

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, JustifyMethod, RenderResult
from rich.live import Live
from rich.markdown import Heading, Markdown, MarkdownElement
from rich.segment import Segment
from rich.text import Text

from localdepth.console import plain

__all__ = ["show_markdown", "split"]

_PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"]).disable(["reference", "image"])
_SECONDS = 0.08  # between two pictures


def show_markdown(pieces: Iterable[str], console: Console, waiting: str = "…") -> None:
    """Print a text that arrives in pieces; what is printed when ``pieces`` raises stays complete up to there.

    Args:
        pieces: in order; control characters become visible.
        console: of a terminal that can move its cursor.
        waiting: shown until the first piece has arrived.
    """
    rest, due = "", 0.0
    with Live(
        console=console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
    ) as live:
        live.update(Text(waiting, "dim"), refresh=True)
        page = _Page(console)
        try:
            for piece in pieces:
                rest += plain(piece)
                if time.monotonic() < due or not rest.strip():
                    continue
                began = time.monotonic()
                *done, rest = split(rest)
                with console:  # one write: no half picture is seen
                    page.print(done)
                    live.update(_Block(rest, cut=True), refresh=True)
                now = time.monotonic()
                due = now + max(_SECONDS, 2 * (now - began))  # a slow terminal gets fewer
        finally:
            with console:
                live.update("", refresh=True)
                live.stop()
                page.print(_blocks(rest))


def split(text: str) -> list[str]:
    """Blocks of a Markdown text, which joined are the text; nothing written after it changes any but the last.

    A line that is still being written may become part of the block before it, and so belongs to that.
    """
    written, newline, unfinished = text.rpartition("\n")
    *done, last = _blocks(written + newline)
    return [*done, last + unfinished]


def _blocks(text: str) -> list[str]:
    """Blocks of a whole text, which joined are the text."""
    lines = [line + "\n" for line in text.split("\n")]
    lines[-1] = lines[-1].removesuffix("\n")
    starts = [token.map[0] for token in _PARSER.parse(text) if token.level == 0 and token.map and token.nesting >= 0]
    return ["".join(lines[start:end]) for start, end in pairwise((0, *starts[1:], len(lines)))]


class _Page:
    """Prints blocks for good, with an empty line between them."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._is_empty = True

    def print(self, blocks: Iterable[str]) -> None:
        for text in filter(str.strip, blocks):
            if not self._is_empty:
                self._console.print()
            self._console.print(_Block(text), end="")
            self._is_empty = False


class _Heading(Heading):
    LEVEL_ALIGN: ClassVar[dict[str, JustifyMethod]] = {}  # all to the left


class _Markdown(Markdown):
    """rich's Markdown without what it leaves out."""

    elements: ClassVar[dict[str, type[MarkdownElement]]] = {**Markdown.elements, "heading_open": _Heading}

    def __init__(self, markup: str) -> None:
        super().__init__("", hyperlinks=False)  # an address is to be seen
        self.parsed = _PARSER.parse(markup)
        for token in self.parsed:
            for child in token.children or ():
                if child.type == "softbreak":
                    child.type = "hardbreak"


class _Block:
    """One block without blank lines around it; its end where the screen holds no more."""

    def __init__(self, text: str, *, cut: bool = False) -> None:
        self._text, self._cut = text, cut

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(_Markdown(self._text), options.update(height=None), pad=False)
        shown = [i for i, line in enumerate(lines) if any(segment.text.strip() for segment in line)]
        lines = lines[shown[0] : shown[-1] + 1] if shown else []
        for line in lines[-max(1, options.size.height - 2) :] if self._cut else lines:
            yield from line
            yield Segment.line()
