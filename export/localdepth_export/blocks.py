"""ggml's blocks as those of ONNX Runtime, and back, number by number.

Q8_0 and Q4_0 have what MatMulNBits has: 32 numbers along a row share a scale, and codes are symmetric. Scales are
float16 there and float32 here; 8-bit codes are signed there and count from 128 here; of 4-bit codes a byte holds
numbers i and i + 16 of a block there, neighbours here.
"""

import numpy as np
import numpy.typing as npt

from localdepth.engine.base import F32
from localdepth.errors import ConfigError
from localdepth.onnx_folder.layout import BLOCK
from localdepth.quant import Quant

__all__ = ["BLOCKS", "from_ggml", "to_ggml"]

BLOCKS = {Quant.Q8_0: 8, Quant.Q4_0: 4}  # and their bits

_SCALE = np.dtype("<f2")
_SIGN = np.uint8(0x80)
Bytes = npt.NDArray[np.uint8]


def from_ggml(data: Bytes, n_rows: int, quant: Quant) -> tuple[Bytes, F32]:
    """Codes [n_rows, blocks, bytes of a block] and scales [n_rows, blocks] of ggml's bytes [n_bytes]."""
    blocks = data.reshape(n_rows, -1, quant.block_bytes)
    scales = np.ascontiguousarray(blocks[..., : _SCALE.itemsize]).view(_SCALE)[..., 0].astype(np.float32)
    codes = blocks[..., _SCALE.itemsize :]
    if BLOCKS[quant] == 8:
        return codes ^ _SIGN, scales
    numbers = np.concatenate((codes & 15, codes >> 4), axis=-1)
    return numbers[..., ::2] | numbers[..., 1::2] << 4, scales


def to_ggml(codes: Bytes, scales: F32, quant: Quant) -> Bytes:
    """The inverse of ``from_ggml``.

    Raises:
        ConfigError: a scale is no float16.
    """
    with np.errstate(over="ignore"):  # which is found out below
        halves = scales.astype(_SCALE)
    if not np.array_equal(halves.astype(np.float32), scales):
        raise ConfigError("its scales are finer than float16")
    if BLOCKS[quant] == 8:
        codes = codes ^ _SIGN
    else:
        numbers = np.stack((codes & 15, codes >> 4), axis=-1).reshape(*scales.shape, BLOCK)
        codes = numbers[..., : BLOCK // 2] | numbers[..., BLOCK // 2 :] << 4
    return np.concatenate((halves[..., None].view(np.uint8), codes), axis=-1).reshape(-1)
