"""``retrofit``: make a looped model of a plain one."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localdepth import console
from localdepth.cli.common import app, command, needs
from localdepth.cli.options import JsonOption
from localdepth.memory import as_size
from localdepth.store.checkpoint import fetch_checkpoint
from localdepth.store.hub import Hub
from localdepth_train.layer_choice import PRESETS, spell_layers

if TYPE_CHECKING:
    from localdepth_train.surgery import Surgery

__all__ = ["retrofit"]

_SHOWN_DEPTHS = (1, 2, 4, 8, 16, 32)


def _presets() -> str:
    """The published choices of layers, a line each."""
    rows = [("Presets:", "prelude", "core", "coda", "of a base of")]
    for name, preset in PRESETS.items():
        prelude, core, coda = (spell_layers(layers) for _, layers in preset.layers.stages())
        rows.append((f"  {name}", prelude, core, coda, f"{preset.n_layer} layers"))
    lines = (f"{name:<21}{prelude:<9}{core:<7}{coda:<7}{base}" for name, prelude, core, coda, base in rows)
    return "\n".join(("\b", *lines))  # \b keeps the lines as they are


@app.command(epilog=_presets())
@command
def retrofit(
    base: Annotated[str, typer.Argument(help="Directory of a plain model, or OWNER/NAME[@REVISION] on the Hub.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    prelude: Annotated[
        str | None, typer.Option("--prelude", help="Layers before the core, counted from 0: 0-3 or 0,2,5-7 or none.")
    ] = None,
    core: Annotated[str | None, typer.Option("--core", help="Layers to repeat, written the same way.")] = None,
    coda: Annotated[str | None, typer.Option("--coda", help="Layers after the core.")] = None,
    preset: Annotated[
        str | None, typer.Option("--preset", help="A published choice instead of these three, see below.")
    ] = None,
    layout: Annotated[str, typer.Option("--layout", help="ours, or published: files for the published code.")] = "ours",
    injection: Annotated[
        str, typer.Option("--injection", help="How embeds enter a pass: concat_linear or add.")
    ] = "concat_linear",
    init: Annotated[
        str,
        typer.Option(
            "--init",
            help="paper: drawn. identity: the kept layers as they are at every depth. pass-through: at depth 1.",
        ),
    ] = "paper",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the draw of --init paper.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Make a looped model of a Llama, Mistral, OLMo-2, Qwen2 or Qwen3 model: a start for `train run`."""
    with needs("export"):
        from localdepth_train.surgery import retrofit as run
    folder = _on_this_machine(base)
    with console.tracking("writing") as on_progress:
        made = run(
            folder,
            out,
            prelude=prelude,
            core=core,
            coda=coda,
            preset=preset,
            layout=layout,
            injection=injection,
            init=init,
            seed=seed,
            source=None if Path(base).is_dir() else base,
            on_progress=on_progress,
        )
    if as_json:
        console.emit(_record(made))
    else:
        _show(made)


def _on_this_machine(base: str) -> Path:
    """A directory as it is; anything else is a repository, fetched if need be."""
    if Path(base).exists():
        return Path(base)
    console.notes.print(console.plain(f"there is no folder {base} here; asking the Hugging Face Hub for it"))
    with console.tracking_all() as progress:
        return fetch_checkpoint(base, Hub(), _judge, progress)


def _judge(record: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    from localdepth_train.checkpoint.plain import recognise_plain

    recognise_plain(record, shapes, Path(where))


def _record(made: "Surgery") -> dict[str, Any]:
    costs = {str(depth): made.cost(depth) for depth in _SHOWN_DEPTHS}
    before = made.base_cost()
    return {
        "path": str(made.path),
        "kind": made.kind,
        "layers": dict(made.layers.stages()),
        "dropped": made.dropped,
        "init": made.init,
        "has_replaced": made.has_replaced,
        "n_params": made.config.n_params,
        "params": made.parameters(),
        "flops_per_token": {depth: cost.flops for depth, cost in costs.items()},
        "kv_bytes_per_token": {depth: cost.kv_bytes for depth, cost in costs.items()},
        "base": {
            "n_layers": made.base.n_core,
            "n_params": made.base.n_params,
            "flops_per_token": before.flops,
            "kv_bytes_per_token": before.kv_bytes,
        },
        "config": made.config.to_dict(),
    }


def _show(made: "Surgery") -> None:
    places, counts, before = dict(made.layers.stages()), made.parameters(), made.base_cost()
    rows = [(part, spell_layers(places[part]) if part in places else "-", f"{n:,}") for part, n in counts.items()]
    rows += [("dropped", spell_layers(made.dropped), "-"), ("all", "-", f"{made.config.n_params:,}")]
    base = f"{made.kind}, {made.base.n_core} layers, {made.base.n_params:,} parameters"
    console.say.print(console.plain(f"{made.path}, from {base}"))
    if made.has_replaced:
        console.say.print("it replaces the retrofit in that folder, which was not trained")
    console.say.print(f"injection {made.config.injection}, init {made.init}\n")
    console.show_table(("part", "layers of the base", "parameters"), rows)
    console.say.print()
    costs = [("base", before, 1.0)]
    costs += [(str(depth), cost, cost.flops / before.flops) for depth in _SHOWN_DEPTHS for cost in [made.cost(depth)]]
    console.show_table(
        ("depth", "FLOPs a token", "of the base", "K/V a token"),
        [(name, f"{cost.flops:,}", f"{share:.2f}", as_size(cost.kv_bytes)) for name, cost, share in costs],
    )
