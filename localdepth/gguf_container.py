"""The GGUF container: bytes to keys and tensor places, trusting nothing.

Knows the format (versions 2 and 3, little-endian), not what a key means; ``localdepth.gguf`` does.
Every count, length and offset is compared with the bytes that are there before it is used, so reading
a damaged or hostile file costs time and memory in proportion to its header and ends in
``ModelFileError``. Enumerations and block sizes come from the gguf package.
Source: the GGUF specification, ggml/docs/gguf.md.
"""

import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from mmap import mmap
from typing import Any

import numpy as np
from gguf.constants import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGMLQuantizationType,
    GGUFValueType,
    Keys,
)
from numpy.typing import NDArray

from localdepth.errors import ModelFileError

__all__ = ["Entry", "Header", "StoredTensor", "TensorTable", "Value", "damaged", "read_header", "read_tensors"]

type_ = GGUFValueType
Value = bool | int | float | str | tuple[str, ...] | NDArray[Any]  # numeric arrays stay arrays
