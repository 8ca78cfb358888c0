"""Choosing a quant: ``export importance`` and ``export compare``."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from localdepth import console
from localdepth.cli.common import command, needs
from localdepth.cli.export import export_app
from localdepth.cli.options import ImportanceOption, JsonOption, parse_ints, read_text

__all__ = ["compare", "importance"]

TextOption = Annotated[Path, typer.Option("--text", help="Text to run, UTF-8.")]


@export_app.command()
@command
def importance(
    file: Annotated[Path, typer.Argument(help="Model file, best one of F32, BF16 or Q8_0.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")],
    text: TextOption,
    depths: Annotated[str | None, typer.Option("--depths", help="Depths to run; the model's default.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Positions to run at most.")] = 16_384,
    as_json: JsonOption = False,
) -> None:
    """Measure on a text how much each column of each matrix counts, for ``export gguf --importance``."""
    with needs("export"):
        from localdepth_export.importance import collect

    with console.tracking("reading") as on_progress:
        found = collect(
            file,
            read_text(text),
            depths=parse_ints("depths", depths) if depths else None,
            max_tokens=max_tokens,
            on_progress=on_progress,
        )
    found.save(out)
    if as_json:
        console.emit({"path": str(out), "n_matrices": len(found.columns), "origin": found.origin})
    else:
        console.say.print(f"{out}: importance for {len(found.columns)} matrices from {found.origin}")


@export_app.command()
@command
def compare(
    checkpoint: Annotated[Path, typer.Argument(help="Directory of a Huginn, retrofit or localdepth checkpoint.")],
    text: TextOption,
    quant: Annotated[
        list[str] | None, typer.Option("--quant", "-q", help='A recipe as "Q4_K,core=Q6_K"; may be repeated.')
    ] = None,
    depths: Annotated[str | None, typer.Option("--depths", help="Depths; 1, 2, 4, ... to the model's default.")] = None,
    importance: ImportanceOption = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Positions to compare at most.")] = 1024,
    as_json: JsonOption = False,
) -> None:
    """Show what each recipe costs and how far it moves the logits, by depth, against float32."""
    with needs("export"):
        from localdepth_export.divergence import RECIPES, compare_recipes
        from localdepth_export.importance import Importance

    with console.tracking("comparing") as on_progress:
        outcomes = compare_recipes(
            checkpoint,
            read_text(text),
            recipes=quant or RECIPES,
            depths=parse_ints("depths", depths) if depths else None,
            importance=None if importance is None else Importance.load(importance),
            max_tokens=max_tokens,
            on_progress=on_progress,
        )
    if as_json:
        console.emit({"recipes": [asdict(outcome) for outcome in outcomes]})
        return
    headings = ["recipe", "bytes", "bits", *(f"depth {depth}" for depth in outcomes[0].by_depth)]
    rows = [
        [
            outcome.recipe,
            f"{outcome.n_bytes:,}",
            f"{outcome.bits:.2f}",
            *(f"{found.kl:.1e} {100 * found.top1:5.1f} %" for found in outcome.by_depth.values()),
        ]
        for outcome in outcomes
    ]
    console.show_table(headings, rows, "mean KL in nats, and same best token")
    if fallen := max(outcome.n_fallbacks for outcome in outcomes):
        console.say.print(f"up to {fallen} matrices have rows that hold no block of the quant and are stored finer")
