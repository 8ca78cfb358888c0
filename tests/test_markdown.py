"""Markdown that grows on a terminal: what stays on the screen is the whole text, however it arrives."""

import io
import re
from collections.abc import Iterable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console

from localdepth.cli import markdown
from localdepth.cli.markdown import show_markdown, split

BLOCKS = [
    "# Heading\n\n",
    "one\ntwo\n\n",
    "1. first\n\n   inside\n2. second\n\n",
    "- a\n  - b\n- c\n\n",
    "```python\nx = 1\n\ny = 2\n```\n\n",
    "> quoted\n> words\n\n",
    "| a | b |\n|---|---|\n| 1 | 2 |\n\n",
    "---\n\n",
    "<b>tag</b> &amp; [link](http://example.com/a)\n\n",
    "    indented\n\n",
    "```\nnever closed\n",
    "[ref]: http://example.com\n\n",
]
texts = st.lists(st.sampled_from(BLOCKS) | st.text("ab#->`|*1.\n ", max_size=12), max_size=8).map("".join)
END = "\x1b[?25h"  # the cursor is back


class Screen:
    """A terminal of ``width`` × ``height`` with what scrolled off it; knows the few codes that rich writes."""

    def __init__(self, written: str, height: int) -> None:
        self.lines, self._row, self._column, self._height = [""], 0, 0, height
        for part in re.findall(r"\x1b\[[?0-9;]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", written):
            self._take(part)

    def _take(self, part: str) -> None:
        if part == "\n":
            self._row, self._column = self._row + 1, 0
            self.lines += [""] * (self._row + 1 - len(self.lines))
        elif part == "\r":
            self._column = 0
        elif part == "\x1b[2K":
            self.lines[self._row] = ""
        elif part == "\x1b[1A":  # what has scrolled off cannot be reached
            self._row = max(self._row - 1, len(self.lines) - self._height, 0)
        elif not part.startswith("\x1b"):
            line = self.lines[self._row].ljust(self._column)
            self.lines[self._row] = line[: self._column] + part + line[self._column + len(part) :]
            self._column += len(part)
        else:
            assert part in ("\x1b[?25l", END) or part.endswith("m"), repr(part)


def shown(pieces: Iterable[str], width: int = 40, height: int = 8, every: bool = True) -> list[str]:
    """Lines of the terminal after the pieces; ``every`` draws a picture after each."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=width, height=height, color_system=None, _environ={})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(markdown, "_SECONDS", 0.0 if every else 1e9)
        patch.setattr("time.monotonic", lambda: 0.0)
        show_markdown(pieces, console)
    assert file.getvalue().count("\x1b[?25l") == file.getvalue().count(END), "the cursor is visible again"
    lines = [line.rstrip() for line in Screen(file.getvalue(), height).lines]
    while lines and not lines[-1]:  # below the text, where a taller picture may have been
        lines.pop()
    return lines


@given(texts)
def test_blocks_joined_are_the_text(text: str) -> None:
    assert "".join(split(text)) == text


@given(texts, texts)
@example(BLOCKS[2] + "1", ". third\n")
@example(">1\n-", "# of the quotation\n")
def test_what_comes_later_changes_only_the_last_block(text: str, more: str) -> None:
    *done, _ = split(text)
    assert split(text + more)[: len(done)] == done


@settings(max_examples=60, deadline=None)
@given(texts, st.lists(st.integers(1, 9), min_size=1, max_size=9), st.sampled_from([5, 8, 60]))
@example(BLOCKS[2] * 2, [1], 5)
@example(BLOCKS[2] + ">", [1], 5)
@example("".join(BLOCKS[:9]) + "".join(f"line {i}\n" for i in range(40)), [3], 6)
def test_a_text_in_pieces_leaves_the_screen_of_the_whole_text(text: str, sizes: list[int], height: int) -> None:
    pieces, rest = [], text
    while rest:
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(rest[:size])
        rest = rest[size:]
    assert shown(pieces, height=height) == shown([text], height=height, every=False)


def test_nothing_that_was_written_is_hidden() -> None:
    lines = shown(["one\ntwo\n\n", *BLOCKS[4:9], BLOCKS[11], "![alt](http://example.com/b.png)"], height=200)
    text = "\n".join(lines)
    assert lines[:2] == ["one", "two"]
    for word in ("x = 1", "<b>tag</b> &", "http://example.com/a", "[ref]: http://example.com", "b.png", "quoted"):
        assert word in text


def test_an_answer_longer_than_the_screen_is_whole_in_the_scrollback() -> None:
    code = "".join(f"{i}\n" for i in range(100))
    lines = [line.strip() for line in shown(["```\n", *code.splitlines(keepends=True), "```\n"], height=10)]
    assert [line for line in lines if line] == [str(i) for i in range(100)]


def test_what_was_said_before_an_interruption_stays() -> None:
    def pieces() -> Iterable[str]:
        yield "one\n\ntwo"
        raise KeyboardInterrupt

    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=40, height=8, color_system=None, _environ={})
    with pytest.raises(KeyboardInterrupt):
        show_markdown(pieces(), console)
    assert [line.strip() for line in Screen(file.getvalue(), 8).lines] == ["one", "", "two", ""]
    assert file.getvalue().rstrip().endswith("two")


def test_control_characters_of_an_answer_cannot_steer_the_terminal() -> None:
    assert shown(["\x1b[2Jgone\x07"], height=8)[0] == "\\x1b[2Jgone\\x07"
