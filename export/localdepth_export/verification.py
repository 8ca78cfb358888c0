"""Compare a model file with the checkpoint it came from, depth by depth, and write the result into the file.

The reference runs in torch, which is imported only here.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from localdepth.config import ModelConfig
from localdepth.engine.base import F32, Engine, Ids, KvType, Limits
from localdepth.engine.ggml.engine import GgmlEngine
from localdepth.errors import ConfigError, MissingExtra
from localdepth.gguf import Check, CheckStatus, Quant, TokenizerRecord, read
from localdepth.loop import forward
from localdepth.policy.base import Decision
from localdepth.tokenizer import Tokenizer
from localdepth_export.gguf_writer import write_check
from localdepth_train.checkpoint import Checkpoint

__all__ = ["BOUNDS", "Bound", "Report", "verify"]

_N_TOKENS = 64  # compared positions without a text of the user's own
_MAX_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Bound:
    """What a quant may differ from the reference.

    Attributes:
        max_abs: largest logit difference, in standard deviations of the logits where those exceed one.
        kl: mean KL divergence in nats.
    """

    max_abs: float
    kl: float


# Float32 is limited by the order of additions. How far the others move single logits depends on the weights and on
# how deep they loop, so their bounds only tell rounding from a wrong conversion, which costs a nat and more.
BOUNDS = {
    Quant.F32: Bound(1e-4, 1e-6),
    Quant.F16: Bound(np.inf, 1e-2),
    Quant.BF16: Bound(np.inf, 1e-1),
    Quant.Q8_0: Bound(np.inf, 1e-1),
}


@dataclass(frozen=True, slots=True)
class Report:
    """Result of ``verify``.

    Attributes:
        check: differences by depth, as written into the file.
        bound: what was allowed for the file's coarsest quant.
        text_source: where the compared tokens come from.
    """

    check: Check
    quant: Quant
    bound: Bound
    n_tokens: int
    text_source: str

    @property
    def passed(self) -> bool:
        """True when every depth stays within the bound."""
        return self.check.status is CheckStatus.VERIFIED


def verify(
    file: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str],
    *,
    depths: Sequence[int] = (1, 2, 4, 8, 16),
    text: str | None = None,
    record: bool = True,
) -> Report:
    """Run ``file`` with the ggml engine and ``checkpoint`` with the reference on the same tokens.

    Args:
        depths: passes to compare, each within the measuring range of the model.
        text: what to run, for files with a tokenizer; None draws tokens at random from a fixed seed.
        record: write the result into the file.
    Raises:
        ConfigError: file and checkpoint are different models, or there is no tokenizer for ``text``.
        DepthError: a depth outside the range.
        MissingExtra: torch is not installed.
    """
    try:
        from localdepth_train.reference_engine import ReferenceEngine
    except ModuleNotFoundError as error:
        raise MissingExtra(
            'verifying needs the torch reference; install it: pip install "localdepth[train]"'
        ) from error
    with read(file) as model, Checkpoint(checkpoint) as source:
        _same_model(model.config, source.config, file, checkpoint)
        for depth in depths:
            model.config.check_depth(depth, measure=True)
        ids = _tokens(model.config, text, model.tokenizer)
        quant = _coarsest([info.quant for info in model.tensors.values()])
        limits = Limits(n_ctx=len(ids), kv_depth=max(depths), kv_type=KvType.F32)
        engine = GgmlEngine(model, limits)
        reference = ReferenceEngine.from_checkpoint(source, n_ctx=len(ids))
    try:
        expected = [_logits(reference, ids, depth) for depth in depths]
        rows = [_compare(_logits(engine, ids, depth), e) for depth, e in zip(depths, expected, strict=True)]
    finally:
        engine.close()
    max_abs, kl, top1 = (tuple(column) for column in zip(*rows, strict=True))
    bound = BOUNDS[quant]
    scale = max(1.0, *(float(logits.std()) for logits in expected))
    good = max(max_abs) <= bound.max_abs * scale and max(kl) <= bound.kl
    status = CheckStatus.VERIFIED if good else CheckStatus.UNVERIFIED
    check = Check(status, tuple(depths), max_abs, kl, top1)
    if record:
        write_check(file, check)
    return Report(check, quant, bound, len(ids), "the given text" if text else "random tokens, seed 0")


def _same_model(ours: ModelConfig, theirs: ModelConfig, file: object, checkpoint: object) -> None:
    mine, other = ours.to_dict(), theirs.to_dict()
    if differing := [f"{key} {mine[key]} against {other[key]}" for key in mine if mine[key] != other[key]]:
        raise ConfigError(f"{file} was not made from {checkpoint}: {', '.join(differing[:4])}")


def _tokens(config: ModelConfig, text: str | None, record: TokenizerRecord | None) -> Ids:
    limit = min(config.n_ctx, _MAX_TOKENS)
    if text is None:
        rng = np.random.default_rng(0)
        return rng.integers(0, config.n_vocab, min(_N_TOKENS, limit), dtype=np.int32)
    if record is None:
        raise ConfigError("the file has no tokenizer, so it cannot be verified on a text; leave the text out")
    tokenizer = Tokenizer.from_json(
        record.json, n_vocab=config.n_vocab, bos=record.bos, eos=record.eos, add_bos=record.add_bos
    )
    return np.array(tokenizer.encode(text)[:limit], np.int32)


def _coarsest(quants: Sequence[Quant]) -> Quant:
    return max(quants, key=lambda quant: list(BOUNDS).index(quant))


def _logits(engine: Engine, ids: Ids, depth: int) -> F32:
    decision = Decision(floor=depth, ceiling=depth, chosen_by="verify", reason="a measurement")
    kv = engine.open(depth)
    try:
        return forward(engine, kv, ids, decision, "all")[0]
    finally:
        kv.close()


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
