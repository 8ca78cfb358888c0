"""What a person or a script types into a conversation, one entry at a time."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.filters import is_searching
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output

from localdepth.errors import PromptError, StorageError

__all__ = ["Entries", "Piped", "Typed", "open_history", "quiet_keyboard"]


class Entries(Protocol):
    """Where entries come from."""

    def next(self) -> str:
        """The next entry, its line breaks kept.

        Raises:
            EOFError: there are no more; KeyboardInterrupt: Ctrl-C where nothing was typed.
            PromptError: what came is no text.
        """


class Piped:
    """Lines of standard input; a backslash at the end of one joins the next."""

    def next(self) -> str:
        entry = self._line()
        with suppress(EOFError):
            while entry.endswith("\\"):
                entry = entry[:-1] + "\n"
                entry += self._line()
        return entry

    def _line(self) -> str:
        raw = b"" if sys.stdin is None else sys.stdin.buffer.readline()
        if not raw:
            raise EOFError
        try:
            return raw.decode("utf-8").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise PromptError(
                f"a line of standard input is not UTF-8 at byte {error.start}; convert it first"
            ) from error


class Typed:
    """A line editor with history. Enter sends; Alt-Enter, or a backslash before Enter, begins a new line."""

    def __init__(self, commands: Sequence[str], history: History) -> None:
        self._session: PromptSession[str] = PromptSession(
            [("bold", "> ")],
            prompt_continuation="  ",
            multiline=True,  # pasted line breaks are kept
            key_bindings=_keys(),
            history=history,
            completer=WordCompleter(list(commands), sentence=True),
            complete_while_typing=False,
            output=create_output(always_prefer_tty=True),
        )

    def next(self) -> str:
        return self._session.prompt()


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter", filter=~is_searching)
    def _send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.char_before_cursor == "\\":
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=~is_searching)
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c", filter=~is_searching)
    def _clear(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

    return keys


class _KeptHistory(FileHistory):
    """A history that loses an entry rather than the session when the disk is full."""

    def store_string(self, string: str) -> None:
        with suppress(OSError):
            super().store_string(string)


def open_history(path: Path | None) -> History:
    """What was typed in earlier sessions; only its owner can read the file. None keeps it for this session.

    Raises:
        StorageError: the file cannot be read and written.
    """
    if path is None:
        return InMemoryHistory()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise StorageError(f"what you type is not kept for next time: {path} ({error})") from error
    return _KeptHistory(str(path))


@contextmanager
def quiet_keyboard() -> Iterator[None]:
    """Keep keys that are pressed outside the line editor from showing in an answer; they wait for the next entry."""
    if sys.platform == "win32" or sys.stdin is None or not sys.stdin.isatty():
        yield
        return
    import termios

    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    silent = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(keyboard, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(keyboard, termios.TCSANOW, before)
