"""Rounding matrices to blocks of few bits, as ONNX Runtime's MatMulNBits and GatherBlockQuantized read them.

Along each row, ``BLOCK`` numbers share a scale. The number furthest from zero becomes the lowest code, so that it is
exact; a code c means ``scale * (c - 2 ** (bits - 1))``, and a short last block is filled with codes of zero. All equal
to the symmetric rounding of ``onnxruntime.quantization``, which needs transposed copies.
"""

import numpy as np
import numpy.typing as npt

from localdepth.engine.base import F32

__all__ = ["BLOCK", "code_shape", "n_blocks", "round_blocks"]

BLOCK = 32
_ROWS_BYTES = 1 << 24  # of float32, rounded at a time


def n_blocks(n_columns: int) -> int:
    """Blocks in a row; the last one may be short."""
    return -(-n_columns // BLOCK)


def code_shape(shape: tuple[int, ...], bits: int) -> tuple[int, int, int]:
    """Shape of the codes of a matrix [n, k], in bytes: [n, blocks, bytes of a block]."""
    n_rows, n_columns = shape
    return n_rows, n_blocks(n_columns), BLOCK * bits // 8


def round_blocks(matrix: F32, bits: int) -> tuple[npt.NDArray[np.uint8], F32]:
    """Codes [n, blocks, bytes of a block] and scales [n, blocks] of a matrix [n, k], for ``bits`` 8 or 4."""
    shape = code_shape(matrix.shape, bits)
    codes, scales = np.empty(shape, np.uint8), np.empty(shape[:2], np.float32)
    step = max(1, _ROWS_BYTES // (4 * BLOCK * shape[1]))
    for start in range(0, len(matrix), step):
        rows = slice(start, start + step)
        codes[rows], scales[rows] = _round_rows(matrix[rows], bits)
    return codes, scales


def _round_rows(rows: F32, bits: int) -> tuple[npt.NDArray[np.uint8], F32]:
    zero = 2 ** (bits - 1)
    blocks = np.pad(rows, ((0, 0), (0, -rows.shape[1] % BLOCK))).reshape(len(rows), -1, BLOCK)
    high, low = blocks.max(axis=-1), blocks.min(axis=-1)
    scales = np.where(np.abs(high) > np.abs(low), high, low) / np.float32(-zero)
    is_normal = np.abs(scales) >= np.finfo(np.float32).tiny  # others have no inverse
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=is_normal)
    codes = (np.clip(blocks * inverse[..., None] + zero, 0, 2 * zero - 1) + np.float32(0.5)).astype(np.uint8)
    return (codes if bits == 8 else codes[..., ::2] | codes[..., 1::2] << 4), scales
