"""What entries of a chat session mean: those that begin with / are commands, all others are questions."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from textwrap import shorten

from localdepth import console
from localdepth.cli.options import parse_depth
from localdepth.cli.session import Session
from localdepth.conversation import Conversation
from localdepth.errors import RequestError, StorageError
from localdepth.policy.fixed import as_policy

__all__ = ["COMMANDS", "Command", "handle"]


@dataclass(frozen=True, slots=True)
class Command:
    """What a word after / does.

    Attributes:
        argument: names what follows the word; empty for nothing.
    """

    argument: str
    does: str
    run: Callable[[Session, str], None]


def handle(session: Session, entry: str) -> None:
    """Do what one entry says.

    Raises:
        LocalDepthError: it cannot be done, and the session is as it was.
    """
    if not entry.startswith("/"):
        if entry.strip():
            session.ask(entry)
        return
    name, argument = (*entry.split(maxsplit=1), "")[:2]
    command = COMMANDS.get(name)
    if command is None:
        near = get_close_matches(name, COMMANDS, n=1)
        meant = f", did you mean {near[0]}?" if near else ";"
        raise RequestError(f"{name} is no command{meant} /help lists them; a space before the / makes it a question")
    if argument and not command.argument:
        raise RequestError(f"{name} takes nothing after it, got {argument!r:.40}")
    command.run(session, argument.strip())


def _depth(session: Session, argument: str) -> None:
    if argument:
        depth = parse_depth(argument)
        as_policy(depth, session.model.config)
        session.settings.depth = depth
    session.note(f"depth {session.settings.depth}")


def _deeper(session: Session, _: str) -> None:
    session.again(session.conversation.deeper(session.model.config))


def _retry(session: Session, _: str) -> None:
    session.again(session.settings.depth)


def _undo(session: Session, _: str) -> None:
    taken = session.conversation.undo()
    session.note(f"taken back: {shorten(taken.question, 60, placeholder=' …')}")


def _new(session: Session, _: str) -> None:
    session.conversation = Conversation(session.conversation.system)
    session.note("a new conversation")


def _system(session: Session, argument: str) -> None:
    if argument:
        session.conversation.system = "" if argument == "-" else argument
    session.note(f"instructions: {session.conversation.system or 'none'}")


def _model(session: Session, argument: str) -> None:
    if argument:
        session.switch(Path(argument).expanduser())
    session.note(session.describe())


def _save(session: Session, argument: str) -> None:
    if _path(argument).exists():
        raise RequestError(f"{argument} exists; /save! {argument} writes over it")
    _save_over(session, argument)


def _save_over(session: Session, argument: str) -> None:
    path, said = _path(argument), session.conversation
    text = said.to_json() if path.suffix == ".json" else said.to_markdown()
    part = path.with_name(f".{path.name}.part")  # a whole file or none
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except (OSError, UnicodeError) as error:
        part.unlink(missing_ok=True)
        raise StorageError(f"cannot write {path}: {error}; choose another place") from error
    session.note(f"saved to {path}: {len(said.exchanges)} questions with their answers")


def _path(argument: str) -> Path:
    path = Path(argument).expanduser()
    if path.suffix not in (".json", ".md"):
        raise RequestError(f"{argument!r} must end in .json or .md, such as talk.md")
    return path


def _help(_session: Session, _: str) -> None:
    rows = [(f"{name} {command.argument}", command.does) for name, command in COMMANDS.items()]
    console.show_list([*rows, ("Alt-Enter", "a new line; so does \\ before Enter")], to=console.notes)


def _quit(session: Session, _: str) -> None:
    session.is_over = True


COMMANDS = {
    "/depth": Command("N", "passes for the next questions; or auto, quick, deep, low, high", _depth),
    "/deeper": Command("", "the last question again, at twice the depth", _deeper),
    "/retry": Command("", "the last question again; drawn anew if --temperature is above 0", _retry),
    "/undo": Command("", "take back the last question and its answer", _undo),
    "/new": Command("", "begin a new conversation", _new),
    "/system": Command("TEXT", "instructions before the conversation; - for none", _system),
    "/model": Command("FILE", "go on with another model", _model),
    "/save": Command("FILE", "write the conversation to a .json or .md file", _save),
    "/save!": Command("FILE", "the same, over a file that exists", _save_over),
    "/help": Command("", "this list", _help),
    "/quit": Command("", "leave; so does Ctrl-D", _quit),
}
