"""What the command line prints, and where: answers and JSON to standard output, everything else to standard error."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from localdepth.errors import LocalDepthError

__all__ = ["answer", "emit", "notes", "quiet_pipe", "report_error", "say", "shade", "table", "ticking"]

_BLOCKS = " ▁▂▃▄▅▆▇█"

say = Console(highlight=False, soft_wrap=True)  # standard output
notes = Console(stderr=True, highlight=False)


def emit(record: dict[str, Any]) -> None:
    """The one line of ``--json``."""
    sys.stdout.write(json.dumps(record, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def answer(text: str) -> None:
    """A piece of an answer, as it is."""
    sys.stdout.write(text)
    sys.stdout.flush()


def report_error(error: LocalDepthError, as_json: bool) -> int:
    """Say what went wrong; returns the exit code."""
    notes.print(Text.assemble((f"{type(error).__name__}: ", "bold red"), str(error)), soft_wrap=True)
    if as_json:
        emit({"error": {"type": type(error).__name__, "message": str(error)}})
    return error.exit_code


def table(columns: Sequence[str], rows: Sequence[Sequence[str | Text]], title: str | None = None) -> Table:
    """A plain table, numbers to the right."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, name in enumerate(columns):
        made.add_column(name, justify="left" if i == 0 else "right", no_wrap=i > 0)
    for row in rows:
        made.add_row(*row)
    return made


def shade(share: float) -> Text:
    """A share as a percentage with a bar beside it, green when high."""
    block = _BLOCKS[round(share * (len(_BLOCKS) - 1))]
    colour = "green" if share >= 0.9 else "yellow" if share >= 0.5 else "red"
    return Text.assemble(f"{100 * share:.0f} ", (block, colour))


@contextmanager
def ticking(label: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on standard error, shown only where a person looks; yields what moves it on by one."""
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=notes, transient=True, disable=not notes.is_terminal) as progress:
        task = progress.add_task(label, total=total)
        yield partial(progress.advance, task)


def quiet_pipe() -> None:
    """The reader of our output has gone; leave without a traceback at interpreter exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
