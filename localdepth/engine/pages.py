"""Memory for caches, taken page by page as it is written."""

import math
import mmap as mapping
import sys
from collections.abc import Sequence
from mmap import mmap
from typing import Any

import numpy as np
import numpy.typing as npt

from localdepth.errors import EngineError

__all__ = ["lazy_zeros"]

# not shared with forked processes; Windows has no other kind
_PRIVATE = {} if sys.platform == "win32" else {"flags": mapping.MAP_PRIVATE | mapping.MAP_ANONYMOUS}


def lazy_zeros(shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Zeros that begin a page; pages that nobody touches take neither memory nor time."""
    n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    try:
        pages = mmap(-1, max(n_bytes, 1), **_PRIVATE)
    except (OSError, ValueError, OverflowError) as error:
        raise EngineError(
            f"not enough memory for {n_bytes / 2**20:.0f} MiB of K/V cache; use a smaller n_ctx"
        ) from error
    return np.frombuffer(pages, np.uint8, n_bytes).view(dtype).reshape(shape)
