"""Model files: ``inspect``, ``verify``."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from localdepth import console
from localdepth.cli.common import CHECK_FAILED, app, brief, command, needs
from localdepth.cli.options import (
    ImportanceOption,
    JsonOption,
    KvTypeOption,
    LowMemoryOption,
    NCtxOption,
    RingOption,
    parse_ints,
    read_text,
)
from localdepth.errors import MissingExtra
from localdepth.loading import locate, plan_file
from localdepth.memory import MemoryPlan, as_size
from localdepth.record import summary
from localdepth.store.disk import open_model

__all__ = ["inspect", "verify"]

_SHOWN_DEPTHS = (1, 4, 8, 16, 32)


@app.command()
@command
def inspect(
    file: Annotated[Path, typer.Argument(help="Model file or folder, or a name from `models list`.")],
    n_ctx: NCtxOption = None,
    ring: RingOption = None,
    kv_type: KvTypeOption = None,
    low_memory: LowMemoryOption = False,
    check: Annotated[bool, typer.Option("--check", help="Compare the weights with the checksum in the file.")] = False,
    as_json: JsonOption = False,
) -> int:
    """Show what a model file holds and what it would take of the memory, without loading its weights."""
    with open_model(locate(file)) as opened:
        record, config = summary(opened), opened.config
        depths = {1, config.default_depth, *(d for d in _SHOWN_DEPTHS if d <= config.max_depth), config.max_depth}
        try:
            plans = plan_file(opened, sorted(depths), n_ctx=n_ctx, ring=ring, kv_type=kv_type, low_memory=low_memory)
        except MissingExtra as missing:
            plans = []
            console.notes.print(f"memory is not known: {missing}")
        if check:
            with console.waiting("comparing checksums"):
                record["intact"] = opened.is_intact()
    code = CHECK_FAILED if record.get("intact") is False else 0
    if as_json:
        console.emit({**record, "memory": [planned.to_dict() for planned in plans]})
        return code
    del record["config"]
    console.show_facts({key: str(value) for key, value in config.to_dict().items()})
    console.say.print()
    console.show_facts({key: brief(value) for key, value in record.items()})
    if plans:
        console.say.print()
        _show_memory(plans)
    return code


def _show_memory(plans: Sequence[MemoryPlan]) -> None:
    rows = [(str(p.depth), *map(as_size, (p.weights, p.kv, p.states + p.rows, p.scratch, p.total))) for p in plans]
    sharing = "" if plans[0].ring is None else f", ring {plans[0].ring}"
    copies = "".join(f", {as_size(size)} copied as {name}" for name, size in plans[0].packed.items())
    title = f"memory for {plans[0].n_ctx} positions, {plans[0].kv_type}{sharing}"
    console.show_table(("depth", "weights", "K/V", "rows", "scratch", "all"), rows, title)
    console.say.print(f"weights: {as_size(plans[0].mapped)} mapped{copies}")


@app.command()
@command
def verify(
    file: Annotated[Path, typer.Argument(help="Model file or folder; the result is written into it.")],
    checkpoint: Annotated[Path, typer.Argument(help="The directory it was exported from.")],
    depths: Annotated[str, typer.Option("--depths", help="Depths to compare.")] = "1,2,4,8,16",
    text: Annotated[Path | None, typer.Option("--text", help="Text to run; random tokens without it.")] = None,
    importance: ImportanceOption = None,
    record: Annotated[bool, typer.Option("--record/--no-record", help="Write the result into the file.")] = True,
    as_json: JsonOption = False,
) -> int:
    """Compare a model file with its checkpoint, depth by depth, against the reference."""
    with needs("onnx,train" if file.is_dir() else "export,train"):
        from localdepth_export.importance import Importance
        from localdepth_export.verification import verify as run

    with console.waiting("comparing"):
        report = run(
            file,
            checkpoint,
            depths=parse_ints("depths", depths),
            text=None if text is None else read_text(text),
            importance=None if importance is None else Importance.load(importance),
            record=record,
        )
    check = report.check
    if as_json:
        console.emit(
            {
                "passed": report.passed,
                "quant": report.quant,
                "n_tokens": report.n_tokens,
                "wrong_tensors": report.wrong_tensors,
                "exact": report.exact,
                **asdict(check),
            }
        )
    else:
        lines = zip(check.depths, check.max_abs, check.kl, check.top1, strict=True)
        rows = [(str(d), f"{a:.2e}", f"{kl:.2e}", f"{100 * top:.1f} %") for d, a, kl, top in lines]
        console.show_table(("depth", "max abs", "KL, nats", "same top-1"), rows)
        console.say.print(f"{report.n_tokens} positions of {report.text_source}; {report.verdict}")
    return 0 if report.passed else CHECK_FAILED
