"""How the numbers of a tensor are stored: the quants we know, with ggml's block sizes."""

import math
from enum import StrEnum

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

__all__ = ["Quant"]


class Quant(StrEnum):
    """How the numbers of a tensor are stored; the names and block sizes are ggml's."""

    F32 = "F32"
    F16 = "F16"
    BF16 = "BF16"
    Q8_0 = "Q8_0"
    Q4_0 = "Q4_0"
    Q4_K = "Q4_K"
    Q5_0 = "Q5_0"
    Q5_K = "Q5_K"
    Q6_K = "Q6_K"

    @property
    def ggml_type(self) -> GGMLQuantizationType:
        """ggml's number for it."""
        return GGMLQuantizationType[self.value]

    @property
    def block(self) -> int:
        """Numbers in a block; a row is a whole number of blocks."""
        return GGML_QUANT_SIZES[self.ggml_type][0]

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return GGML_QUANT_SIZES[self.ggml_type][1]

    @property
    def bits(self) -> float:
        """Bits of a number, its share of the block's scales included."""
        return 8 * self.block_bytes / self.block

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of this shape may be stored so; norms and biases stay float32, as ggml adds them."""
        return shape[-1] % self.block == 0 and (len(shape) > 1 or self is Quant.F32)

    def n_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of this shape."""
        return math.prod(shape) // self.block * self.block_bytes
