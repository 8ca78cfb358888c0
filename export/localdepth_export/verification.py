"""Compare a model file with the checkpoint it came from, depth by depth, and write the result into the file.

The reference runs in torch, which is imported only here.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np

from localdepth.config import ModelConfig
from localdepth.engine.base import Engine, Limits
from localdepth.engine.ggml.engine import GgmlEngine
from localdepth.engine.onnx.engine import OnnxEngine
from localdepth.errors import ConfigError, MissingExtra, StorageError, install_line
from localdepth.gguf import GgufFile
from localdepth.model import Model
from localdepth.onnx_folder.folder import OnnxFolder
from localdepth.onnx_folder.layout import QUANTS
from localdepth.prompt import PromptReader
from localdepth.quant import Quant
from localdepth.record import Check, CheckStatus
from localdepth.store.disk import open_model
from localdepth_export import gguf_writer
from localdepth_export.divergence import compare, run
from localdepth_export.importance import Importance
from localdepth_export.onnx_graphs import folder
from localdepth_export.sample import limits_for, windows
from localdepth_export.stored import knows_importance, wrong_tensors
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


# The stored numbers are judged strictly, see ``stored``. Float32 logits are limited by the order of additions. How
# far rounding moves the others depends on the weights and on how deep they loop, so only their divergence is bounded,
# loosely. From fine to coarse.
BOUNDS: Mapping[str, Bound] = {
    Quant.F32: Bound(1e-6, 1e-4),
    Quant.F16: Bound(1e-2),
    Quant.BF16: Bound(1e-1),
    Quant.Q8_0: Bound(1e-1),
    QUANTS[8]: Bound(1e-1),
    Quant.Q6_K: Bound(3e-1),
    Quant.Q5_K: Bound(5e-1),
    Quant.Q5_0: Bound(5e-1),
    Quant.Q4_K: Bound(1.0),
    Quant.Q4_0: Bound(1.0),
    QUANTS[4]: Bound(1.0),
}


@dataclass(frozen=True, slots=True)
class Report:
    """Result of ``verify``.

    Attributes:
        check: differences by depth, as written into the file.
        intact: whether the weights have the checksum in the file; True where it has none.
        wrong_tensors: tensors whose stored numbers are not those of the checkpoint, rounded.
        quant: the coarsest in the file, which sets the bound.
        exact: whether the stored numbers could be judged as they should be rounded; otherwise the file was rounded
            with an importance that was not given, and they were judged loosely.
        text_source: where the compared tokens come from.
    """

    check: Check
    intact: bool
    wrong_tensors: tuple[str, ...]
    quant: str
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
        limits = f"KL {self.bound.kl:g}" + (f", max abs {self.bound.max_abs:g}" if self.quant == Quant.F32 else "")
        if self.passed:
            if not self.exact:
                return "consistent: stored numbers are near the checkpoint's; pass --importance to be sure"
            return f"verified: stored numbers are the checkpoint's, rightly rounded, logits within {limits}"
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
    """Compare stored numbers one by one, then run ``file`` with its engine and ``checkpoint`` with the reference.

    Args:
        file: a GGUF file, or a folder of ONNX graphs.
        depths: passes to compare, each within the measuring range of the model.
        text: what to run, for files with a tokenizer; None draws tokens at random from a fixed seed.
        importance: what the file was rounded with, if it was; without it the stored numbers are judged loosely.
        record: write the result into the file.
    Raises:
        ConfigError: file and checkpoint are different models, the file was rounded with another importance, no depth
            is given, or there is no tokenizer for ``text``.
        DepthError: a depth outside the range.
        MissingExtra: torch is not installed.
        StorageError: the result could not be written; nothing has been compared.
    """
    try:
        from localdepth_train.reference_engine import ReferenceEngine
    except ModuleNotFoundError as error:
        raise MissingExtra(f"verifying needs torch; install it: {install_line('train')}") from error
    if not depths:
        raise ConfigError("no depths to compare; pass at least one")
    source = Checkpoint(checkpoint)
    with open_model(Path(file)) as model, ExitStack() as stack:
        if record:
            _check_room(Path(file))
        intact = model.is_intact() is not False
        _same_model(model.config, source.config, file, checkpoint)
        for depth in depths:
            model.config.check_depth(depth, measure=True)
        exact, wrong = knows_importance(model, importance), wrong_tensors(model, source, importance)
        cut = windows(_random(model.config) if text is None else text, model, _MAX_TOKENS)
        no_text = PromptReader(None, model.config.n_vocab)
        limits = limits_for(cut, depths)
        ours = stack.enter_context(Model(_engine(model, limits), no_text))
        theirs = Model(ReferenceEngine.from_checkpoint(source, n_ctx=limits.n_ctx), no_text)
        expected = [run(theirs, cut, depth) for depth in depths]
        found = [compare(run(ours, cut, depth), logits) for depth, logits in zip(depths, expected, strict=True)]
        quant = max(model.bytes_by_quant, key=list(BOUNDS).index)
        write_check = gguf_writer.write_check if isinstance(model, GgufFile) else folder.write_check
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


def _check_room(file: Path) -> None:
    """Refuse before a long comparison what could not be written down after it: a GGUF file is written anew."""
    target = Path(os.path.realpath(file))
    place, n_bytes = (target, 0) if target.is_dir() else (target.parent, target.stat().st_size)
    try:
        with TemporaryFile(dir=place):
            free = shutil.disk_usage(place).free
        fault = f"that takes {n_bytes:,} bytes and {free:,} are free" if free < n_bytes else ""
    except OSError as error:
        fault = error.strerror or str(error)
    if fault:
        raise StorageError(
            f"the result cannot be written into {file}: {fault}; mend that, or only show it: --no-record (record=False)"
        )


def _engine(file: GgufFile | OnnxFolder, limits: Limits) -> Engine:
    return GgmlEngine(file, limits) if isinstance(file, GgufFile) else OnnxEngine(file, limits)


def _same_model(ours: ModelConfig, theirs: ModelConfig, file: object, checkpoint: object) -> None:
    mine, other = ours.to_dict(), theirs.to_dict()
    if differing := [f"{key} {mine[key]} against {other[key]}" for key in mine if mine[key] != other[key]]:
        raise ConfigError(f"{file} was not made from {checkpoint}: {', '.join(differing[:4])}")


def _random(config: ModelConfig) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [[int(i) for i in rng.integers(0, config.n_vocab, min(_N_RANDOM, config.n_ctx), dtype=np.int32)]]
