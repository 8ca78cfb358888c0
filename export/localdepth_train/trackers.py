"""Records of a run sent to a tracker while it trains; the log in the run folder is always written."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import Any

from localdepth.errors import MissingExtra, TrainError

__all__ = ["Tracker", "tracking"]


class Tracker(StrEnum):
    """Where records can go; each needs the package of its name."""

    TENSORBOARD = "tensorboard"
    TRACKIO = "trackio"


@contextmanager
def tracking(name: str, folder: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yields what takes records, for a run in ``folder``: numbers by name, evaluations by depth.

    Args:
        name: of a ``Tracker``.
    Raises:
        TrainError: for another name.
        MissingExtra: when the tracker's package is not installed.
    """
    if name not in list(Tracker):
        raise TrainError(f"tracker={name!r} is not one of {', '.join(Tracker)}")
    package = _imported(Tracker(name))
    if name == Tracker.TENSORBOARD:
        with package.SummaryWriter(str(folder / "tensorboard")) as writer:
            yield lambda record: _write(record, writer.add_scalar)
        return
    package.init(project="localdepth", name=folder.name, resume="allow")
    try:
        yield lambda record: package.log(dict(_numbers(record)), step=record["step"])
    finally:
        package.finish()


def _imported(tracker: Tracker) -> Any:
    try:
        return import_module("torch.utils.tensorboard" if tracker is Tracker.TENSORBOARD else "trackio")
    except ImportError as error:
        raise MissingExtra(f"{tracker} is not installed; type: pip install {tracker}") from error


def _write(record: Mapping[str, Any], add: Callable[[str, float, int], None]) -> None:
    for name, value in _numbers(record):
        add(name, value, record["step"])


def _numbers(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, int | float) and name != "step":
            yield name, value
    for measure, by_depth in record.get("evaluation", {}).items():
        if measure != "cells":
            yield from ((f"{measure}/depth {depth}", value) for depth, value in by_depth.items())
