"""Options that several commands take, under one name each, and what they become."""

import re
from pathlib import Path
from typing import Annotated

import typer

from localdepth.errors import RequestError

__all__ = [
    "DepthOption",
    "DeviceOption",
    "EngineOption",
    "ImportanceOption",
    "JsonOption",
    "KvDepthOption",
    "KvTypeOption",
    "LowMemoryOption",
    "MaxTokensOption",
    "MinPOption",
    "ModelOption",
    "NCtxOption",
    "RepeatPenaltyOption",
    "RingOption",
    "SeedOption",
    "StateSeedOption",
    "StopOption",
    "SystemOption",
    "TemperatureOption",
    "ThreadsOption",
    "TopKOption",
    "TopPOption",
    "parse_depth",
    "parse_ints",
    "read_text",
]

JsonOption = Annotated[bool, typer.Option("--json", help="Print one line of JSON, the result, and nothing else.")]
ImportanceOption = Annotated[
    Path | None, typer.Option("--importance", help="What columns count in rounding; see export importance.")
]

# the machine
ModelOption = Annotated[
    Path | None,
    typer.Option(
        "--model", "-m", help="Model file or folder, or a name from `models list`; the default model without it."
    ),
]
EngineOption = Annotated[
    str, typer.Option("--engine", help="auto, ggml (GGUF files), onnx (ONNX folders), or toy (slow, either).")
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu or gpu.")]
NCtxOption = Annotated[int | None, typer.Option("--n-ctx", help="Context size.")]
ThreadsOption = Annotated[int | None, typer.Option("--threads", help="Compute threads.")]
RingOption = Annotated[int | None, typer.Option("--ring", help="Share K/V between passes in a ring of this many.")]
KvDepthOption = Annotated[int | None, typer.Option("--kv-depth", help="Deepest pass to make room for.")]
KvTypeOption = Annotated[
    str | None, typer.Option("--kv-type", help="f16 or f32; without it the smaller one that the engine has.")
]
LowMemoryOption = Annotated[bool, typer.Option("--low-memory", help="No copies of weights in faster layouts.")]

# the request
DepthOption = Annotated[str, typer.Option("--depth", "-d", help="Passes, or auto, quick, deep, low, high, ...")]
SystemOption = Annotated[str, typer.Option("--system", help="Instructions before the conversation.")]
MaxTokensOption = Annotated[int, typer.Option("--max-tokens", help="Longest answer.")]
StopOption = Annotated[list[str] | None, typer.Option("--stop", help="Text that ends the answer; may be repeated.")]
TemperatureOption = Annotated[float, typer.Option("--temperature", help="0 is greedy.")]
TopKOption = Annotated[int, typer.Option("--top-k", help="Draw from this many likely tokens; 0 from all.")]
TopPOption = Annotated[float, typer.Option("--top-p", help="Draw from the likely tokens that make up this share.")]
MinPOption = Annotated[float, typer.Option("--min-p", help="Draw from tokens this share as likely as the likeliest.")]
RepeatPenaltyOption = Annotated[float, typer.Option("--repeat-penalty", help="Above 1, repeat less.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Of the sampling.")]
StateSeedOption = Annotated[int | None, typer.Option("--state-seed", help="Of random initial states; zeros without.")]


def parse_depth(depth: str) -> int | str:
    """A whole number as one; words are the library's to judge."""
    return int(depth) if re.fullmatch(r"[+-]?[0-9]{1,9}", depth) else depth


def parse_ints(name: str, text: str) -> list[int]:
    """Whole numbers with commas between, each once."""
    try:
        values = [int(item) for item in text.split(",")]
    except ValueError:
        raise RequestError(f"{name}={text!r} must be whole numbers with commas between, such as 1,4,16") from None
    return list(dict.fromkeys(values))


def read_text(path: Path) -> str:
    """A user's text file, or a refusal that names it."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read {path}: {error}") from error
