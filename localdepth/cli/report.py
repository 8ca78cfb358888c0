"""``train report``: what the logs of training runs say, as a table and a figure."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from localdepth import console
from localdepth.cli.common import command, needs
from localdepth.cli.options import JsonOption
from localdepth.cli.train import duration, train_app

if TYPE_CHECKING:
    from localdepth_train.intervals import Interval
    from localdepth_train.report import Summary

__all__ = ["train_report"]


@train_app.command("report")
@command
def train_report(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders of training runs, one or several.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The figure, .png, .svg or .pdf; without it one run has RUN/report.png."),
    ] = None,
    by_seed: Annotated[
        bool,
        typer.Option(
            "--group-seeds", help="Average runs that differ only in a last -seed0, -seed1, ... or /seed0, ..."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> int:
    """Compare training runs: a table, and a figure of loss, evaluations by depth and depths drawn."""
    with needs("train"):
        from localdepth_train.figures import check_format, draw
    from localdepth_train.report import as_groups, read_runs, summarise

    figure = out or (folders[0] / "report.png" if len(folders) == 1 else None)
    if figure:
        check_format(figure)
    groups = as_groups(read_runs(folders), by_seed=by_seed)
    summaries = summarise(groups)
    if not as_json:
        _show(summaries)
    if figure:
        with console.waiting("drawing"):
            draw(groups, figure)
    if as_json:
        runs = [summary.to_dict() for summary in summaries]
        console.emit({"runs": runs, "figure": str(figure) if figure else None})
    else:
        console.notes.print(f"figure: {figure}" if figure else "give -o FILE.png for a figure of several runs")
    return 0


def _show(summaries: "Sequence[Summary]") -> None:
    rows = [
        [heading, *(_cell(summary.numbers[name], as_text) for summary in summaries)]
        for name, (heading, as_text) in _ROWS.items()
    ]
    for metric, as_text in _METRICS.items():
        for depth in sorted({depth for summary in summaries for depth in summary.by_depth.get(metric, ())}):
            cells = (summary.by_depth.get(metric, {}).get(depth) for summary in summaries)
            rows.append([f"{metric} at depth {depth}", *(_cell(cell, as_text) for cell in cells)])
    console.show_table(["", *(summary.name for summary in summaries)], rows)
    if any(len(summary.runs) > 1 for summary in summaries):
        n_runs = ", ".join(f"{summary.name} {len(summary.runs)}" for summary in summaries)
        console.say.print(f"mean ± half of the 95 % t interval over seeds: {n_runs}")


def _cell(value: "Interval | None", as_text: Callable[[float], str]) -> str:
    if value is None or math.isnan(value.mean):
        return "-"
    return as_text(value.mean) + (f" ± {as_text(value.half_width)}" if value.half_width > 0 else "")


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _loss(value: float) -> str:
    return f"{value:.4f}"


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


_ROWS: dict[str, tuple[str, Callable[[float], str]]] = {
    "steps": ("steps", _count),
    "tokens": ("tokens", _count),
    "flops": ("FLOPs", "{:.3g}".format),
    "seconds": ("wall time", duration),
    "tokens_per_second": ("tokens/s", _count),
    "mean_depth": ("mean depth drawn", "{:.2f}".format),
    "loss": ("training loss, last (smoothed)", _loss),
    "best_loss": ("training loss, best (smoothed)", _loss),
}
_METRICS: dict[str, Callable[[float], str]] = {"loss": _loss, "accuracy": _share}
