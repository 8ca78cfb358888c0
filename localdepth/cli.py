"""The command line: each command parses, calls one function of the library, prints.

Exit codes: 0 done, 1 the check failed, 2 request or file refused, 3 the machine failed, 130 interrupted.
"""

import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from threading import Event
from typing import Annotated, Any, ParamSpec

import typer
from rich.text import Text

from localdepth import console
from localdepth.doctor import examine
from localdepth.errors import LocalDepthError, MachineError, MissingExtra, PromptError, RequestError, install_line
from localdepth.gguf import read
from localdepth.model import load
from localdepth.sampling import Sampling

__all__ = ["app", "main"]

CHECK_FAILED, INTERRUPTED = 1, 130  # errors bring their own

app = typer.Typer(
    name="localdepth",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
export_app = typer.Typer(help="Write a checkpoint as a model file.", no_args_is_help=True)
train_app = typer.Typer(help="Train looped models.", no_args_is_help=True)
app.add_typer(export_app, name="export")
app.add_typer(train_app, name="train")

P = ParamSpec("P")

ModelOption = Annotated[Path | None, typer.Option("--model", "-m", help="Model file; the default model without it.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one line of JSON, the result, and nothing else.")]
EngineOption = Annotated[str, typer.Option("--engine", help="auto, ggml, or toy (slow, needs no compiler).")]


def main() -> None:
    """Entry point of the ``localdepth`` command."""
    console.speak_utf8()
    app()


def command(function: Callable[P, int | None]) -> Callable[P, None]:
    """Turn our errors, an interruption and a returned exit code into the process's exit code."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            code = function(*args, **kwargs) or 0
        except LocalDepthError as error:
            code = console.report_error(error, bool(kwargs.get("as_json")))
        except KeyboardInterrupt:
            console.notes.print("interrupted")
            code = INTERRUPTED
        except BrokenPipeError:
            console.quiet_pipe()
            code = 0
        except (MemoryError, OSError) as error:
            said = MachineError(f"{type(error).__name__}: {error}; check disk, memory and where the output goes")
            code = console.report_error(said, bool(kwargs.get("as_json")))
        raise typer.Exit(code)

    return run


def _print_version(wanted: bool) -> None:
    if wanted:
        console.say.print(f"localdepth {version('localdepth')}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Run recurrent-depth language models on a laptop, and decide how hard they think."""


@app.command()
@command
def ask(
    question: Annotated[str, typer.Argument(help='What to ask; "-" reads it from standard input.')],
    depth: Annotated[str, typer.Option("--depth", "-d", help="Passes, or auto, quick, deep, low, high, ...")] = "auto",
    model: ModelOption = None,
    engine: EngineOption = "auto",
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Of the sampling.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="Text that ends the answer; may be repeated.")
    ] = None,
    n_ctx: Annotated[int | None, typer.Option("--n-ctx", help="Context size.")] = None,
    n_threads: Annotated[int | None, typer.Option("--threads", help="Compute threads.")] = None,
    ring: Annotated[int | None, typer.Option("--ring", help="Share K/V between passes in a ring of this many.")] = None,
    kv_type: Annotated[str, typer.Option("--kv-type", help="f16 or f32.")] = "f16",
    as_json: JsonOption = False,
) -> None:
    """Answer one question and say the depth it took."""
    text = _read_question(question)
    with load(model, engine=engine, n_ctx=n_ctx, n_threads=n_threads, ring=ring, kv_type=kv_type) as loaded:
        stream = loaded.stream(
            text,
            depth=_parse_depth(depth),
            sampling=Sampling(temperature=temperature, seed=seed),
            max_tokens=max_tokens,
            stop=stop or (),
        )
        answer = stream.collect(on_token=None if as_json else lambda token: console.answer(token.text))
    if as_json:
        console.emit(answer.to_dict())
        return
    console.answer("\n")
    stats, decision = answer.stats, answer.decision
    console.notes.print(
        f"depth {answer.depth}, chosen by {decision.chosen_by}: {decision.reason} · {stats.n_generated} tokens in "
        f"{(stats.prompt_ms + stats.decode_ms) / 1000:.2f} s · ended by {answer.finish_reason}",
        style="dim",
    )


@app.command()
@command
def doctor(as_json: JsonOption = False) -> int:
    """Say what is installed, what can run here, and what to type for the rest."""
    health = examine()
    if as_json:
        console.emit(health.to_dict())
    else:
        for finding in health.findings:
            mark = Text("ok  ", "green") if finding.good else Text("--  ", "yellow")
            console.say.print(Text.assemble(mark, (f"{finding.name}: ", "bold"), finding.seen))
            if finding.remedy:
                console.say.print(Text.assemble("      ", finding.remedy))
    return 0 if health.ready else CHECK_FAILED


@app.command()
@command
def inspect(
    file: Annotated[Path, typer.Argument(help="Model file.")],
    as_json: JsonOption = False,
) -> None:
    """Show what a model file holds, without loading its weights."""
    with read(file) as opened:
        record = opened.summary()
    if as_json:
        console.emit(record)
        return
    config = record.pop("config")
    console.show_facts({key: str(value) for key, value in config.items()})
    console.say.print()
    console.show_facts({key: _brief(value) for key, value in record.items()})


@app.command()
@command
def curve(
    model: ModelOption = None,
    depths: Annotated[str, typer.Option("--depths", help="Depths to measure.")] = "1,2,3,4,6,8,12,16,32,64",
    seed: Annotated[int, typer.Option("--seed", help="Of the fresh questions.")] = 0,
    per_cell: Annotated[
        int,
        typer.Option("--per-cell", min=1, help="Questions per number of steps, in sixes."),
    ] = 300,
    steps: Annotated[str, typer.Option("--steps", help="Numbers of steps to ask.")] = "1,2,3,4,5,6,7,8",
    data: Annotated[Path | None, typer.Option("--data", help="JSONL with question, answer, family, steps.")] = None,
    engine: EngineOption = "auto",
    n_threads: Annotated[int | None, typer.Option("--threads", help="Compute threads.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure accuracy by steps and depth on questions the model has not been trained on."""
    from localdepth_apps.curve import measure

    wanted = _parse_ints("depths", depths)
    questions, is_right, note = (
        _questions_from(data) if data else _fresh_questions(seed, per_cell, _parse_ints("steps", steps))
    )
    n_answers = len(questions) * len(wanted)
    with load(model, engine=engine, n_threads=n_threads) as loaded, console.ticking("asking", n_answers) as tick:
        result = measure(loaded, questions, wanted, is_right, tick)
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
def verify(
    file: Annotated[Path, typer.Argument(help="Model file; the result is written into it.")],
    checkpoint: Annotated[Path, typer.Argument(help="The directory it was exported from.")],
    depths: Annotated[str, typer.Option("--depths", help="Depths to compare.")] = "1,2,4,8,16",
    text: Annotated[Path | None, typer.Option("--text", help="Text to run; random tokens without it.")] = None,
    record: Annotated[bool, typer.Option("--record/--no-record", help="Write the result into the file.")] = True,
    as_json: JsonOption = False,
) -> int:
    """Compare a model file with its checkpoint, depth by depth, against the reference."""
    with _needs("export"):
        from localdepth_export.verification import verify as run

    sample = None if text is None else _read_text(text)
    report = run(file, checkpoint, depths=_parse_ints("depths", depths), text=sample, record=record)
    check = report.check
    if as_json:
        console.emit(
            {
                "passed": report.passed,
                "quant": report.quant,
                "n_tokens": report.n_tokens,
                "wrong_tensors": report.wrong_tensors,
                **asdict(check),
            }
        )
    else:
        lines = zip(check.depths, check.max_abs, check.kl, check.top1, strict=True)
        rows = [(str(d), f"{a:.2e}", f"{kl:.2e}", f"{100 * top:.1f} %") for d, a, kl, top in lines]
        console.show_table(("depth", "max abs", "KL, nats", "same top-1"), rows)
        console.say.print(f"{report.n_tokens} positions of {report.text_source}; {report.verdict}")
    return 0 if report.passed else CHECK_FAILED


@export_app.command("gguf")
@command
def export_gguf(
    checkpoint: Annotated[Path, typer.Argument(help="Directory of a Huginn, retrofit or localdepth checkpoint.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")],
    quant: Annotated[str, typer.Option("--quant", "-q", help="F32, F16, BF16 or Q8_0.")] = "Q8_0",
    license_name: Annotated[str | None, typer.Option("--license", help="Of the weights, if the card lacks it.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a checkpoint as a GGUF file."""
    with _needs("export"):
        from localdepth_export.convert import to_gguf
    done = to_gguf(checkpoint, out, quant=quant, license_name=license_name)
    if as_json:
        console.emit({**asdict(done), "path": str(done.path)})
        return
    console.say.print(
        f"{done.path}: {done.kind}, {done.n_params:,} parameters as {done.quant}, {done.n_bytes:,} bytes"
        f"{'' if done.has_tokenizer else ', no tokenizer: it takes and gives token ids'}"
    )
    if done.fallbacks:
        console.say.print(
            f"{len(done.fallbacks)} matrices whose rows do not fit {done.quant} are F16; inspect lists them"
        )


@train_app.command("run")
@command
def train_run(
    recipe: Annotated[Path, typer.Argument(help="TOML file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run; a stopped run goes on there.")],
    as_json: JsonOption = False,
) -> int:
    """Train a model from a recipe; Ctrl-C saves and stops, the same command goes on."""
    with _needs("train"):
        from localdepth_train.trainer import train
    from localdepth_train.recipe import load_recipe

    plan = load_recipe(recipe)
    with _stop_on_interrupt() as interrupted:
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


@contextmanager
def _stop_on_interrupt() -> Iterator[Event]:
    """Let the first Ctrl-C only raise a flag, so that work in progress can be saved; a second one interrupts."""
    flag = Event()

    def raise_flag(_number: int, _frame: object) -> None:
        console.notes.print("stopping after this step; press Ctrl-C again to lose it")
        flag.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, raise_flag)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, before)


def _show_progress(record: Mapping[str, Any], n_steps: int) -> None:
    facts = ", ".join(f"{key} {_brief(value)}" for key, value in record.items() if key in ("loss", "accuracy"))
    console.notes.print(f"step {record['step']} of {n_steps}: {facts}")


@contextmanager
def _needs(extra: str) -> Iterator[None]:
    """Import what an extra brings, or say how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtra(f"{error.name} is not installed; type: {install_line(extra)}") from error


def _read_question(question: str) -> str:
    if question != "-":
        return question
    if sys.stdin is None:
        raise PromptError("there is no standard input to read; pass the question itself")
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(f"standard input is not UTF-8 at byte {error.start}; convert it first") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read {path}: {error}") from error


def _parse_depth(depth: str) -> int | str:
    return int(depth) if re.fullmatch(r"[+-]?[0-9]{1,9}", depth) else depth


def _parse_ints(name: str, text: str) -> list[int]:
    try:
        values = [int(item) for item in text.split(",")]
    except ValueError:
        raise RequestError(f"{name}={text!r} must be whole numbers with commas between, such as 1,4,16") from None
    return list(dict.fromkeys(values))


_Questions = tuple[list[Any], Callable[[Any, str], bool], str]  # what to ask, the judge, a note for people


def _questions_from(file: Path) -> _Questions:
    from localdepth_apps.curve import is_same_answer, read_questions

    questions = read_questions(file)
    return list(questions), is_same_answer, f"{len(questions)} questions from {file}"


def _fresh_questions(seed: int, per_cell: int, steps: list[int]) -> _Questions:
    from localdepth_train.families import FAMILIES
    from localdepth_train.tasks import evaluation, is_right, overlap

    questions = evaluation(seed, -(-per_cell // len(FAMILIES)), steps=steps)
    divided = [question for question in questions if question.is_split]
    note = (
        f"{len(questions)} fresh questions; {len(divided)} of them on held-out compositions, of which "
        f"{100 * overlap(questions):.1f} % occur in training; the rest have too few steps to be split"
    )
    return questions, is_right, note


def _brief(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_brief(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(_brief(item) for item in value) or "none"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
