"""``ask``: one question, one answer."""

import sys
from typing import Annotated, Any

import typer

from localdepth import console
from localdepth.cli.common import app, command
from localdepth.cli.options import (
    DepthOption,
    DeviceOption,
    EngineOption,
    JsonOption,
    KvDepthOption,
    KvTypeOption,
    LowMemoryOption,
    MaxTokensOption,
    MinPOption,
    ModelOption,
    NCtxOption,
    RepeatPenaltyOption,
    RingOption,
    SeedOption,
    StateSeedOption,
    StopOption,
    SystemOption,
    TemperatureOption,
    ThreadsOption,
    TopKOption,
    TopPOption,
    parse_depth,
)
from localdepth.errors import PromptError
from localdepth.generate import Generation
from localdepth.loading import load
from localdepth.model import Model
from localdepth.prompt import Prompt
from localdepth.sampling import Sampling

__all__ = ["ask"]


@app.command()
@command
def ask(
    question: Annotated[str, typer.Argument(help='What to ask; "-" reads it from standard input.')],
    depth: DepthOption = "auto",
    model: ModelOption = None,
    system: SystemOption = "",
    max_tokens: MaxTokensOption = 256,
    stop: StopOption = None,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    min_p: MinPOption = 0.0,
    repeat_penalty: RepeatPenaltyOption = 1.0,
    seed: SeedOption = 0,
    state_seed: StateSeedOption = None,
    logprobs: Annotated[
        int | None, typer.Option("--logprobs", help="Show each token's log probability, and this many alternatives.")
    ] = None,
    engine: EngineOption = "auto",
    device: DeviceOption = "auto",
    n_ctx: NCtxOption = None,
    n_threads: ThreadsOption = None,
    ring: RingOption = None,
    kv_depth: KvDepthOption = None,
    kv_type: KvTypeOption = None,
    low_memory: LowMemoryOption = False,
    as_json: JsonOption = False,
) -> None:
    """Answer one question and say the depth it took."""
    prompt = _prompt(_read_question(question), system)
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repeat_penalty=repeat_penalty, seed=seed
    )
    with console.waiting("loading"):
        loaded = load(
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
    with loaded:
        stream = loaded.stream(
            prompt,
            depth=parse_depth(depth),
            sampling=sampling,
            max_tokens=max_tokens,
            stop=stop or (),
            state_seed=state_seed,
            top_logprobs=logprobs or 0,
        )
        answer = stream.collect(on_token=None if as_json else lambda token: console.answer(token.text))
        tokens = [] if logprobs is None else _token_records(answer, loaded)
    if as_json:
        console.emit(answer.to_dict() | ({} if logprobs is None else {"tokens": tokens}))
        return
    console.answer("\n")
    if logprobs is not None:
        _show_tokens(tokens)
    stats, decision = answer.stats, answer.decision
    console.notes.print(
        f"depth {answer.depth}, chosen by {decision.chosen_by}: {decision.reason} · {stats.n_generated} tokens in "
        f"{(stats.prompt_ms + stats.decode_ms) / 1000:.2f} s · ended by {answer.finish_reason}",
        style="dim",
    )


def _read_question(question: str) -> str:
    if question != "-":
        return question
    if sys.stdin is None:
        raise PromptError("there is no standard input to read; pass the question itself")
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(f"standard input is not UTF-8 at byte {error.start}; convert it first") from error


def _prompt(question: str, system: str) -> Prompt:
    if not system:
        return question
    return [{"role": "system", "content": system}, {"role": "user", "content": question}]


def _token_records(answer: Generation, model: Model) -> list[dict[str, Any]]:
    return [
        {
            "id": token.id,
            "text": model.token_text(token.id),
            "depth": token.depth,
            "logprob": token.logprob,
            "top": [{"id": i, "text": model.token_text(i), "logprob": logprob} for i, logprob in token.top],
        }
        for token in answer.tokens
    ]


def _show_tokens(tokens: list[dict[str, Any]]) -> None:
    rows = [("token", "logprob", "alternatives"), *(_token_row(token) for token in tokens)]
    console.show_list(rows if any(token["top"] for token in tokens) else [row[:2] for row in rows])


def _token_row(token: dict[str, Any]) -> tuple[str, str, str]:
    others = (f"{other['text']!r} {_brief(other['logprob'])}" for other in token["top"])
    return repr(token["text"]), _brief(token["logprob"]), ", ".join(others)


def _brief(logprob: float) -> str:
    return f"{round(logprob, 3) + 0.0:.3f}"  # no minus sign before zero
