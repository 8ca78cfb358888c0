"""Figures of training runs, one look for all: print width, colours that colour-blind readers tell apart, no ornament.

Colour says which group, shade says which depth (deeper is darker). ``sheet`` makes a figure and writes it,
``lines_with_intervals`` and ``points_by_depth`` fill its panels, ``draw`` is the report of one or several runs.
"""

import io
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator, PercentFormatter

from localdepth.errors import TrainError
from localdepth_train.intervals import Curve, Interval, average, smooth
from localdepth_train.output import replacing
from localdepth_train.report import METRICS, Group, Run, common_axis, summarise

__all__ = [
    "Look",
    "check_format",
    "draw",
    "label_progress",
    "label_shares",
    "lines_with_intervals",
    "looks_for",
    "points_by_depth",
    "sheet",
]

_FORMATS = (".png", ".svg", ".pdf")

_WIDTH = 7.2  # inches, two columns of print
_ROW = 2.35
_INK = "#333333"
# Okabe and Ito 2008, "Color Universal Design", without the two that are too light for lines
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000")
_STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.labelsize": 8,
    "axes.labelcolor": _INK,
    "axes.edgecolor": "#808080",
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#ececec",
    "grid.linewidth": 0.6,
    "text.color": _INK,
    "xtick.color": "#808080",
    "ytick.color": "#808080",
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.3,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "text.parse_math": False,  # a folder's name may hold a $
    "pdf.fonttype": 42,
    "svg.hashsalt": "localdepth",  # the same figure is the same file
}
_Dashes = Literal["-"] | tuple[float, tuple[float, ...]]
_DASHES: tuple[_Dashes, ...] = ("-", (0, (4, 1.5)), (0, (1, 1.5)))
_SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_AXIS_LABELS = {"flops": "FLOPs", "tokens": "tokens", "step": "step"}
_PLAIN = "{x:g}"
_EXPECTED: _Dashes = (0, (3, 2))
_MAX_LINES, _MIN_DEPTHS = 12, 3  # over training; with many groups a few depths of each, as the last evaluation has all
_LOG_FROM = 10.0  # a loss that falls by more than this factor is drawn on a logarithmic axis
_INTERVALS = "95 % t interval over seeds"


class Look(NamedTuple):
    """How a group is drawn everywhere in a figure."""

    colour: tuple[float, float, float]
    dashes: _Dashes

    def shaded(self, strength: float) -> "Look":
        """From a light tint at 0 to the colour itself at 1."""
        share = 0.3 + 0.7 * strength
        red, green, blue = (1 - share * (1 - part) for part in self.colour)
        return Look((red, green, blue), self.dashes)


_GREY = Look(to_rgb(_INK), "-")


def looks_for(names: Iterable[str]) -> dict[str, Look]:
    """A look for each group: colours first, then dashes. Make it once for all panels of a figure."""
    looks = cycle([Look(to_rgb(colour), dashes) for dashes in _DASHES for colour in _COLOURS])
    return dict(zip(names, looks, strict=False))


def check_format(path: Path) -> None:
    """Refuse a name that no figure can have.

    Raises:
        TrainError: when its ending is none of those we write.
    """
    if path.suffix.lower() not in _FORMATS:
        raise TrainError(f"figure {path.name} must end in one of {', '.join(_FORMATS)}; rename it")


@contextmanager
def sheet(path: Path, panels: Sequence[Sequence[str]]) -> Iterator[dict[str, Axes]]:
    """A figure that is written on leaving, with one legend above for everything its panels label.

    Args:
        panels: names in rows of one, or of two of which the left is wider; a name twice in a row is one wide panel.
    Raises:
        TrainError: when the file's ending is none of those we write.
        StorageError: when it cannot be written.
    """
    check_format(path)
    with rc_context(_STYLE):
        size = (_WIDTH * (0.6 if len(panels[0]) == 1 else 1), _ROW * len(panels) + 0.35)
        figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06))
        axes = figure.subplot_mosaic([list(row) for row in panels], width_ratios=[1.7, 1][: len(panels[0])])
        yield axes
        _add_legend(figure)
        _write(figure, path)


def lines_with_intervals(axes: Axes, curves: Mapping[str, Curve], looks: Mapping[str, Look]) -> None:
    """One labelled line a group, with its interval as a band where it has one."""
    for name, curve in curves.items():
        _line(axes, curve, looks[name], _shown(name))


def points_by_depth(axes: Axes, cells: Mapping[str, Mapping[int, Interval]], looks: Mapping[str, Look]) -> None:
    """One labelled row of points a group over a logarithmic depth axis, with its intervals where it has some."""
    depths = sorted({depth for by_depth in cells.values() for depth in by_depth})
    has_intervals = any(np.isfinite(half) for by_depth in cells.values() for _, half in by_depth.values())
    step_aside = 0.07 if has_intervals else 0.0  # intervals stand side by side
    for i, (name, by_depth) in enumerate(cells.items()):
        look, aside = looks[name], 2 ** (step_aside * (i - (len(cells) - 1) / 2))
        x = [depth * aside for depth in by_depth]
        means, half_widths = zip(*by_depth.values(), strict=True)
        axes.plot(x, means, color=look.colour, linestyle=look.dashes, linewidth=0.9, label=_shown(name))
        if has_intervals:
            axes.errorbar(x, means, half_widths, color=look.colour, linestyle="none", elinewidth=1.1, label=_INTERVALS)
        shades = [look.shaded(_strength(depth, depths)).colour for depth in by_depth]
        axes.scatter(x, means, s=20, c=shades, edgecolors=[look.colour], linewidths=0.8, zorder=3)
    _label_depths(axes, depths)


def label_progress(axes: Axes, axis: str) -> None:
    """Say what x counts, one of ``AXES``; large powers of a thousand stand in the label, not at every tick."""
    power = 3 * int(math.log10(max(axes.get_xlim()[1], 1)) // 3)
    power = power if power > 3 else 0
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 10**power:,g}"))
    axes.set_xlabel(_AXIS_LABELS[axis] + (f" (10{str(power).translate(_SUPERSCRIPT)})" if power else ""))


def label_shares(axes: Axes) -> None:
    """Show y as percentages."""
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def draw(groups: Sequence[Group], path: Path) -> None:
    """Write the report's figure: progress on the left, depth on the right.

    Training loss (smoothed; raw behind it for a single run), depths drawn, and a row for each metric of the
    evaluations. Groups of several runs show means and 95 % t intervals.

    Raises:
        TrainError: when the file's ending is none of those we write, or runs of a group have no stretch in common.
        StorageError: when it cannot be written.
    """
    axis = common_axis(run for group in groups for run in group.runs)
    looks = looks_for(map(_label, groups))
    last = {_label(group): summary.by_depth for group, summary in zip(groups, summarise(groups), strict=True)}
    metrics = [metric for metric in METRICS if any(metric in by_depth for by_depth in last.values())]
    beside = "drawn" if any(run.drawn for group in groups for run in group.runs) else "training"
    with sheet(path, [["training", beside], *([metric, f"last {metric}"] for metric in metrics)]) as axes:
        _draw_training(axes["training"], groups, looks, axis)
        if beside == "drawn":
            _draw_drawn(axes["drawn"], groups, looks)
        for metric in metrics:
            measured = [group for group in groups if metric in last[_label(group)]]
            axes[metric].sharex(axes["training"])
            _draw_over_training(axes[metric], measured, looks, axis, metric)
            cells = {_label(group): last[_label(group)][metric] for group in measured}
            axes[f"last {metric}"].set_title(f"Last evaluation: {metric} by depth")
            points_by_depth(axes[f"last {metric}"], cells, looks)
            if metric == "accuracy":
                label_shares(axes[metric])
                label_shares(axes["last accuracy"])
        label_progress(axes[metrics[-1] if metrics else "training"], axis)


def _shown(name: str) -> str:
    return f" {name}" if name.startswith("_") else name  # matplotlib keeps such labels from legends


def _label(group: Group) -> str:
    return group.name if len(group.runs) == 1 else f"{group.name} ({len(group.runs)} seeds)"


def _draw_training(axes: Axes, groups: Sequence[Group], looks: Mapping[str, Look], axis: str) -> None:
    axes.set_title("Training loss")
    for group in groups:
        if len(group.runs) == 1:
            [run] = group.runs
            faint = looks[_label(group)].shaded(0.1).colour
            axes.plot(run.at[axis], run.loss, color=faint, linewidth=0.5, alpha=0.7, zorder=1, rasterized=True)
    curves = {_label(group): average([(run.at[axis], smooth(run.loss)) for run in group.runs]) for group in groups}
    lines_with_intervals(axes, curves, looks)
    means = np.concatenate([curve.mean for curve in curves.values()])
    if 0 < means.min() * _LOG_FROM < means.max():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(_PLAIN)
    if len(groups) == len(groups[0].runs) == 1:
        _mark_phases(axes, groups[0].runs[0], axis)


def _mark_phases(axes: Axes, run: Run, axis: str) -> None:
    for name, first in run.phases[1:]:
        at = run.at[axis][first]
        axes.axvline(at, color=_INK, linewidth=0.6, linestyle=(0, (1, 2)))
        axes.annotate(f" {name}", (at, 1), xycoords=("data", "axes fraction"), va="top", fontsize=7)


def _draw_drawn(axes: Axes, groups: Sequence[Group], looks: Mapping[str, Look]) -> None:
    """Shares of sequences by depth, and where the mean of the draws should lie."""
    axes.set_title("Depths drawn")
    for group in groups:
        look, counts = looks[_label(group)], Counter[int]()
        for run in group.runs:
            counts.update(run.drawn)
        if not counts.total():
            continue
        edges = np.arange(min(counts), max(counts) + 2) - 0.5
        shares = np.array([counts[depth] for depth in range(min(counts), max(counts) + 1)]) / counts.total()
        if len(groups) == 1:
            axes.stairs(shares, edges, fill=True, color=look.shaded(0.3).colour)
        else:
            axes.stairs(shares, edges, color=look.colour, linestyle=look.dashes, linewidth=1.1)
        expected = np.mean([run.expected_depth.mean() for run in group.runs])
        axes.axvline(expected, color=look.colour, linewidth=1, linestyle=_EXPECTED)
    line = Line2D([], [], color=_INK, linewidth=1, linestyle=_EXPECTED, label="expected mean")
    axes.legend(handles=[line], loc="upper right", borderaxespad=0)
    axes.set_xlabel("depth")
    label_shares(axes)


def _draw_over_training(axes: Axes, groups: Sequence[Group], looks: Mapping[str, Look], axis: str, metric: str) -> None:
    axes.set_title(f"Evaluation {metric}")
    common = [set.intersection(*(set(run.evaluated[metric].depths) for run in group.runs)) for group in groups]
    depths = _spread(sorted(set[int]().union(*common)), max(_MAX_LINES // len(groups), _MIN_DEPTHS))
    for group, known in zip(groups, common, strict=True):
        for depth in (depth for depth in depths if depth in known):
            curve = average([run.evaluated[metric].series(axis, depth) for run in group.runs])
            _line(axes, curve, looks[_label(group)].shaded(_strength(depth, depths)))
    _add_depth_key(axes, depths, looks[_label(groups[0])] if len(groups) == 1 else _GREY)


def _line(axes: Axes, curve: Curve, look: Look, label: str | None = None) -> None:
    few = "o" if len(curve.x) == 1 else None
    axes.plot(curve.x, curve.mean, color=look.colour, linestyle=look.dashes, marker=few, markersize=3, label=label)
    low, high = curve.mean - curve.half_width, curve.mean + curve.half_width
    if np.isfinite(low).any():
        axes.fill_between(curve.x, low, high, color=look.colour, alpha=0.18, linewidth=0, label=_INTERVALS)


def _strength(depth: int, depths: Sequence[int]) -> float:
    """How dark this depth is among those, which rise: from 0 for the first to 1 for the last."""
    return math.log(depth / depths[0]) / math.log(depths[-1] / depths[0]) if depths[-1] > depths[0] else 1.0


def _spread(depths: Sequence[int], n: int) -> list[int]:
    """At most n of them, the first and the last included."""
    return [depths[round(i)] for i in np.linspace(0, len(depths) - 1, min(len(depths), n))]


def _add_depth_key(axes: Axes, depths: Sequence[int], look: Look) -> None:
    """The shades of a panel, at the right of its title."""
    title = Line2D([], [], linestyle="none", label="depth")
    lines = [Line2D([], [], color=look.shaded(_strength(d, depths)).colour, label=str(d)) for d in depths]
    axes.legend(
        handles=[title, *lines],
        loc="lower right",
        bbox_to_anchor=(1, 1),
        borderaxespad=0.7,
        ncols=1 + len(lines),
        handlelength=1,
        handletextpad=0.4,
        columnspacing=0.9,
        borderpad=0,
    )


def _add_legend(figure: Figure) -> None:
    """Every labelled group once, above the panels."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        entries = dict(zip(labels, handles, strict=True)) | entries
    if entries.pop(_INTERVALS, None):
        entries[_INTERVALS] = Patch(color=_INK, alpha=0.18, linewidth=0)
    n_letters = 17 * figure.get_figwidth()
    columns = max(1, int(n_letters / (max(map(len, entries)) + 8)))
    figure.legend(entries.values(), entries.keys(), loc="outside upper left", ncols=columns)


def _label_depths(axes: Axes, depths: Sequence[int]) -> None:
    shown = depths if len(depths) <= 8 else [depth for depth in depths if depth & (depth - 1) == 0]
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(_PLAIN)
    axes.set_xlabel("depth")


def _write(figure: Figure, path: Path) -> None:
    kind = path.suffix[1:].lower()
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    drawn = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # a name in a script the font lacks
        figure.savefig(drawn, format=kind, dpi=200, metadata=undated)
    with replacing(path) as file:
        file.append(drawn.getbuffer())
