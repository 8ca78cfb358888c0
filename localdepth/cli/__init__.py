"""The command line: each command parses, calls one function of the library, prints.

Exit codes: 0 done, 1 the check failed, 2 request or file refused, 3 the machine failed, 130 interrupted,
143 terminated.
"""

import signal
import sys
from types import FrameType

__all__ = ["main"]


_USAGE = 2  # what click leaves with


def main() -> None:
    """Entry point of the ``localdepth`` command."""
    signal.signal(signal.SIGTERM, _end)
    try:
        from localdepth import console
        from localdepth.cli import (  # noqa: F401  # each registers its commands
            ask,
            chat,
            doctor,
            export,
            files,
            measure,
            models,
            quantise,
            report,
            retrofit,
            train,
        )
        from localdepth.cli.common import app

        console.speak_utf8()
        try:
            app()
        except SystemExit as leaving:
            if leaving.code == _USAGE and "--json" in sys.argv and not console.has_emitted():
                console.emit({"error": {"type": "UsageError", "message": "wrong arguments; standard error says which"}})
            raise
    except KeyboardInterrupt:  # outside any command: while importing, or on the way out
        raise SystemExit(130) from None


def _end(number: int, _frame: FrameType | None) -> None:
    """Leave as after an error, so that nothing half done stays behind."""
    sys.exit(128 + number)
