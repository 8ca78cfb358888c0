"""The contents of the pieces that a ``Layout`` describes, and the file of all of them, written tensor by tensor."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from localdepth.config import ModelConfig
from localdepth.engine.base import F32
from localdepth.errors import ConfigError
from localdepth.onnx_folder.layout import ROPE_TABLES, Layout, scales_of
from localdepth_export.onnx_graphs.rounding import round_blocks
from localdepth_train.output import replacing

__all__ = ["Encode", "Pieces", "Stretch", "as_pieces", "stretches", "write_weights"]

Pieces = Mapping[str, npt.NDArray[Any]]
Encode = Callable[[str], Pieces]  # gives the pieces of a tensor; called once for each of the model, in order

_TABLES = dict(zip(ROPE_TABLES, (np.cos, np.sin), strict=True))
_POSITIONS = 4096  # of a table, computed at a time


@dataclass(frozen=True, slots=True)
class Stretch:
    """Some of a piece's contents, and the byte of the file at which they begin."""

    piece: str
    start: int
    data: npt.NDArray[Any]


def write_weights(path: Path, config: ModelConfig, layout: Layout, encode: Encode) -> str:
    """Write the file that ``layout`` describes, holding one tensor in memory at a time.

    Returns: the file's SHA-256.
    Raises:
        StorageError: the file cannot be written; what ``encode`` raises passes.
    """
    checksum, end = hashlib.sha256(), 0
    with replacing(path) as output:
        for stretch in stretches(config, layout, encode):
            for part in (bytes(stretch.start - end), stretch.data.data.cast("B")):
                checksum.update(part)
                output.append(part)
            end = stretch.start + stretch.data.nbytes
    return checksum.hexdigest()


def stretches(config: ModelConfig, layout: Layout, encode: Encode) -> Iterator[Stretch]:
    """The contents of all pieces, from front to back."""
    for name in config.tensors():
        for piece, data in encode(name).items():
            yield Stretch(piece, layout[piece].offset, data)
    for table, function in _TABLES.items():
        start = layout[table].offset
        for angles in _angles(config):
            rows = function(angles).astype(np.float32)
            yield Stretch(table, start, rows)
            start += rows.nbytes


def as_pieces(name: str, tensor: F32, bits: int) -> Pieces:
    """The pieces of a tensor of the model, rounded to ``bits``.

    Raises:
        ConfigError: it has numbers that so few bits cannot hold.
    """
    if bits == 32:
        return {name: np.ascontiguousarray(tensor)}
    try:
        if bits == 16:
            return {name: _halves(tensor)}
        codes, scales = round_blocks(tensor, bits)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    return {name: codes, scales_of(name): scales}


def _halves(tensor: F32) -> npt.NDArray[np.float16]:
    largest = max(float(tensor.max()), -float(tensor.min()))
    if largest > float(np.finfo(np.float16).max):
        raise ConfigError(f"numbers up to {largest:.6g} do not fit 16 bits; use 32")
    return tensor.astype(np.float16, order="C")


def _angles(config: ModelConfig) -> Iterator[npt.NDArray[np.float64]]:
    """The rotation of each position, in float64: [some positions, head_dim / 2]."""
    for start in range(0, config.n_ctx, _POSITIONS):
        yield np.outer(np.arange(start, min(start + _POSITIONS, config.n_ctx)), config.rope_frequencies())
