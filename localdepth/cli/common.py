"""What commands share: the application, how errors and interruptions become exit codes."""

import os
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from threading import Event
from typing import Annotated, Any, ParamSpec

import typer

from localdepth import console
from localdepth.errors import LocalDepthError, MachineError, MissingExtra, install_line

__all__ = [
    "CHECK_FAILED",
    "INTERRUPTED",
    "app",
    "brief",
    "command",
    "needs",
    "stop_on_interrupt",
]

CHECK_FAILED, INTERRUPTED = 1, 130  # errors bring their own
_HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none
_ENDING = [signal.SIGTERM] if _HANGUP is None else [signal.SIGTERM, _HANGUP]

app = typer.Typer(
    name="localdepth",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

P = ParamSpec("P")


def command(function: Callable[P, int | None]) -> Callable[P, None]:
    """Turn our errors, an interruption and a returned exit code into the process's exit code."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            code = function(*args, **kwargs) or 0
        except LocalDepthError as error:
            code = console.report_error(error, bool(kwargs.get("as_json")))
        except KeyboardInterrupt:
            console.notes.print("\ninterrupted")  # the cursor may stand behind half an answer
            if kwargs.get("as_json"):
                console.emit({"error": {"type": "Interrupted", "message": "interrupted"}})
            code = INTERRUPTED
        except BrokenPipeError:
            console.quiet_pipe()
            code = 0
        except (MemoryError, OSError) as error:
            said = MachineError(f"{type(error).__name__}: {error}; check disk, memory and where the output goes")
            code = console.report_error(said, bool(kwargs.get("as_json")))
        raise typer.Exit(code)

    return run


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version  # takes 15 ms

        console.say.print(f"localdepth {version('localdepth')}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Run recurrent-depth language models on a laptop, and decide how hard they think."""


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Import what an extra brings, or say how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtra(f"{error.name} is not installed; type: {install_line(extra)}") from error


@contextmanager
def stop_on_interrupt(on_interrupt: Callable[[], None] = lambda: None, *, on_any: bool = False) -> Iterator[Event]:
    """Let the first Ctrl-C only raise a flag, so that work in progress ends well; a second one interrupts.

    Args:
        on_any: SIGTERM and SIGHUP raise it too, however often, unless they are ignored, as under ``nohup``.
    """
    flag = Event()
    numbers = [signal.SIGINT, *(each for each in _ENDING if on_any and signal.getsignal(each) is not signal.SIG_IGN)]

    def raise_flag(number: int, _frame: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if number == _HANGUP:
            _leave_terminal()
        if not flag.is_set():  # a window that closes hangs up twice
            flag.set()
            on_interrupt()

    before = {each: signal.signal(each, raise_flag) for each in numbers}
    try:
        yield flag
    finally:
        for each, old in before.items():
            signal.signal(each, old)


def _leave_terminal() -> None:
    """Its window was closed, and what is written there from now on would fail."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        if stat.S_ISCHR(os.fstat(stream.fileno()).st_mode):
            os.dup2(null, stream.fileno())
    os.close(null)


def brief(value: Any) -> str:
    """A value of a record in one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {brief(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(brief(item) for item in value) or "none"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
