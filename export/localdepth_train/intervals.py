"""Means over repeated runs, with 95 % intervals after Student's t: what three seeds say, and how surely."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from localdepth.errors import TrainError

__all__ = ["F64", "Curve", "Interval", "average", "interval", "smooth", "t_quantile"]

F64 = NDArray[np.float64]

_T_SMALL = (12.70620, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.30600, 2.26216, 2.22814)
_GRID = 400  # points of a curve, more than a figure can show


class Interval(NamedTuple):
    """A mean and the half width of its 95 % interval, which one value alone does not have: NaN."""

    mean: float
    half_width: float


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """A mean over runs along x; all three are [n], the half widths NaN where there is one run."""

    x: F64
    mean: F64
    half_width: F64


def t_quantile(df: int) -> float:
    """The 97.5 % point of Student's t with ``df`` >= 1 degrees of freedom, to 2e-4.

    Source: a table up to ten; beyond, the expansion of Abramowitz and Stegun 26.7.5.
    """
    if df <= len(_T_SMALL):
        return _T_SMALL[df - 1]
    z = NormalDist().inv_cdf(0.975)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / df + second / df**2 + third / df**3


def interval(values: Sequence[float]) -> Interval:
    """Mean of one value per run and the half width of its 95 % t interval."""
    mean, half_width = _over_runs(np.asarray(values, np.float64))
    return Interval(float(mean), float(half_width))


def average(series: Sequence[tuple[F64, F64]]) -> Curve:
    """The mean of several runs' (x, y), x rising, where all of them have been; between points it is straight.

    Raises:
        TrainError: when there is no such place.
    """
    start, end = max(x[0] for x, _ in series), min(x[-1] for x, _ in series)
    if start > end:
        raise TrainError(
            f"one run begins at {start:.3g}, another ends at {end:.3g}; they have no mean, report them apart"
        )
    grid = np.unique(np.concatenate([x for x, _ in series]))
    grid = grid[(grid >= start) & (grid <= end)]
    if len(grid) > _GRID:
        grid = np.linspace(start, end, _GRID)
    return Curve(grid, *_over_runs(np.stack([np.interp(grid, x, y) for x, y in series])))


def smooth(values: F64, share: float = 0.02) -> F64:
    """The mean around each value over this share of all, fewer at the ends; [n] -> [n]."""
    n = len(values)
    reach, at = round(n * share / 2), np.arange(n)
    first, end = np.maximum(at - reach, 0), np.minimum(at + reach + 1, n)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    smoothed: F64 = (sums[end] - sums[first]) / (end - first)
    return smoothed


def _over_runs(values: F64) -> tuple[F64, F64]:
    """Mean and half width over the first axis."""
    n = len(values)
    mean: F64 = values.mean(axis=0)
    if n == 1:
        return mean, np.full_like(mean, np.nan)
    half_width: F64 = t_quantile(n - 1) * values.std(axis=0, ddof=1) / np.sqrt(n)
    return mean, half_width
