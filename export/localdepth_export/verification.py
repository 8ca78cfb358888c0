"""Compare a model file with the checkpoint it came from, depth by depth, and write the result into the file.

The reference runs in torch, which is imported only here.
"""

import os
from collections.abc import Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from localdepth.config import ModelConfig
from localdepth.engine.base import F32, KvType, Limits
from localdepth.engine.ggml.engine import GgmlEngine
from localdepth.errors import ConfigError, MissingExtra, install_line
from localdepth.gguf import Check, CheckStatus, GgufFile, TokenizerRecord, read
from localdepth.model import Model, default_threads
from localdepth.prompt import PromptReader, build_tokenizer
from localdepth.quant import Quant
from localdepth_export.gguf_writer import write_check
from localdepth_train.checkpoint import Checkpoint

__all__ = ["BOUNDS", "Bound", "Report", "verify"]

_N_TOKENS = 64  # compared positions without a text of the user's own
_MAX_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Bound:
    """What a quant may differ from the reference.

    Attributes:
        step: largest error of a stored number, as a share of the largest in its block.
        max_abs: largest logit difference, in standard deviations of the logits where those exceed one.
        kl: mean KL divergence in nats.
    """

    step: float
    max_abs: float
    kl: float


# The stored numbers are judged strictly: half a rounding step, and for Q8_0 the rounding of its float16 scale.
# Float32 logits are limited by the order of additions. How far rounding moves the others depends on the weights and on
# how deep they loop, so only their divergence is bounded, loosely.
BOUNDS = {
    Quant.F32: Bound(0.0, 1e-4, 1e-6),
    Quant.F16: Bound(2**-11, np.inf, 1e-2),
    Quant.BF16: Bound(2**-8, np.inf, 1e-1),
    Quant.Q8_0: Bound(0.5 / 127 + 2**-11, np.inf, 1e-1),
}
_TINY = 2.0**-24  # half the smallest float16; smaller numbers may vanish


@dataclass(frozen=True, slots=True)
class Report:
    """Result of ``verify``.

    Attributes:
        check: differences by depth, as written into the file.
        wrong_tensors: tensors whose stored numbers are not those of the checkpoint, rounded.
        quant: the coarsest in the file, which sets the bound.
        text_source: where the compared tokens come from.
    """

    check: Check
    wrong_tensors: tuple[str, ...]
    quant: Quant
    bound: Bound
    n_tokens: int
    text_source: str

    @property
    def passed(self) -> bool:
        """True when every tensor is right and every depth stays within the bound."""
        return self.check.status is CheckStatus.VERIFIED

    @property
    def verdict(self) -> str:
        """The result in words, with what to do where it is bad."""
        if self.wrong_tensors:
            named = ", ".join(self.wrong_tensors[:4]) + (", ..." if len(self.wrong_tensors) > 4 else "")
            return (
                f"FAILED: {len(self.wrong_tensors)} tensors ({named}) do not hold the checkpoint's numbers; "
                "the file is damaged or comes from another checkpoint, export it again"
            )
        limits = f"KL {self.bound.kl:g}" + (f", max abs {self.bound.max_abs:g}" if self.quant is Quant.F32 else "")
        if self.passed:
            return f"verified: stored numbers are exact to half a step of {self.quant}, logits within {limits}"
        return f"FAILED: beyond {limits} at some depth; this model does not bear {self.quant}, export as F16 or F32"


def verify(
    file: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str],
    *,
    depths: Sequence[int] = (1, 2, 4, 8, 16),
    text: str | None = None,
    record: bool = True,
) -> Report:
    """Compare stored numbers one by one, then run ``file`` with ggml and ``checkpoint`` with the reference.

    Args:
        depths: passes to compare, each within the measuring range of the model.
        text: what to run, for files with a tokenizer; None draws tokens at random from a fixed seed.
        record: write the result into the file.
    Raises:
        ConfigError: file and checkpoint are different models, the file has a quant that is not judged here, no depth
            is given, or there is no tokenizer for ``text``.
        DepthError: a depth outside the range.
        MissingExtra: torch is not installed.
    """
    try:
        from localdepth_train.reference_engine import ReferenceEngine
    except ModuleNotFoundError as error:
        raise MissingExtra(f"verifying needs torch; install it: {install_line('train')}") from error
    if not depths:
        raise ConfigError("no depths to compare; pass at least one")
    source = Checkpoint(checkpoint)
    with read(file) as model, ExitStack() as stack:
        _same_model(model.config, source.config, file, checkpoint)
        for depth in depths:
            model.config.check_depth(depth, measure=True)
        quant = _coarsest({info.quant for info in model.tensors.values()})
        wrong = tuple(name for name, info in model.tensors.items() if not _is_stored(model, source, name, info.quant))
        ids = _tokens(model.config, text, model.tokenizer)
        limits = Limits(n_ctx=len(ids), kv_depth=max(depths), kv_type=KvType.F32, n_threads=default_threads())
        no_text = PromptReader(None, model.config.n_vocab)
        ours = stack.enter_context(Model(GgmlEngine(model, limits), no_text))
        theirs = Model(ReferenceEngine.from_checkpoint(source, n_ctx=len(ids)), no_text)
        expected = [theirs.logits(ids, depth=depth) for depth in depths]
        rows = [_compare(ours.logits(ids, depth=depth), e) for depth, e in zip(depths, expected, strict=True)]
    max_abs, kl, top1 = (tuple(column) for column in zip(*rows, strict=True))
    bound = BOUNDS[quant]
    scale = max(1.0, *(float(logits.std()) for logits in expected))
    # NaN fails every comparison, and so the check
    good = not wrong and all(a <= bound.max_abs * scale and k <= bound.kl for a, k, _ in rows)
    check = Check(CheckStatus.VERIFIED if good else CheckStatus.FAILED, tuple(depths), max_abs, kl, top1)
    if record:
        write_check(file, check)
    return Report(check, wrong, quant, bound, len(ids), "the given text" if text else "random tokens, seed 0")


def _is_stored(model: GgufFile, source: Checkpoint, name: str, quant: Quant) -> bool:
    """Whether a tensor of the file is the checkpoint's, rounded to its quant."""
    expected = source.read(name).reshape(-1, quant.block)
    error = np.abs(model.array(name).reshape(-1, quant.block) - expected).max(axis=1)
    step = BOUNDS[quant].step
    limit = step * np.abs(expected).max(axis=1) + (_TINY if step else 0.0)
    return bool((error <= limit).all())


def _same_model(ours: ModelConfig, theirs: ModelConfig, file: object, checkpoint: object) -> None:
    mine, other = ours.to_dict(), theirs.to_dict()
    if differing := [f"{key} {mine[key]} against {other[key]}" for key in mine if mine[key] != other[key]]:
        raise ConfigError(f"{file} was not made from {checkpoint}: {', '.join(differing[:4])}")


def _tokens(config: ModelConfig, text: str | None, record: TokenizerRecord | None) -> list[int]:
    limit = min(config.n_ctx, _MAX_TOKENS)
    if text is None:
        rng = np.random.default_rng(0)
        return [int(i) for i in rng.integers(0, config.n_vocab, min(_N_TOKENS, limit), dtype=np.int32)]
    if record is None:
        raise ConfigError("the file has no tokenizer, so it cannot be verified on a text; leave the text out")
    return build_tokenizer(record, config.n_vocab).encode(text)[:limit]


def _coarsest(quants: Set[Quant]) -> Quant:
    if unknown := sorted(quants - set(BOUNDS)):
        raise ConfigError(f"this version cannot judge {', '.join(unknown)}; it verifies {', '.join(BOUNDS)}")
    return max(quants, key=list(BOUNDS).index)


def _compare(ours: F32, reference: F32) -> tuple[float, float, float]:
    """Largest difference, mean KL(reference || ours) in nats, share of equal best tokens."""
    p, q = _log_softmax(reference), _log_softmax(ours)
    kl = float(np.mean(np.sum(np.exp(p) * (p - q), axis=-1)))
    top1 = float(np.mean(ours.argmax(-1) == reference.argmax(-1)))
    return float(np.abs(ours - reference).max()), max(kl, 0.0), top1


def _log_softmax(logits: F32) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True)))
