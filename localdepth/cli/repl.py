"""The loop behind ``chat``: entries from a person or a script, answers to a terminal or a pipe."""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from platformdirs import user_state_path

from localdepth import console
from localdepth.cli.commands import COMMANDS, handle
from localdepth.cli.lines import Entries, Piped, Typed, open_history, quiet_keyboard
from localdepth.cli.markdown import show_markdown
from localdepth.cli.session import Session, Settings
from localdepth.conversation import Conversation
from localdepth.errors import LocalDepthError, StorageError
from localdepth.model import Model

__all__ = ["run", "talk"]

_LEAVE = "Ctrl-D or /quit leaves"


def talk(
    open_model: Callable[[Path | None], Model],
    file: Path | None,
    conversation: Conversation,
    settings: Settings,
    *,
    plain: bool,
) -> int:
    """Hold a session with whoever is at standard input; returns the exit code.

    Args:
        open_model: loads a model file; None is the default model.
        plain: show answers as they are, not as Markdown.
    """
    is_live = sys.stdin is not None and sys.stdin.isatty()
    is_markdown = console.say.is_terminal and not console.say.is_dumb_terminal and not plain
    show = _show_markdown if is_markdown else _show_plain
    with quiet_keyboard(), Session(open_model, file, conversation, settings, show, is_live=is_live) as session:
        return run(session, _typed(session) if is_live else Piped())


def run(session: Session, entries: Entries) -> int:
    """Handle entries until they end; returns the exit code: where a script wrote them, that of the last failure."""
    if session.is_live:
        session.note(f"{session.describe()}\n/help lists the commands, {_LEAVE}")
    code = 0
    while not session.is_over:
        try:
            handle(session, entries.next())
        except EOFError:
            break
        except KeyboardInterrupt:
            if not session.is_live:
                raise
            session.note(_LEAVE)
        except LocalDepthError as error:
            code = console.report_error(error, as_json=False)
    return 0 if session.is_live else code


def _typed(session: Session) -> Typed:
    try:
        history = open_history(user_state_path("localdepth") / "chat_history")
    except StorageError as error:
        session.note(str(error))
        history = open_history(None)
    return Typed(list(COMMANDS), history)


def _show_markdown(pieces: Iterable[str]) -> None:
    show_markdown(pieces, console.say)


def _show_plain(pieces: Iterable[str]) -> None:
    try:
        for piece in pieces:
            console.answer(piece)
    finally:
        console.answer("\n")
