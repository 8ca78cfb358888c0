"""The file of weights that all graphs of a model share, written once, tensor by tensor.

Pieces lie in it one after the other. A tensor of the model is one piece under its own name; one that is stored in
blocks of few bits has a second one beside it, ``<name>.scales``. Norms and biases are always float32, and so are the
rotation tables ``rope.cos`` and ``rope.sin``, [n_ctx, head_dim / 2].
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from localdepth.config import ModelConfig
from localdepth.engine.base import F32
from localdepth.errors import ConfigError
from localdepth_export.onnx_graphs.rounding import code_shape, round_blocks
from localdepth_train.output import replacing

__all__ = ["BITS", "FILE_NAME", "Layout", "Piece", "scales_of", "write_weights"]

BITS = (32, 16, 8, 4)
FILE_NAME = "weights.bin"

_PAGE, _CACHE_LINE = 4096, 64  # pieces of a page or more begin on one, so that they can be mapped
_TABLES = {"rope.cos": np.cos, "rope.sin": np.sin}
_POSITIONS = 4096  # of a table, computed at a time


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

    Args:
        bits: of each number of a matrix: 32, 16 (both floats), or 8 or 4, in blocks that share a scale.
    Raises:
        ConfigError: other ``bits``.
    """

    def __init__(self, config: ModelConfig, bits: int) -> None:
        if bits not in BITS:
            raise ConfigError(f"bits={bits!r} is not one of {', '.join(map(str, BITS))}")
        self.bits = bits
        self._pieces: dict[str, Piece] = {}
        end = 0
        for name, dtype, shape in _pieces(config, bits):
            piece = Piece(np.dtype(dtype), shape, end)
            alignment = _PAGE if piece.n_bytes >= _PAGE else _CACHE_LINE
            self._pieces[name] = replace(piece, offset=end + -end % alignment)
            end = self._pieces[name].end

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


def write_weights(path: Path, config: ModelConfig, layout: Layout, read: Callable[[str], F32]) -> str:
    """Write the file that ``layout`` describes, holding one tensor in memory at a time.

    Args:
        read: gives each tensor of ``config.tensors()`` by name; called once for each, in that order.
    Returns: the file's SHA-256.
    Raises:
        ConfigError: a matrix has numbers that float16 cannot hold.
        StorageError: the file cannot be written; what ``read`` raises passes.
    """
    checksum, end = hashlib.sha256(), 0
    with replacing(path) as output:
        for start, data in _stretches(config, layout, read):
            for stretch in (bytes(start - end), data.data.cast("B")):
                checksum.update(stretch)
                output.append(stretch)
            end = start + data.nbytes
    return checksum.hexdigest()


def _stretches(
    config: ModelConfig, layout: Layout, read: Callable[[str], F32]
) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """The contents of the file, each with where it begins, from front to back."""
    for name in config.tensors():
        for piece, data in _encoded(name, read(name), layout).items():
            yield layout[piece].offset, data
    for table, function in _TABLES.items():
        start = layout[table].offset
        for angles in _angles(config):
            rows = function(angles).astype(np.float32)
            yield start, rows
            start += rows.nbytes


def _pieces(config: ModelConfig, bits: int) -> Iterator[tuple[str, npt.DTypeLike, tuple[int, ...]]]:
    for name, shape in config.tensors().items():
        if len(shape) == 1 or bits == 32:
            yield name, np.float32, shape
        elif bits == 16:
            yield name, np.float16, shape
        else:
            codes = code_shape(shape, bits)
            yield name, np.uint8, codes
            yield scales_of(name), np.float32, codes[:2]
    for table in _TABLES:
        yield table, np.float32, (config.n_ctx, config.head_dim // 2)


def _encoded(name: str, tensor: F32, layout: Layout) -> dict[str, npt.NDArray[Any]]:
    """The pieces that a tensor is stored as."""
    if layout.is_blocks(name):
        codes, scales = round_blocks(tensor, layout.bits)
        return {name: codes, scales_of(name): scales}
    if layout[name].dtype == np.float32:
        return {name: np.ascontiguousarray(tensor)}
    largest = np.finfo(np.float16).max
    if max(tensor.max(), -tensor.min()) > largest:
        raise ConfigError(f"{name} has numbers beyond {largest:.0f}, which 16 bits cannot hold; use 32, 8 or 4 bits")
    return {name: tensor.astype(np.float16, order="C")}


def _angles(config: ModelConfig) -> Iterator[npt.NDArray[np.float64]]:
    """The rotation of each position, in float64: [some positions, head_dim / 2]."""
    for start in range(0, config.n_ctx, _POSITIONS):
        yield np.outer(np.arange(start, min(start + _POSITIONS, config.n_ctx)), config.rope_frequencies())
