"""Compare a model file with the checkpoint it came from, depth by depth, and write the result into the file.

The reference runs in torch, which is imported only here.
"""

import math
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from gguf.quants import dequantize
from numpy.typing import NDArray

from localdepth.config import ModelConfig
from localdepth.engine.base import F32
from localdepth.engine.ggml.engine import GgmlEngine
from localdepth.engine.ggml.quantize import FITTED, quantize
from localdepth.errors import ConfigError, MissingExtra, install_line
from localdepth.gguf import Check, CheckStatus, GgufFile, read
from localdepth.model import Model
from localdepth.prompt import PromptReader
from localdepth.quant import Quant
from localdepth_export.divergence import compare, run
from localdepth_export.gguf_writer import write_check
from localdepth_export.importance import Importance
from localdepth_export.sample import limits_for, windows
from localdepth_train.checkpoint import Checkpoint

__all__ = ["BOUNDS", "Bound", "Report", "verify"]

_N_RANDOM = 64  # compared positions without a text of the user's own
_MAX_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Bound:
    """What the logits of a file may differ from the reference's.

    Attributes:
        kl: mean KL divergence in nats.
        max_abs: largest difference, in standard deviations of the logits where those exceed one.
    """

    kl: float
    max_abs: float = np.inf


# The stored numbers are judged strictly, see ``_is_stored``. Float32 logits are limited by the order of additions. How
# far rounding moves the others depends on the weights and on how deep they loop, so only their divergence is bounded,
# loosely. From fine to coarse.
BOUNDS = {
    Quant.F32: Bound(1e-6, 1e-4),
    Quant.F16: Bound(1e-2),
    Quant.BF16: Bound(1e-1),
    Quant.Q8_0: Bound(1e-1),
    Quant.Q6_K: Bound(3e-1),
    Quant.Q5_K: Bound(5e-1),
    Quant.Q5_0: Bound(5e-1),
    Quant.Q4_K: Bound(1.0),
    Quant.Q4_0: Bound(1.0),
}
# Squared error of a block, in that of the block as we round it: another build of ggml may decide ties otherwise.
_SAME = 1.01
# The same for a whole tensor rounded with an importance we do not have, which gives up accuracy where it does not
# count: in single blocks all of it, over real tensors far less than these two bits. A wrong tensor is beyond forty.
_UNKNOWN_IMPORTANCE = 16.0


@dataclass(frozen=True, slots=True)
class Report:
    """Result of ``verify``.

    Attributes:
        check: differences by depth, as written into the file.
        intact: whether the weights have the checksum in the file; True where it has none.
        wrong_tensors: tensors whose stored numbers are not those of the checkpoint, rounded.
        quant: the coarsest in the file, which sets the bound.
        exact: whether the stored numbers could be judged as ggml rounds them; otherwise the file was rounded with an
            importance that was not given, and they were judged loosely.
        text_source: where the compared tokens come from.
    """

    check: Check
    intact: bool
    wrong_tensors: tuple[str, ...]
    quant: Quant
    bound: Bound
    exact: bool
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
        if not self.intact:
            return "FAILED: the weights do not have the checksum in the file; it is damaged, export it again"
        limits = f"KL {self.bound.kl:g}" + (f", max abs {self.bound.max_abs:g}" if self.quant is Quant.F32 else "")
        if self.passed:
            if not self.exact:
                return "consistent: stored numbers are near the checkpoint's; pass --importance to be sure"
            return f"verified: stored numbers are the checkpoint's as ggml rounds them, logits within {limits}"
        return f"FAILED: beyond {limits} at some depth; this model does not bear {self.quant}, export with a finer one"


def verify(
    file: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str],
    *,
    depths: Sequence[int] = (1, 2, 4, 8, 16),
    text: str | None = None,
    importance: Importance | None = None,
    record: bool = True,
) -> Report:
    """Compare stored numbers one by one, then run ``file`` with ggml and ``checkpoint`` with the reference.

    Args:
        depths: passes to compare, each within the measuring range of the model.
        text: what to run, for files with a tokenizer; None draws tokens at random from a fixed seed.
        importance: what the file was rounded with, if it was; without it the stored numbers are judged loosely.
        record: write the result into the file.
    Raises:
        ConfigError: file and checkpoint are different models, the file was rounded with another importance, no depth
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
        intact = model.is_intact() is not False
        _same_model(model.config, source.config, file, checkpoint)
        for depth in depths:
            model.config.check_depth(depth, measure=True)
        exact = _knows_importance(model, importance)
        columns = importance.columns if importance else {}
        wrong = tuple(name for name in model.tensors if not _is_stored(model, source, name, columns.get(name), exact))
        cut = windows(_random(model.config) if text is None else text, model, _MAX_TOKENS)
        no_text = PromptReader(None, model.config.n_vocab)
        limits = limits_for(cut, depths)
        ours = stack.enter_context(Model(GgmlEngine(model, limits), no_text))
        theirs = Model(ReferenceEngine.from_checkpoint(source, n_ctx=limits.n_ctx), no_text)
        expected = [run(theirs, cut, depth) for depth in depths]
        found = [compare(run(ours, cut, depth), logits) for depth, logits in zip(depths, expected, strict=True)]
    quant = max((info.quant for info in model.tensors.values()), key=list(BOUNDS).index)
    bound = BOUNDS[quant]
    scale = max(1.0, *(float(logits.std()) for logits in expected))
    # NaN fails every comparison, and so the check
    good = intact and not wrong and all(d.max_abs <= bound.max_abs * scale and d.kl <= bound.kl for d in found)
    check = Check(
        CheckStatus.VERIFIED if good else CheckStatus.FAILED,
        tuple(depths),
        max_abs=tuple(d.max_abs for d in found),
        kl=tuple(d.kl for d in found),
        top1=tuple(d.top1 for d in found),
    )
    if record:
        write_check(file, check)
    where = "random tokens, seed 0" if text is None else "the given text"
    return Report(check, intact, wrong, quant, bound, exact, sum(map(len, cut)), where)


def _knows_importance(model: GgufFile, importance: Importance | None) -> bool:
    """Whether we have what the file was rounded with; refuses anything else."""
    used = model.provenance.get("importance")
    if importance is None:
        return not used
    if importance.origin != used:
        raise ConfigError(
            f"{model.path} was rounded with {f'the importance of {used}' if used else 'no importance'}, "
            f"not with that of {importance.origin}; pass the one it was exported with"
        )
    return True


def _is_stored(model: GgufFile, source: Checkpoint, name: str, importance: F32 | None, known: bool) -> bool:
    """Whether a tensor of the file is the checkpoint's, rounded to its quant.

    It is when ggml makes the same bytes of the checkpoint's numbers. Where it does not, no block may be further from
    them than ggml's own: half a step is no measure for quants that fit their scales and clip what sticks out.
    """
    quant, exact = model.tensors[name].quant, source.read(name)
    rounded = quantize(exact, quant, importance)
    if np.array_equal(rounded, model.data(name)):
        return True
    rows = dequantize(rounded.reshape(math.prod(exact.shape[:-1]), -1), quant.ggml_type)
    ours, theirs = (_block_errors(array, exact, quant) for array in (rows.reshape(exact.shape), model.array(name)))
    if known or quant not in FITTED:
        return bool((theirs <= _SAME * ours).all())
    return bool(theirs.sum() <= _UNKNOWN_IMPORTANCE * ours.sum())


def _block_errors(stored: F32, exact: F32, quant: Quant) -> NDArray[np.float64]:
    """Sum of squared errors in each block; squares of float32 need more room than float32 has."""
    return np.asarray(np.square(stored - exact, dtype=np.float64).reshape(-1, quant.block).sum(axis=1))


def _same_model(ours: ModelConfig, theirs: ModelConfig, file: object, checkpoint: object) -> None:
    mine, other = ours.to_dict(), theirs.to_dict()
    if differing := [f"{key} {mine[key]} against {other[key]}" for key in mine if mine[key] != other[key]]:
        raise ConfigError(f"{file} was not made from {checkpoint}: {', '.join(differing[:4])}")


def _random(config: ModelConfig) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [[int(i) for i in rng.integers(0, config.n_vocab, min(_N_RANDOM, config.n_ctx), dtype=np.int32)]]
