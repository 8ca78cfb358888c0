"""Writing safetensors files piece by piece: the package's own writer wants all tensors in memory at once."""

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from localdepth.errors import ConfigError
from localdepth_train.output import replacing

__all__ = ["DTYPES", "Pieces", "write_safetensors"]

DTYPES: dict[str, np.dtype[Any]] = {  # in safetensors' words
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_ALIGNMENT = 8  # of the data, which the header is padded to


@dataclass(frozen=True, slots=True)
class Pieces:
    """A tensor in the making; ``make`` gives its rows, in one array or several, when they are to be written."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    make: Callable[[], Iterable[npt.NDArray[Any]]]

    @property
    def n_bytes(self) -> int:
        """Size on disk."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def write_safetensors(path: Path, tensors: Mapping[str, Pieces], on_written: Callable[[str], None]) -> None:
    """Write a file that appears whole or not at all, holding one piece in memory at a time.

    Args:
        on_written: told the name of each tensor once it is written.
    Raises:
        ConfigError: a tensor of another type than F32, F16 and BF16, or pieces that do not make up its shape.
        StorageError: the file cannot be written; what ``make`` raises passes.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    if unknown := [name for name, tensor in tensors.items() if tensor.dtype not in names]:
        raise ConfigError(f"{unknown[0]} has numbers of type {tensors[unknown[0]].dtype}; write one of {list(DTYPES)}")
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # without which transformers refuses the file
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)  # so that all of them lie aligned
    start = 0
    for name in order:
        tensor, end = tensors[name], start + tensors[name].n_bytes
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % _ALIGNMENT)
    with replacing(path) as output:
        output.append(struct.pack("<Q", len(encoded)) + encoded)
        for name in order:
            written = 0
            for piece in tensors[name].make():
                data = np.ascontiguousarray(piece)
                output.append(data.view(np.uint8).data)  # as bytes: bfloat16 has no buffer of its own
                written += data.nbytes
            if written != tensors[name].n_bytes:
                raise ConfigError(f"{name} needs {tensors[name].n_bytes} bytes, its pieces have {written}")
            on_written(name)
