"""``train``: run a recipe."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from localdepth import console
from localdepth.cli.common import INTERRUPTED, app, brief, command, needs, stop_on_interrupt
from localdepth.cli.options import JsonOption

__all__ = ["duration", "train_app", "train_run"]

_LINE_EVERY_S = 10.0

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
    """Train a model from a recipe; Ctrl-C saves and stops, the same command goes on."""
    with needs("train"):
        from localdepth_train.team import is_first
        from localdepth_train.trainer import train
    from localdepth_train.recipe import load_recipe

    plan = load_recipe(recipe).given(None if start is None else str(start), text)
    speaks = is_first()  # of several processes; the others say nothing but errors
    if not speaks:
        console.quiet_pipe()
    with (
        stop_on_interrupt(_say_stopping if speaks else lambda: None) as interrupted,
        _following(plan.steps, track, out) if speaks else nullcontext(lambda record: None) as on_record,
    ):
        report = train(plan, out, on_record=on_record, should_stop=interrupted.is_set)
    checkpoint = None if report.checkpoint is None else str(report.checkpoint)
    if checkpoint is None and speaks:
        console.notes.print(f"saved at step {report.steps} of {plan.steps}; the same command goes on from there")
    if as_json:
        console.emit({"steps": report.steps, "loss": report.loss, "checkpoint": checkpoint})
    elif checkpoint is not None:
        console.say.print(f"{report.steps} steps, loss {report.loss:.4f}, checkpoint {checkpoint}")
    return INTERRUPTED if checkpoint is None else 0


def duration(seconds: float) -> str:
    """Seconds for people: "3 min 20 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def _say_stopping() -> None:
    console.notes.print("stopping after this step; press Ctrl-C again to lose it")


@contextmanager
def _following(n_steps: int, track: str | None, out: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yields what takes the records of a run: they are shown, and sent to a tracker."""
    from localdepth_train.trackers import tracking

    with (
        console.tracking("training") as show,
        nullcontext(lambda record: None) if track is None else tracking(track, out) as send,
    ):
        shown = _Shown(n_steps, show)

        def on_record(record: Mapping[str, Any]) -> None:
            send(record)
            shown(record)

        yield on_record


class _Shown:
    """Progress on standard error: a bar where a person looks, else a line now and then; what is rare stays."""

    def __init__(self, n_steps: int, show: Callable[..., None]) -> None:
        self._n_steps, self._show = n_steps, show
        self._first: Mapping[str, Any] | None = None  # record of a step in this process
        self._next = 0.0  # seconds of the run at the next line

    def __call__(self, record: Mapping[str, Any]) -> None:
        where = f"step {record['step']} of {self._n_steps}"
        if "changed" in record:
            for name, (old, new) in record["changed"].items():
                console.notes.print(f"{where}, going on with {name} {brief(new)}, which was {brief(old)}")
        elif "evaluation" in record:
            for measure in ("loss", "accuracy"):
                if by_depth := record["evaluation"].get(measure):
                    console.notes.print(f"{where}, {measure} by depth: {brief(by_depth)}")
        else:
            self._show_step(where, record)

    def _show_step(self, where: str, record: Mapping[str, Any]) -> None:
        how = f"loss {record['loss']:.3f}, {record['tokens_per_second']:,} tokens/s, {record['flops']:.2e} FLOPs"
        self._show(record["step"], self._n_steps, how)
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
