"""Rounding matrices to blocks of few bits: the numbers of ggml's Q8_0 and Q4_0, in blocks of ONNX Runtime.

Along each row ``BLOCK`` numbers share a scale; a short last block is filled with zeros. ONNX Runtime's own symmetric
rounding lets the number furthest from zero have the lowest code, and at 8 bits clips those of the other sign.
"""

import numpy as np
import numpy.typing as npt
from gguf.quants import quantize

from localdepth.engine.base import F32
from localdepth.errors import ConfigError
from localdepth.onnx_folder.layout import BLOCK, code_shape
from localdepth_export.blocks import BLOCKS, from_ggml

__all__ = ["round_blocks"]

_QUANTS = {bits: quant for quant, bits in BLOCKS.items()}
_LARGEST = {bits: steps * float(np.finfo(np.float16).max) for bits, steps in ((8, 127), (4, 8))}  # scales are float16
_NOTHING = 1e-30  # no float16 holds a scale for such numbers, which may lack an inverse
_ROWS_BYTES = 1 << 22  # of float32, rounded at a time


def round_blocks(matrix: F32, bits: int) -> tuple[npt.NDArray[np.uint8], F32]:
    """Codes [n, blocks, bytes of a block] and scales [n, blocks] of a matrix [n, k], for ``bits`` 8 or 4.

    Raises:
        ConfigError: it has numbers that such blocks cannot hold.
    """
    if (largest := max(float(matrix.max()), -float(matrix.min()))) > _LARGEST[bits]:
        raise ConfigError(f"numbers up to {largest:.6g} do not fit {bits} bits; use 32")
    shape, quant = code_shape(matrix.shape, bits), _QUANTS[bits]
    codes, scales = np.empty(shape, np.uint8), np.empty(shape[:2], np.float32)
    step = max(1, _ROWS_BYTES // (4 * BLOCK * shape[1]))
    for start in range(0, len(matrix), step):
        rows = matrix[start : start + step]
        whole = np.pad(rows, ((0, 0), (0, -rows.shape[1] % BLOCK)))  # a copy
        whole[np.abs(whole) < _NOTHING] = 0
        blocks = quantize(whole, quant.ggml_type)
        codes[start : start + step], scales[start : start + step] = from_ggml(blocks, len(rows), quant)
    return codes, scales
