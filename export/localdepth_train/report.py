"""What the log of a training run says: its curves, and the numbers worth comparing.

A run is a folder with ``log.jsonl``, one JSON object a line: optimiser steps have ``loss``, evaluations have
``evaluation``, keys we do not know are ignored. The line a killed run did not finish is no part of the log.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from localdepth.errors import StorageError, TrainError
from localdepth_train.intervals import F64, Interval, interval, smooth

__all__ = [
    "AXES",
    "METRICS",
    "Group",
    "Measured",
    "Run",
    "Summary",
    "as_groups",
    "common_axis",
    "read_run",
    "read_runs",
    "summarise",
]

AXES = ("flops", "tokens", "step")  # what progress is counted in, the fairest first; all count from the run's start
METRICS = ("loss", "accuracy")  # what an evaluation measures by depth
_SEED = re.compile(r"(?<=.)[-/]seed\d+$")
_DEPTH = re.compile(r"[1-9][0-9]{0,5}")
_HUGE = 1e100


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """A metric by depth, over the m evaluations of a run that measured it.

    Attributes:
        at: by each of ``AXES``, where the evaluations stand, [m]; NaN where the log does not say.
        values: [m, len(depths)], NaN where an evaluation left a depth out, or diverged.
    """

    at: Mapping[str, F64]
    depths: tuple[int, ...]
    values: F64

    def series(self, axis: str, depth: int) -> tuple[F64, F64]:
        """Where this depth was measured along ``axis``, and what was found there."""
        values = self.values[:, self.depths.index(depth)]
        known = ~np.isnan(values)
        return self.at[axis][known], values[known]

    def last(self) -> dict[int, float]:
        """By depth, what the last evaluation says."""
        return {depth: float(v) for depth, v in zip(self.depths, self.values[-1], strict=True) if not np.isnan(v)}


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """A run as its log tells it; arrays are [n], an entry for each of n logged steps, NaN where the log has no value.

    Attributes:
        name: of the folder, with as many folders above it as tell several runs apart.
        at: by each of ``AXES``, how far the run had come.
        expected_depth: what the depths drawn for a step are on average, as planned.
        drawn: by depth, how many sequences were drawn with it, over all steps.
        seconds: wall time, of all parts of a run that was stopped together.
        phases: names in order, each with the index of its first logged step.
        evaluated: by metric, where there is one.
    """

    name: str
    folder: Path
    at: Mapping[str, F64]
    loss: F64
    expected_depth: F64
    tokens_per_second: F64
    drawn: Mapping[int, int]
    seconds: float
    phases: tuple[tuple[str, int], ...]
    evaluated: Mapping[str, Measured]


class Group(NamedTuple):
    """Runs that differ in nothing but their seed; often one alone."""

    name: str
    runs: tuple[Run, ...]


@dataclass(frozen=True, slots=True)
class Summary:
    """A group in numbers.

    Attributes:
        numbers: steps, tokens, flops, loss and best_loss (smoothed over a fiftieth of the steps), mean_depth (drawn),
            tokens_per_second (median) and seconds, NaN where a log does not say.
        by_depth: for each metric the last evaluation, at the depths that all runs measured.
    """

    name: str
    runs: tuple[str, ...]
    numbers: Mapping[str, Interval]
    by_depth: Mapping[str, Mapping[int, Interval]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values: means, and under ``half_widths`` the same shape again, NaN without several runs."""
        means, half_widths = map(self._plain, (0, 1))
        return {"name": self.name, "runs": list(self.runs), **means, "half_widths": half_widths}

    def _plain(self, part: int) -> dict[str, Any]:
        by_depth = {
            f"{metric}_by_depth": {str(depth): found[part] for depth, found in cells.items()}
            for metric, cells in self.by_depth.items()
        }
        return {name: found[part] for name, found in self.numbers.items()} | by_depth


def read_run(folder: str | os.PathLike[str]) -> Run:
    """Read one run's log.

    Raises:
        TrainError: when there is none, it holds no step yet, or a line is not what a trainer writes.
        StorageError: when it cannot be read.
    """
    path = Path(os.path.abspath(folder))
    lines = list(_lines(path / "log.jsonl"))
    evaluations = [line for line in lines if "evaluation" in line.record]
    steps = [line for line in lines if "loss" in line.record and "evaluation" not in line.record]
    if not steps:
        raise TrainError(f"{path / 'log.jsonl'} holds no training step; let the run log its first ones")
    _check_rising(steps)
    return Run(
        name=path.name,
        folder=path,
        at=_progress(steps),
        loss=_column(steps, "loss"),
        expected_depth=_column(steps, "expected_depth"),
        tokens_per_second=_column(steps, "tokens_per_second"),
        drawn=_drawn(steps),
        seconds=float(np.fmax.reduce(_column(lines, "seconds"))),  # NaN where a record has none
        phases=_phases(steps),
        evaluated={metric: found for metric in METRICS if (found := _measured(evaluations, metric))},
    )


def read_runs(folders: Sequence[str | os.PathLike[str]]) -> list[Run]:
    """Read several runs and give each a name that tells it from the others.

    Raises:
        TrainError, StorageError: as ``read_run``; also for a folder given twice.
    """
    runs = [read_run(folder) for folder in folders]
    names = _names([run.folder for run in runs])
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def as_groups(runs: Sequence[Run], *, by_seed: bool = False) -> list[Group]:
    """Each run alone, or those together whose folders differ only in a last ``-seed<k>`` or ``/seed<k>``."""
    if not by_seed:
        return [Group(run.name, (run,)) for run in runs]
    groups: dict[Path, list[Run]] = {}
    for run in runs:
        groups.setdefault(Path(_SEED.sub("", run.folder.as_posix())), []).append(run)
    return [Group(name, tuple(found)) for name, found in zip(_names(list(groups)), groups.values(), strict=True)]


def summarise(groups: Sequence[Group]) -> list[Summary]:
    """Each group in numbers: means over its runs, with 95 % t intervals where there are several."""
    return [_summary(group) for group in groups]


def common_axis(runs: Iterable[Run]) -> str:
    """The first of ``AXES`` that every run's log counts."""
    tracks = [track for run in runs for track in (run.at, *(measured.at for measured in run.evaluated.values()))]
    return next(axis for axis in AXES if not any(np.isnan(track[axis]).any() for track in tracks))


class _Line(NamedTuple):
    """A record and where it stands, for what must be said of it."""

    place: str
    record: dict[str, Any]

    def number(self, key: str) -> float:
        return self._checked(key, self.record.get(key))

    def number_or_nan(self, key: str) -> float:
        return self.number(key) if key in self.record else np.nan

    def evaluated(self, metric: str) -> dict[int, float]:
        """What was measured by depth, depths at which the model diverged left out."""
        found = self.record["evaluation"]
        if not isinstance(found, dict):
            raise TrainError(f"{self.place}: evaluation={found!r:.60} must be an object")
        values = found.get(metric) or {}
        if isinstance(values, dict):
            values = {depth: value for depth, value in values.items() if not _has_diverged(value)}
        return self.by_depth(values)

    def by_depth(self, values: Any) -> dict[int, float]:
        if not isinstance(values, dict) or not all(map(_DEPTH.fullmatch, values)):
            raise TrainError(f"{self.place}: {values!r:.60} must have depths as keys, whole numbers from 1")
        return {int(depth): self._checked(f"depth {depth}", value) for depth, value in values.items()}

    def _checked(self, key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _HUGE:  # nor NaN
            raise TrainError(f"{self.place}: {key}={value!r:.60} must be a finite number; is this the log of a run?")
        return float(value)


def _has_diverged(value: Any) -> bool:
    return isinstance(value, float) and not np.isfinite(value)


def _lines(log: Path) -> Iterator[_Line]:
    try:
        written = log.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise TrainError(f"{log} does not exist; give the folder of a training run") from error
    except OSError as error:
        raise StorageError(f"cannot read {log}: {error}") from error
    whole = written[: written.rfind(b"\n") + 1]
    for number, text in enumerate(whole.splitlines(), 1):
        place = f"{log}, line {number}"
        try:
            record = json.loads(text)
        except ValueError as error:
            raise TrainError(f"{place} is no JSON: {error}; remove the line") from error
        if not isinstance(record, dict):
            raise TrainError(f"{place} is {text[:60]!r}; every line must be an object, remove the line")
        yield _Line(place, record)


def _check_rising(steps: Sequence[_Line]) -> None:
    for before, after in pairwise(steps):
        for axis in reversed(AXES):
            old, new = before.number_or_nan(axis), after.number_or_nan(axis)
            if new < old or (axis == "step" and new == old):
                raise TrainError(f"{after.place}: {axis} {new:g} follows {old:g}; it must rise, give each run a folder")


def _column(lines: Sequence[_Line], key: str) -> F64:
    return np.array([line.number_or_nan(key) for line in lines])


def _progress(lines: Sequence[_Line]) -> dict[str, F64]:
    return {"step": np.array([line.number("step") for line in lines])} | {
        axis: _column(lines, axis) for axis in AXES if axis != "step"
    }


def _drawn(steps: Iterable[_Line]) -> dict[int, int]:
    counts = Counter[int]()
    for line in steps:
        for depth, n in line.by_depth(line.record.get("depths", {})).items():
            counts[depth] += int(n)
    return dict(sorted(counts.items()))


def _phases(steps: Sequence[_Line]) -> tuple[tuple[str, int], ...]:
    names = [str(line.record.get("phase", "")) for line in steps]
    return tuple((name, i) for i, name in enumerate(names) if i == 0 or name != names[i - 1])


def _measured(evaluations: Iterable[_Line], metric: str) -> Measured | None:
    """What evaluations say of a metric, None where they are silent."""
    found = [(line, row) for line in evaluations if (row := line.evaluated(metric))]
    if not found:
        return None
    lines, rows = zip(*found, strict=True)
    depths = tuple(sorted(set().union(*rows)))
    return Measured(_progress(lines), depths, np.array([[row.get(depth, np.nan) for depth in depths] for row in rows]))


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' paths without what all have in common."""
    if len(set(folders)) < len(folders):
        twice = next(folder for folder, n in Counter(folders).items() if n > 1)
        raise TrainError(f"{twice} is given twice; give each run once")
    shared = os.path.commonpath([folder.parent for folder in folders])
    return [folder.relative_to(shared).as_posix() for folder in folders]


def _summary(group: Group) -> Summary:
    by_run = [_numbers(run) for run in group.runs]
    return Summary(
        name=group.name,
        runs=tuple(run.name for run in group.runs),
        numbers={name: interval([numbers[name] for numbers in by_run]) for name in by_run[0]},
        by_depth={metric: cells for metric in METRICS if (cells := _last_by_depth(group.runs, metric))},
    )


def _numbers(run: Run) -> dict[str, float]:
    loss = smooth(run.loss)
    n_drawn = sum(run.drawn.values())
    return {
        "steps": float(run.at["step"][-1]),
        "tokens": float(run.at["tokens"][-1]),
        "flops": float(run.at["flops"][-1]),
        "loss": float(loss[-1]),
        "best_loss": float(loss.min()),
        "mean_depth": sum(depth * n for depth, n in run.drawn.items()) / n_drawn if n_drawn else np.nan,
        "tokens_per_second": float(np.median(run.tokens_per_second)),
        "seconds": run.seconds,
    }


def _last_by_depth(runs: Sequence[Run], metric: str) -> dict[int, Interval]:
    if not all(metric in run.evaluated for run in runs):
        return {}
    last = [run.evaluated[metric].last() for run in runs]
    depths = sorted(set.intersection(*map(set, last)))
    return {depth: interval([cells[depth] for cells in last]) for depth in depths}
