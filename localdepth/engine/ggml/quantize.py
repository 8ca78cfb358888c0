"""Quantising rows with ggml's own code, so that our files hold the bytes llama.cpp would write."""

import ctypes
import math
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_float, c_uint8
from typing import Any

import numpy as np
import numpy.typing as npt

from localdepth.engine.ggml.lib import library
from localdepth.errors import ConfigError
from localdepth.quant import Quant

__all__ = ["FITTED", "quantize"]

# Quants whose scales ggml fits to the numbers, weighing columns by their importance; the others round in one way.
FITTED = frozenset({Quant.Q4_0, Quant.Q4_K, Quant.Q5_0, Quant.Q5_K, Quant.Q6_K})

_F16_MAX = float(np.finfo(np.float16).max)
# Largest magnitude a format can hold: the largest whole numbers in a block times its largest scale, a float16.
_LARGEST = {
    Quant.F32: float(np.finfo(np.float32).max),
    Quant.F16: _F16_MAX,
    Quant.BF16: (2 - 2**-7) * 2.0**127,
    Quant.Q8_0: 127 * _F16_MAX,
    Quant.Q4_0: 8 * _F16_MAX,
    Quant.Q5_0: 16 * _F16_MAX,
    Quant.Q4_K: 63 * 15 * _F16_MAX,  # 6-bit scale of 32 numbers, times the number
    Quant.Q5_K: 63 * 31 * _F16_MAX,
    Quant.Q6_K: 128 * 32 * _F16_MAX,  # 8-bit scale of 16 numbers
}
# Bytes of a block that are floating point; all others are whole numbers.
_FLOATS = dict.fromkeys(Quant, slice(0, 2)) | {
    Quant.Q4_K: slice(0, 4),
    Quant.Q5_K: slice(0, 4),
    Quant.Q6_K: slice(208, 210),
}
_CHUNK = 1 << 18  # numbers a thread quantises in one call, a tenth of a second of Q4_K


def quantize(
    array: npt.NDArray[np.float32], quant: Quant, importance: npt.NDArray[np.float32] | None = None
) -> npt.NDArray[np.uint8]:
    """Encode a float32 array of finite values row by row; returns its bytes, [n_bytes] uint8.

    Args:
        array: [..., n_in] float32.
        importance: how much each column counts, [n_in] float32, not negative; heeded by the quants in ``FITTED``.
    Raises:
        ConfigError: the rows are no multiple of the quant's block, or a value is too large for it.
        MissingExtra: ggml's library is needed and not installed.
    """
    n_row = array.shape[-1]
    if n_row % quant.block:
        raise ConfigError(f"rows of {n_row} values cannot be stored as {quant}, which packs blocks of {quant.block}")
    largest = max(float(array.max()), -float(array.min()))  # without a copy; NaN stays NaN
    if not largest <= _LARGEST[quant]:
        raise _too_large(largest, quant)
    rows = np.ascontiguousarray(array, np.float32).reshape(-1, n_row)
    if quant is Quant.F32:
        return rows.reshape(-1).view(np.uint8)
    out = np.empty((len(rows), n_row // quant.block, quant.block_bytes), np.uint8)
    weights = None if importance is None else _pointer(_scaled(importance, n_row), c_float)
    step = max(1, _CHUNK // n_row)
    library()  # opened before threads race for it

    def encode(first: int) -> bool:
        part = out[first : first + step]
        _encode(rows[first : first + step], quant, weights, part)
        return _is_finite(part, quant)

    with ThreadPoolExecutor() as pool:
        if not all(pool.map(encode, range(0, len(rows), step))):
            raise _too_large(largest, quant)
    return out.reshape(-1)


def _encode(rows: npt.NDArray[np.float32], quant: Quant, weights: Any, out: npt.NDArray[np.uint8]) -> None:
    written = library().ggml_quantize_chunk(
        quant.ggml_type, _pointer(rows, c_float), _pointer(out, c_uint8), 0, len(rows), rows.shape[1], weights
    )
    assert written == out.nbytes, "ggml and our table agree on block sizes"


def _scaled(importance: npt.NDArray[np.float32], n_row: int) -> npt.NDArray[np.float32] | None:
    """The importance as ggml's sums can bear it, or None where no column has any.

    Scaling by a power of two moves no byte of the result but keeps products inside float32. Of a column that counts
    nothing ggml may store anything, so even one that was never excited counts a little.
    """
    assert importance.shape == (n_row,), "one number for each column"
    if not (mean := float(importance.mean(dtype=np.float64))):
        return None
    return np.maximum(np.ldexp(importance, -math.frexp(mean)[1]), np.float32(2**-40))


def _is_finite(blocks: npt.NDArray[np.uint8], quant: Quant) -> bool:
    """Whether no scale overflowed, which is not certain close to the largest magnitude: ggml fits scales."""
    words = blocks[..., _FLOATS[quant]].view(np.uint16)
    exponent = 0x7F80 if quant is Quant.BF16 else 0x7C00
    return not bool(((words & exponent) == exponent).any())


def _pointer(array: npt.NDArray[Any] | None, kind: Any) -> Any:
    return None if array is None else array.ctypes.data_as(ctypes.POINTER(kind))


def _too_large(largest: float, quant: Quant) -> ConfigError:
    return ConfigError(f"values up to {largest:.6g} do not fit {quant}; export as F32")
