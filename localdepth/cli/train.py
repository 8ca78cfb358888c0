"""``train``: run a recipe."""

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from localdepth import console
from localdepth.cli.common import INTERRUPTED, app, brief, command, needs, stop_on_interrupt
from localdepth.cli.options import JsonOption

__all__ = ["train_app", "train_run"]

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
        from localdepth_train.trackers import tracking
        from localdepth_train.trainer import train
    from localdepth_train.recipe import load_recipe

    plan = load_recipe(recipe).given(None if start is None else str(start), text)
    with (
        stop_on_interrupt(
            lambda: console.notes.print("stopping after this step; press Ctrl-C again to lose it")
        ) as interrupted,
        console.tracking("training") as show,
        nullcontext(lambda record: None) if track is None else tracking(track, out) as send,
    ):
        shown = _Shown(plan.steps, show)

        def on_record(record: Mapping[str, Any]) -> None:
            send(record)
            shown(record)

        report = train(plan, out, on_record=on_record, should_stop=interrupted.is_set)
    if report.checkpoint is None:
        console.notes.print(f"saved at step {report.steps} of {plan.steps}; the same command goes on from there")
        return INTERRUPTED
    if as_json:
        console.emit({"steps": report.steps, "loss": report.loss, "checkpoint": str(report.checkpoint)})
    else:
        console.say.print(f"{report.steps} steps, loss {report.loss:.4f}, checkpoint {report.checkpoint}")
    return 0


class _Shown:
    """Progress on standard error: a bar where a person looks, else a line now and then; evaluations stay."""

    def __init__(self, n_steps: int, show: Callable[..., None]) -> None:
        self._n_steps, self._show = n_steps, show
        self._next = 0.0  # time of the next line

    def __call__(self, record: Mapping[str, Any]) -> None:
        step = record["step"]
        if "evaluation" in record:
            for measure in ("loss", "accuracy"):
                if by_depth := record["evaluation"].get(measure):
                    console.notes.print(f"step {step} of {self._n_steps}, {measure} by depth: {brief(by_depth)}")
            return
        how = f"loss {record['loss']:.3f}, {record['tokens_per_second']:,} tokens/s"
        self._show(step, self._n_steps, how)
        if not console.notes.is_terminal and time.monotonic() >= self._next:
            console.notes.print(f"step {step} of {self._n_steps}: {how}")
            self._next = time.monotonic() + _LINE_EVERY_S
