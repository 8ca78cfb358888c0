"""``chat``: a conversation in the terminal, or with a script that writes one line for each turn."""

from pathlib import Path
from typing import Annotated

import typer

from localdepth.cli.common import app, command
from localdepth.cli.options import (
    DepthOption,
    DeviceOption,
    EngineOption,
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
    read_text,
)
from localdepth.conversation import Conversation
from localdepth.loading import load
from localdepth.model import Model
from localdepth.sampling import Sampling

__all__ = ["chat"]


@app.command()
@command
def chat(
    model: ModelOption = None,
    depth: DepthOption = "auto",
    system: SystemOption = "",
    saved: Annotated[Path | None, typer.Option("--from", help="Go on with a conversation saved as .json.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Show answers as they are, not as Markdown.")] = False,
    max_tokens: MaxTokensOption = 1024,
    stop: StopOption = None,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    min_p: MinPOption = 0.0,
    repeat_penalty: RepeatPenaltyOption = 1.0,
    seed: SeedOption = 0,
    state_seed: StateSeedOption = None,
    engine: EngineOption = "auto",
    device: DeviceOption = "auto",
    n_ctx: NCtxOption = None,
    n_threads: ThreadsOption = None,
    ring: RingOption = None,
    kv_depth: KvDepthOption = None,
    kv_type: KvTypeOption = None,
    low_memory: LowMemoryOption = False,
) -> int:
    """Talk with a model: /help lists what can be typed, Ctrl-C stops an answer, Ctrl-D leaves."""
    from localdepth.cli.repl import talk  # a line editor is no concern of other commands
    from localdepth.cli.session import Settings

    conversation = Conversation.from_json(read_text(saved)) if saved else Conversation()
    conversation.system = system or conversation.system
    settings = Settings(
        depth=parse_depth(depth),
        sampling=Sampling(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repeat_penalty=repeat_penalty, seed=seed
        ),
        max_tokens=max_tokens,
        stop=tuple(stop or ()),
        state_seed=state_seed,
    )

    def open_model(file: Path | None) -> Model:
        return load(
            file,
            engine=engine,
            device=device,
            n_ctx=n_ctx,
            n_threads=n_threads,
            ring=ring,
            kv_depth=kv_depth,
            kv_type=kv_type,
            low_memory=low_memory,
        )

    return talk(open_model, model, conversation, settings, plain=plain)
