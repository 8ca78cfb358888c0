"""Quantising rows with ggml's own code, so that our files hold the bytes llama.cpp would write."""

import ctypes
import math

import numpy as np
import numpy.typing as npt

from localdepth.engine.ggml.lib import library
from localdepth.errors import ConfigError
from localdepth.quant import Quant

__all__ = ["quantize"]


def quantize(array: npt.NDArray[np.float32], quant: Quant) -> npt.NDArray[np.uint8]:
    """Encode a float32 array of finite values row by row; returns its bytes, [n_bytes] uint8.

    Raises:
        ConfigError: when the rows are no multiple of the quant's block.
        MissingExtra: when ggml's library is needed and not installed.
    """
    n_row = array.shape[-1]
    if n_row % quant.block:
        raise ConfigError(f"rows of {n_row} values cannot be stored as {quant}, which packs blocks of {quant.block}")
    array = np.ascontiguousarray(array, np.float32)
    if quant is Quant.F32:
        return array.reshape(-1).view(np.uint8)
    out = np.empty(array.size // quant.block * quant.block_bytes, np.uint8)
    written = library().ggml_quantize_chunk(
        quant.ggml_type,
        array.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
        out.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)),
        0,
        math.prod(array.shape[:-1]),
        n_row,
        None,
    )
    assert written == out.nbytes, "ggml and our table agree on block sizes"
    return out
