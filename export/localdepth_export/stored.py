"""Whether a model file holds the numbers of its checkpoint, rounded as they should be."""

import math
from collections.abc import Mapping

import numpy as np
from gguf.quants import dequantize
from numpy.typing import NDArray

from localdepth.engine.base import F32
from localdepth.engine.ggml.quantize import FITTED, quantize
from localdepth.errors import ConfigError
from localdepth.gguf import GgufFile
from localdepth.onnx_folder.folder import OnnxFolder
from localdepth.onnx_folder.layout import from_blocks, scales_of
from localdepth.quant import Quant
from localdepth.record import ModelFile
from localdepth_export.importance import Importance
from localdepth_export.onnx_graphs.weights import as_pieces
from localdepth_export.recipe import Recipe
from localdepth_train.checkpoint import Checkpoint

__all__ = ["knows_importance", "wrong_tensors"]

# Squared error of a block, in that of the block as we round it: another build of ggml may decide ties otherwise.
_SAME = 1.01
# The same for a whole tensor rounded with an importance we do not have, which gives up accuracy where it does not
# count: in single blocks all of it, over real tensors far less than these two bits. A wrong tensor is beyond forty.
_UNKNOWN_IMPORTANCE = 16.0
_LOW_HALF = np.uint32(0xFFFF)  # of a float32: all zeros in a bfloat16


def knows_importance(file: ModelFile, importance: Importance | None) -> bool:
    """Whether we have what the file was rounded with.

    Raises:
        ConfigError: what we have is something else.
    """
    used = file.provenance.get("importance")
    if importance is None:
        return not used
    if importance.origin != used:
        raise ConfigError(
            f"{file.path} was rounded with {f'the importance of {used}' if used else 'no importance'}, "
            f"not with that of {importance.origin}; pass the one it was exported with"
        )
    return True


def wrong_tensors(file: GgufFile | OnnxFolder, source: Checkpoint, importance: Importance | None) -> tuple[str, ...]:
    """Tensors of the file that are not the checkpoint's, rounded.

    They are when rounding the checkpoint gives the same numbers. Where it does not, no block may be further from the
    checkpoint than as we round it: half a step is no measure for quants that fit their scales and clip what sticks out.
    """
    known, columns = knows_importance(file, importance), importance.columns if importance else {}
    return tuple(
        name
        for name, form in _forms(file).items()
        if not _is_stored(file.array(name), source.read(name), name, form, columns.get(name), known)
    )


def _forms(file: GgufFile | OnnxFolder) -> Mapping[str, Quant | int]:
    """How each tensor was rounded: by ggml to a quant, or by us to so many bits.

    A folder that was made of a GGUF file still names the quants of that, but for BF16.
    """
    if isinstance(file, GgufFile):
        return {name: info.quant for name, info in file.tensors.items()}
    try:
        return Recipe.parse(str(file.provenance.get("quant"))).choose(file.config)[0]
    except ConfigError:
        return file.layout.bits


def _is_stored(stored: F32, exact: F32, name: str, form: Quant | int, importance: F32 | None, known: bool) -> bool:
    rounded = _by_ggml(exact, form, importance) if isinstance(form, Quant) else _by_us(exact, name, form)
    if np.array_equal(rounded, stored):
        return True
    if form in (Quant.F32, 32) and not (stored.view(np.uint32) & _LOW_HALF).any():  # carried over from BF16
        return _is_stored(stored, exact, name, Quant.BF16, None, known)
    block = form.block if isinstance(form, Quant) else 1
    ours, theirs = (_block_errors(array, exact, block) for array in (rounded, stored))
    if known or form not in FITTED:
        return bool((theirs <= _SAME * ours).all())
    return bool(theirs.sum() <= _UNKNOWN_IMPORTANCE * ours.sum())


def _by_ggml(exact: F32, quant: Quant, importance: F32 | None) -> F32:
    rows = quantize(exact, quant, importance).reshape(math.prod(exact.shape[:-1]), -1)
    return dequantize(rows, quant.ggml_type).reshape(exact.shape)


def _by_us(exact: F32, name: str, bits: int) -> F32:
    pieces = as_pieces(name, exact, bits)
    if bits < 16:
        return from_blocks(pieces[name], pieces[scales_of(name)], exact.shape[1], bits)
    return pieces[name].astype(np.float32)


def _block_errors(stored: F32, exact: F32, block: int) -> NDArray[np.float64]:
    """Sum of squared errors in each block; squares of float32 need more room than float32 has."""
    return np.asarray(np.square(stored - exact, dtype=np.float64).reshape(-1, block).sum(axis=1))
