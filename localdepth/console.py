"""What the command line prints, and where: answers and JSON to standard output, everything else to standard error."""

import io
import json
import math
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from localdepth.errors import LocalDepthError, MachineError

__all__ = [
    "answer",
    "emit",
    "has_emitted",
    "notes",
    "plain",
    "quiet_pipe",
    "report_error",
    "say",
    "shade",
    "show_facts",
    "show_list",
    "show_table",
    "speak_utf8",
    "ticking",
    "tracking",
    "tracking_all",
    "waiting",
]

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_emitted = threading.Event()
_BLOCKS = " ▁▂▃▄▅▆▇█"


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Whoever read us has seen enough: no error."""
        quiet_pipe()
        raise SystemExit(0)


# brackets and colons in names and texts mean nothing here
say = _Console(highlight=False, markup=False, emoji=False)  # standard output
notes = _Console(stderr=True, highlight=False, markup=False, emoji=False)
for _console in (say, notes):  # words wrap for a person; a pipe gets whole lines
    _console.soft_wrap = not _console.is_terminal


def speak_utf8() -> None:
    """Print any text, whatever the locale or the pipe thinks of it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def emit(record: dict[str, Any]) -> None:
    """The one line of ``--json``; numbers that are not finite, which JSON lacks, become null."""
    _emitted.set()
    _write(json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n")


def has_emitted() -> bool:
    """Whether the one line has been written."""
    return _emitted.is_set()


def answer(text: str) -> None:
    """A piece of an answer: as it is, but on a terminal without characters that would steer it."""
    _write(plain(text) if sys.stdout is not None and sys.stdout.isatty() else text)


def plain(text: str) -> str:
    """Text with control characters made visible, line breaks and tabs excepted."""
    return _CONTROL.sub(lambda found: repr(found.group())[1:-1], text)


def _write(text: str) -> None:
    if sys.stdout is None:
        raise MachineError("there is no standard output to write to; connect one")
    sys.stdout.write(text)
    sys.stdout.flush()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def report_error(error: LocalDepthError, as_json: bool) -> int:
    """Say what went wrong; returns the exit code."""
    notes.print(Text.assemble((f"{type(error).__name__}: ", "bold red"), plain(str(error))))
    if as_json:
        try:
            emit({"error": {"type": type(error).__name__, "message": str(error)}})
        except (OSError, MachineError):
            return MachineError.exit_code  # nobody can read it; the line above has said so
    return error.exit_code


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str | Text]], title: str | None = None) -> None:
    """Print a plain table at its natural width: a line too long for the terminal wraps, nothing is cut off."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for i, name in enumerate(columns):
        made.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        made.add_row(*(Text(plain(cell)) if isinstance(cell, str) else cell for cell in row))
    _print_whole(made, say)


def _print_whole(table: Table, to: Console) -> None:
    natural = Measurement.get(to, to.options.update(max_width=10_000), table).maximum
    _Console(width=natural, highlight=False, stderr=to.stderr).print(table, crop=False)


def show_list(rows: Sequence[Sequence[str | Text]], to: Console = say) -> None:
    """Print rows whose last column wraps beside the others; a pipe gets whole lines."""
    made = Table.grid(padding=(0, 2, 0, 0))
    for _ in rows[0][:-1]:
        made.add_column(no_wrap=True)
    made.add_column(overflow="fold")
    for row in rows:
        made.add_row(*(Text(plain(cell)) if isinstance(cell, str) else cell for cell in row))
    if to.is_terminal:
        to.print(made)
    else:
        _print_whole(made, to)


def show_facts(facts: Mapping[str, str]) -> None:
    """Print names and values, a line each."""
    wide = max(map(len, facts), default=0)
    for name, value in facts.items():
        say.print(Text(f"{name:<{wide}}  {plain(value)}"))


def shade(share: float) -> Text:
    """A share as a percentage with a bar beside it, green when high."""
    block = _BLOCKS[round(share * (len(_BLOCKS) - 1))]
    colour = "green" if share >= 0.9 else "yellow" if share >= 0.5 else "red"
    return Text.assemble(f"{100 * share:.0f}", (block, colour))


@contextmanager
def ticking(label: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on standard error, shown only where a person looks; yields what moves it on by one."""
    n_done = count(1)
    with tracking(label) as show:
        yield lambda: show(next(n_done), total)


@contextmanager
def tracking(label: str) -> Iterator[Callable[..., None]]:
    """A bar as ``ticking`` shows, for work that knows itself how far it is.

    Yields what takes done and total, and on request a few words on how it goes.
    """
    with tracking_all() as show:
        yield partial(show, label)


@contextmanager
def tracking_all() -> Iterator[Callable[..., None]]:
    """A bar for each thing that is worked on; yields what takes its name, done and total, 0 where nobody knows."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn  # takes 10 ms

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=notes, transient=True, disable=not notes.is_terminal) as progress:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int, how: str = "") -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(plain(what), total=None)
            shown = done < total or not total
            label = plain(f"{what} {how}".rstrip())
            progress.update(tasks[what], description=label, completed=done, total=total or None, visible=shown)

        yield show


@contextmanager
def waiting(label: str) -> Iterator[None]:
    """A spinner on standard error, shown only where a person looks, once half a second has passed."""
    if not notes.is_terminal:
        yield
        return
    status = notes.status(label)
    timer = threading.Timer(0.5, status.start)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # it may be starting the spinner just now
        status.stop()


def quiet_pipe() -> None:
    """The reader of our output has gone; leave without a traceback at interpreter exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
