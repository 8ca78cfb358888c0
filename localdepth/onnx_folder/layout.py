"""Where every weight of an ONNX folder lies in the one file that all its graphs share.

Pieces lie in it one after the other. A tensor of the model is one piece under its own name; one that is stored in
blocks of few bits has a second one beside it, ``<name>.scales``. Norms and biases are always float32, and so are the
rotation tables ``rope.cos`` and ``rope.sin``, [n_ctx, head_dim / 2]. Sizes and bits of a model settle all of it.

Blocks are those of ONNX Runtime's MatMulNBits and GatherBlockQuantized: ``BLOCK`` numbers along a row share a scale,
and a code c means ``scale * (c - 2 ** (bits - 1))``.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from localdepth.config import ModelConfig
from localdepth.errors import ConfigError

__all__ = [
    "BITS",
    "BLOCK",
    "QUANTS",
    "ROPE_TABLES",
    "WEIGHTS",
    "Layout",
    "Piece",
    "code_shape",
    "from_blocks",
    "n_blocks",
    "scales_of",
]

WEIGHTS = "weights.bin"
QUANTS = {32: "F32", 16: "F16", 8: "INT8", 4: "INT4"}  # what each number of bits is called
BITS = tuple(QUANTS)
BLOCK = 32
ROPE_TABLES = ("rope.cos", "rope.sin")

_PAGE, _CACHE_LINE = 4096, 64  # pieces of a page or more begin on one, so that they can be mapped


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of the weights file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int

    @property
    def n_bytes(self) -> int:
        """Its length."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def end(self) -> int:
        """Where it ends."""
        return self.offset + self.n_bytes


class Layout(Mapping[str, Piece]):
    """Where every piece lies, by name, in the order of the file.

    Attributes:
        bits: of each number of a tensor, by its name; 32 for norms and biases.
        end: where the last piece ends.
    Args:
        bits: of each number of a matrix: 32, 16 (both floats), or 8 or 4, in blocks that share a scale; by name where
            matrices differ.
    Raises:
        ConfigError: other ``bits``, or those of other matrices than the model has.
    """

    def __init__(self, config: ModelConfig, bits: int | Mapping[str, int]) -> None:
        self.bits = _bits_by_name(config, bits)
        self.end = 0
        self._pieces: dict[str, Piece] = {}
        for name, dtype, shape in _pieces(config, self.bits):
            piece = Piece(np.dtype(dtype), shape, self.end)
            alignment = _PAGE if piece.n_bytes >= _PAGE else _CACHE_LINE
            self._pieces[name] = replace(piece, offset=self.end + -self.end % alignment)
            self.end = self._pieces[name].end

    def __getitem__(self, name: str) -> Piece:
        return self._pieces[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def is_blocks(self, name: str) -> bool:
        """Whether a tensor is stored in blocks of few bits."""
        return scales_of(name) in self._pieces


def scales_of(name: str) -> str:
    """The piece that holds the scales of a tensor."""
    return f"{name}.scales"


def n_blocks(n_columns: int) -> int:
    """Blocks in a row; the last one may be short."""
    return -(-n_columns // BLOCK)


def code_shape(shape: tuple[int, ...], bits: int) -> tuple[int, int, int]:
    """Shape of the codes of a matrix [n, k], in bytes: [n, blocks, bytes of a block]."""
    n_rows, n_columns = shape
    return n_rows, n_blocks(n_columns), BLOCK * bits // 8


def from_blocks(
    codes: npt.NDArray[np.uint8], scales: npt.NDArray[np.float32], n_columns: int, bits: int
) -> npt.NDArray[np.float32]:
    """The matrix [n, n_columns] that codes [n, blocks, bytes of a block] and scales [n, blocks] stand for."""
    if bits == 4:
        codes = np.stack((codes & 15, codes >> 4), axis=-1).reshape(*codes.shape[:2], BLOCK)
    numbers = (codes.astype(np.float32) - np.float32(2 ** (bits - 1))) * scales[..., None]
    return np.ascontiguousarray(numbers.reshape(len(codes), -1)[:, :n_columns], np.float32)


def _bits_by_name(config: ModelConfig, bits: int | Mapping[str, int]) -> dict[str, int]:
    shapes = config.tensors()
    matrices = [name for name, shape in shapes.items() if len(shape) > 1]
    given = bits if isinstance(bits, Mapping) else dict.fromkeys(matrices, bits)
    if differing := sorted(set(given) ^ set(matrices)):
        raise ConfigError(f"bits do not name the matrices of the model: {', '.join(differing[:3])}")
    if wrong := [value for value in given.values() if isinstance(value, bool) or value not in BITS]:
        raise ConfigError(f"bits={wrong[0]!r} is not one of {', '.join(map(str, BITS))}")
    return {name: given.get(name, 32) for name in shapes}


def _pieces(config: ModelConfig, bits: Mapping[str, int]) -> Iterator[tuple[str, npt.DTypeLike, tuple[int, ...]]]:
    for name, shape in config.tensors().items():
        if bits[name] >= 16:
            yield name, np.float32 if bits[name] == 32 else np.float16, shape
        else:
            codes = code_shape(shape, bits[name])
            yield name, np.uint8, codes
            yield scales_of(name), np.float32, codes[:2]
    for table in ROPE_TABLES:
        yield table, np.float32, (config.n_ctx, config.head_dim // 2)
