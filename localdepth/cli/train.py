"""``train``: run a recipe."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from localdepth import console
from localdepth.cli.common import INTERRUPTED, app, brief, command, needs, stop_on_interrupt
from localdepth.cli.options import JsonOption

__all__ = ["train_app", "train_run"]

train_app = typer.Typer(help="Train looped models.", no_args_is_help=True)
app.add_typer(train_app, name="train")


@train_app.command("run")
@command
def train_run(
    recipe: Annotated[Path, typer.Argument(help="TOML file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run; a stopped run goes on there.")],
    as_json: JsonOption = False,
) -> int:
    """Train a model from a recipe; Ctrl-C saves and stops, the same command goes on."""
    with needs("train"):
        from localdepth_train.trainer import train
    from localdepth_train.recipe import load_recipe

    plan = load_recipe(recipe)
    with stop_on_interrupt(
        lambda: console.notes.print("stopping after this step; press Ctrl-C again to lose it")
    ) as interrupted:
        report = train(
            plan, out, on_record=lambda record: _show_progress(record, plan.steps), should_stop=interrupted.is_set
        )
    if report.checkpoint is None:
        console.notes.print(f"saved at step {report.steps} of {plan.steps}; the same command goes on from there")
        return INTERRUPTED
    if as_json:
        console.emit({"steps": report.steps, "loss": report.loss, "checkpoint": str(report.checkpoint)})
    else:
        console.say.print(f"{report.steps} steps, loss {report.loss:.4f}, checkpoint {report.checkpoint}")
    return 0


def _show_progress(record: Mapping[str, Any], n_steps: int) -> None:
    facts = ", ".join(f"{key} {brief(value)}" for key, value in record.items() if key in ("loss", "accuracy"))
    console.notes.print(f"step {record['step']} of {n_steps}: {facts}")
