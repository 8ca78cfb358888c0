"""``train``: run a recipe."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localdepth import console
from localdepth.cli.common import INTERRUPTED, app, brief, command, needs, stop_on_interrupt
from localdepth.cli.options import JsonOption

if TYPE_CHECKING:
    from localdepth_train.recipe import Recipe
    from localdepth_train.trainer import Report

__all__ = ["duration", "train_app", "train_run"]

_LINE_EVERY_S = 10.0
_MEASURES = {"loss": "{:.3f}".format, "accuracy": "{:.1%}".format}  # of an evaluation

train_app = typer.Typer(help="Train looped models.", no_args_is_help=True)
app.add_typer(train_app, name="train")


@train_app.command("run")
@command
def train_run(
    recipe: Annotated[Path, typer.Argument(help="TOML file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run; a stopped run goes on there.")],
    start: Annotated[
        Path | None, typer.Option("--start", help="Checkpoint folder to start from, instead of the recipe's.")
    ] = None,
    text: Annotated[
        str | None, typer.Option("--text", help="File, glob or folder of text, instead of the recipe's sources.")
    ] = None,
    track: Annotated[str | None, typer.Option("--track", help="Also send the log to tensorboard or trackio.")] = None,
    as_json: JsonOption = False,
) -> int:
    """Train a model from a recipe; Ctrl-C, SIGTERM or a closed window saves and stops, the same command goes on."""
    with needs("train"):
        from localdepth_train.team import is_first
        from localdepth_train.trainer import train
    from localdepth_train.recipe import load_recipe

    plan = load_recipe(recipe).given(None if start is None else str(start), text)
    speaks = is_first()  # of several processes; the others say nothing but errors
    if not speaks:
        console.quiet_pipe()
    with (
        stop_on_interrupt(_say_stopping if speaks else lambda: None, on_any=True) as interrupted,
        _following(plan, track, out) if speaks else nullcontext(lambda record: None) as on_record,
    ):
        report = train(plan, out, on_record=on_record, should_stop=interrupted.is_set)
    checkpoint = None if report.checkpoint is None else str(report.checkpoint)
    if checkpoint is None and speaks:
        console.notes.print(f"saved at step {report.steps} of {plan.steps}; the same command goes on from there")
    if as_json:
        console.emit({"steps": report.steps, "loss": report.loss, "checkpoint": checkpoint})
    elif checkpoint is not None:
        console.say.print(_ending(report, checkpoint))
    return INTERRUPTED if checkpoint is None else 0


def duration(seconds: float) -> str:
    """Seconds for people: "3 min 20 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def _ending(report: "Report", checkpoint: str) -> str:
    if report.began == report.steps:
        return f"already finished: {report.steps} steps, checkpoint {checkpoint}; give a new folder to train again"
    return f"{report.steps} steps, loss {report.loss:.4f} at the last, checkpoint {checkpoint}"


def _say_stopping() -> None:
    console.notes.print("stopping after this step; press Ctrl-C again to lose it")


@contextmanager
def _following(plan: "Recipe", track: str | None, out: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yields what takes the records of a run: they are shown, and sent to a tracker."""
    from localdepth_train.trackers import tracking

    with (
        console.tracking("training") as show,
        nullcontext(lambda record: None) if track is None else tracking(track, out) as send,
    ):
        shown = _Shown(plan, show)

        def on_record(record: Mapping[str, Any]) -> None:
            send(record)
            shown(record)

        yield on_record


class _Shown:
    """Progress on standard error: a bar where a person looks, else a line now and then; what is rare stays."""

    def __init__(self, plan: "Recipe", show: Callable[..., None]) -> None:
        self._n_steps, self._has_phases, self._show = plan.steps, len(plan.phases) > 1, show
        self._first: Mapping[str, Any] | None = None  # record of a step in this process
        self._next = 0.0  # seconds of the run at the next line

    def __call__(self, record: Mapping[str, Any]) -> None:
        phase = f", {record['phase']}" if self._has_phases else ""
        where = f"step {record['step']} of {self._n_steps}{phase}"
        if "changed" in record:
            for name, (old, new) in record["changed"].items():
                console.notes.print(f"{where}, going on with {name} {brief(new)}, which was {brief(old)}")
        elif "evaluation" in record:
            for measure, as_text in _MEASURES.items():
                if found := record["evaluation"].get(measure):
                    by_depth = ", ".join(f"depth {depth}: {as_text(value)}" for depth, value in found.items())
                    console.notes.print(f"{where}, {measure} at {by_depth}")
        else:
            self._show_step(where, phase, record)

    def _show_step(self, where: str, phase: str, record: Mapping[str, Any]) -> None:
        how = f"loss {record['loss']:.3f}, {record['tokens_per_second']:,} tokens/s, {record['flops']:.2e} FLOPs"
        self._show(record["step"], self._n_steps, f"{how}{phase}")
        if not console.notes.is_terminal and record["seconds"] >= self._next:
            console.notes.print(f"{where}: {how}{self._left(record)}")
            self._next = record["seconds"] + _LINE_EVERY_S

    def _left(self, record: Mapping[str, Any]) -> str:
        """How long the rest takes at the pace of this process so far; empty at its first step."""
        self._first = first = self._first or record
        done = record["step"] - first["step"]
        if not done:
            return ""
        pace = (record["seconds"] - first["seconds"]) / done
        return f", {duration(pace * (self._n_steps - record['step']))} left"
