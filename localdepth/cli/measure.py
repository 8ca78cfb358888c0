"""Measurements: ``curve``, ``bench``."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from localdepth import console
from localdepth.cli.common import app, command
from localdepth.cli.options import (
    DeviceOption,
    EngineOption,
    JsonOption,
    KvDepthOption,
    KvTypeOption,
    LowMemoryOption,
    ModelOption,
    NCtxOption,
    RingOption,
    ThreadsOption,
    parse_ints,
)
from localdepth.errors import ContextOverflow, RequestError
from localdepth.loading import load
from localdepth.memory import as_size
from localdepth.model import Model

__all__ = ["bench", "curve"]

_FOR_WHOM = "fresh questions are for models trained on such; measure any other on a text with --text FILE"
_Questions = tuple[list[Any], Callable[[Any, str], bool], str]  # what to ask, the judge, a note for people


@app.command()
@command
def curve(
    model: ModelOption = None,
    depths: Annotated[str, typer.Option("--depths", help="Depths to measure.")] = "1,2,3,4,6,8,12,16,32,64",
    seed: Annotated[int, typer.Option("--seed", help="Which fresh questions are asked.")] = 0,
    per_cell: Annotated[
        int,
        typer.Option("--per-cell", min=1, help="Questions for each number of steps, of all kinds together."),
    ] = 300,
    steps: Annotated[str, typer.Option("--steps", help="How many steps fresh questions take.")] = "1,2,3,4,5,6,7,8",
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Ask these instead: JSONL with question, answer and, if known, family, steps."),
    ] = None,
    text: Annotated[
        str | None, typer.Option("--text", help="Predict this text instead: file, glob or folder of .jsonl or .txt.")
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Tokens of the text at most.")] = 16_384,
    engine: EngineOption = "auto",
    n_threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure by depth: right answers to fresh questions of the default model's kinds, or the loss on a text."""
    from localdepth_apps.curve import measure

    wanted = parse_ints("depths", depths)
    if text is not None:
        if data:
            raise RequestError(f"data={data} and text={text!r} are two measurements; ask for one at a time")
        _text_curve(model, text, wanted, max_tokens, engine, n_threads, as_json)
        return
    questions, is_right, note = (
        _questions_from(data) if data else _fresh_questions(seed, per_cell, parse_ints("steps", steps))
    )
    if model and not data:
        console.notes.print(_FOR_WHOM)
    with console.waiting("loading"):
        loaded = load(model, engine=engine, n_threads=n_threads)
    try:
        with loaded, console.ticking("asking", len(questions) * len(wanted)) as tick:
            result = measure(loaded, questions, wanted, is_right, tick)
    except ContextOverflow as error:
        if data:
            raise
        raise ContextOverflow(f"{error}; {_FOR_WHOM}") from error
    if as_json:
        console.notes.print(note)
        console.emit(result.to_dict())
        return
    headings = ["depth", *map(str, wanted), "90 % at"]
    passes = {f"{steps} steps": "-" if depth is None else str(depth) for steps, depth in result.passes_to(0.9).items()}
    rows = [(f"{n} steps", cells) for n, cells in sorted(result.by_steps.items())]
    rows += [*sorted(result.by_family.items()), ("all", result.total)]
    shown: list[list[str | Text]] = [
        [name, *(console.shade(cells[depth].accuracy) for depth in wanted), passes.get(name, "")]
        for name, cells in rows
    ]
    shown.append(["ms an answer", *(f"{result.ms[depth]:.0f} " for depth in wanted), ""])
    console.show_table(headings, shown, "right answers in %, by depth; and the depth that reaches 90 %")
    console.say.print(note)


@app.command()
@command
def bench(
    model: ModelOption = None,
    depths: Annotated[str | None, typer.Option("--depths", help="Depths to measure; powers of two without.")] = None,
    threads: Annotated[str | None, typer.Option("--threads", help="Compute threads; 1,2 compares two numbers.")] = None,
    n_prompt: Annotated[int | None, typer.Option("--prompt", help="Tokens of a prompt; 128 where they fit.")] = None,
    n_generated: Annotated[int | None, typer.Option("--tokens", help="Tokens of an answer; 32 where they fit.")] = None,
    rounds: Annotated[int, typer.Option("--rounds", help="Measurements of each speed.")] = 3,
    engine: EngineOption = "auto",
    device: DeviceOption = "auto",
    n_ctx: NCtxOption = None,
    ring: RingOption = None,
    kv_depth: KvDepthOption = None,
    kv_type: KvTypeOption = None,
    low_memory: LowMemoryOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure tokens a second by depth: reading a prompt (prefill), and writing an answer (decode)."""
    from localdepth_apps.bench import measure

    def open_model(n_threads: int | None) -> Model:
        return load(
            model,
            engine=engine,
            device=device,
            n_ctx=n_ctx,
            n_threads=n_threads,
            ring=ring,
            kv_depth=kv_depth,
            kv_type=kv_type,
            low_memory=low_memory,
        )

    with console.tracking("measuring") as on_progress:
        result = measure(
            open_model,
            parse_ints("threads", threads) if threads else [None],
            depths=parse_ints("depths", depths) if depths else None,
            n_prompt=n_prompt,
            n_generated=n_generated,
            rounds=rounds,
            on_progress=on_progress,
        )
    if as_json:
        console.emit(result.to_dict())
        return
    headings = ("depth", "prefill", "best", "decode", "best")
    for n_threads in result.load_ms:
        speeds = [speed for speed in result.speeds if speed.threads == n_threads]
        rows = [(str(speed.depth), *map(_tok_s, speed.tok_s)) for speed in speeds]
        console.show_table(headings, rows, f"tokens a second, threads: {n_threads}")
    loads = ", ".join(f"{ms:.0f} ms" for ms in result.load_ms.values())
    peak = f"; this process held {as_size(result.peak_bytes)} at most" if result.peak_bytes else ""
    console.say.print(
        f"median and best of {result.rounds} rounds; {result.n_prompt} tokens read, {result.n_generated} written; "
        f"loaded in {loads}"
    )
    console.say.print(f"planned memory {result.memory}{peak}")


def _tok_s(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _text_curve(
    model: Path | None, text: str, depths: list[int], max_tokens: int, engine: str, n_threads: int | None, as_json: bool
) -> None:
    from localdepth_apps.text_curve import measure

    with console.waiting("loading"):
        loaded = load(model, engine=engine, n_threads=n_threads)
    with loaded, console.tracking("predicting") as on_progress:
        result = measure(loaded, _documents(text), depths, max_tokens, on_progress)
    if as_json:
        console.emit(result.to_dict())
        return
    bits = result.bits_per_character
    rows = [
        (str(depth), f"{loss:.4f}", f"{bits[depth]:.4f}", f"{100 * result.top1[depth]:.1f} %")
        for depth, loss in result.loss.items()
    ]
    console.show_table(("depth", "nats a token", "bits a character", "likeliest"), rows)
    console.say.print(f"{result.n_tokens:,} tokens, {result.n_characters:,} characters of {console.plain(text)}")


def _documents(path: str) -> Iterator[str]:
    """Texts as training reads them, in order; a plain text file is one."""
    from localdepth_train.text.documents import BadRow
    from localdepth_train.text.settings import SourceRecipe
    from localdepth_train.text.sources import open_source

    source = open_source(SourceRecipe(path=path, whole_files=True))
    for part in range(source.n_parts):
        for row in source.read(part, 0):
            if isinstance(row, BadRow):
                raise RequestError(f"{row.place} {row.reason}; mend or remove the row")
            if not row.is_blank:
                yield row.text


def _questions_from(file: Path) -> _Questions:
    from localdepth_apps.curve import is_same_answer, read_questions

    questions = read_questions(file)
    return list(questions), is_same_answer, f"{len(questions)} questions from {file}"


def _fresh_questions(seed: int, per_cell: int, steps: list[int]) -> _Questions:
    from localdepth_train.tasks import evaluation, is_right, overlap
    from localdepth_train.tasks.families import FAMILIES

    questions = evaluation(seed, -(-per_cell // len(FAMILIES)), steps=steps)
    divided = [question for question in questions if question.is_split]
    note = (
        f"{len(questions)} fresh questions; {len(divided)} of them on held-out compositions, of which "
        f"{100 * overlap(questions):.1f} % occur in training; the rest have too few steps to be split"
    )
    return questions, is_right, note
