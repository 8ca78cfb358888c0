"""What models are measured on: a text cut into windows of token ids, each run from an empty cache."""

from collections.abc import Sequence

from localdepth.engine.base import KvType, Limits
from localdepth.errors import ConfigError
from localdepth.prompt import build_tokenizer
from localdepth.record import ModelFile
from localdepth.threads import idle_cores

__all__ = ["Sample", "limits_for", "windows"]

Sample = str | Sequence[Sequence[int]]  # a text, or windows already cut

_WINDOW = 256  # positions at most; scratch memory and time of attention stay small


def windows(sample: Sample, file: ModelFile, max_tokens: int) -> list[list[int]]:
    """The sample as windows of token ids, ``max_tokens`` together at most.

    Every window of a text begins with the start token where the model wants one.

    Raises:
        ConfigError: nothing to run, or a text for a file without tokenizer.
        PromptError: the tokenizer has no ids for the text.
    """
    length = min(_WINDOW, file.config.n_ctx)
    cut = _cut(sample, file, length) if isinstance(sample, str) else [list(window) for window in sample]
    kept: list[list[int]] = []
    for window in cut:
        if (room := max_tokens - sum(map(len, kept))) < 1:
            break
        kept.append(window[:room])
    if not kept:
        raise ConfigError(f"a sample of {len(sample)} pieces and max_tokens={max_tokens} leave nothing to run")
    return kept


def limits_for(cut: Sequence[Sequence[int]], depths: Sequence[int]) -> Limits:
    """Machine settings that measure these windows at these depths, with an exact cache."""
    return Limits(n_ctx=max(map(len, cut)), kv_depth=max(depths), kv_type=KvType.F32, n_threads=idle_cores())


def _cut(text: str, file: ModelFile, length: int) -> list[list[int]]:
    if file.tokenizer is None:
        raise ConfigError(
            f"{file.path} has no tokenizer, so it cannot run a text; leave the text out or pass token ids"
        )
    ids = build_tokenizer(file.tokenizer, file.config.n_vocab).encode(text)
    start = ids[:1] if file.tokenizer.add_bos else []
    rest, step = ids[len(start) :], max(1, length - len(start))
    return [start + rest[i : i + step] for i in range(0, len(rest), step)]
