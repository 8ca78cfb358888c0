"""Native objects we own, each freed exactly once: tensor groups and graphs; and how bytes get in and out."""

import ctypes
import math
import sys
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from mmap import PAGESIZE, mmap
from typing import Any

import numpy as np
import numpy.typing as npt

from localdepth.engine.ggml.lib import Ggml
from localdepth.errors import EngineError

__all__ = [
    "ALIGNMENT",
    "Graph",
    "Memory",
    "Tensor",
    "TensorGroup",
    "TensorSpec",
    "copy_rows",
    "lazy_zeros",
    "read",
    "read_into",
    "write",
]

ALIGNMENT = 64  # bytes; at least what any ggml CPU kernel asks for
_HUGE_PAGE, _MADV_HUGEPAGE = 1 << 21, 14
_TENSOR_ALIGNMENT = 32  # what ggml itself insists on

Tensor = int  # address of a struct ggml_tensor
TensorSpec = tuple[int, tuple[int, ...]]  # ggml type id, and shape in ggml order: ne0 (contiguous) first


@dataclass(frozen=True, slots=True, eq=False)
class Memory:
    """Memory of ours to lay tensors over: the bytes, and where in them each tensor begins."""

    array: npt.NDArray[np.uint8]
    offsets: Sequence[int]


class TensorGroup:
    """Named tensors in one buffer: allocated as a buffer type says, or laid over memory that is kept alive.

    Args:
        tensors: name -> type and shape.
        place: handle of a ggml buffer type to allocate from, or host memory to lie over.
    """

    def __init__(self, lib: Ggml, tensors: Mapping[str, TensorSpec], place: "int | Memory") -> None:
        self._lib = lib
        self._stack = ExitStack()
        self._finalizer = weakref.finalize(self, self._stack.close)
        try:
            context = lib.context((len(tensors) + 1) * lib.ggml_tensor_overhead())
            self._stack.callback(lib.ggml_free, context)
            self._tensors = {name: _new(lib, context, *spec) for name, spec in tensors.items()}
            if tensors:  # a stage may have no layers
                buffer = self._lay_over(place) if isinstance(place, Memory) else self._allocate(place, context)
                self._stack.callback(lib.ggml_backend_buffer_free, buffer)
                self._buffer = buffer
        except BaseException:
            self._finalizer()
            raise

    def __getitem__(self, name: str) -> Tensor:
        if not self._finalizer.alive:
            raise EngineError("this part of the model is closed; load the model again")
        return self._tensors[name]

    def get(self, name: str) -> Tensor | None:
        """The tensor, or None where the group has none of this name."""
        return self._tensors.get(name)

    def clear(self) -> None:
        """Fill the buffer with zeros."""
        if self._tensors:
            self._lib.ggml_backend_buffer_clear(self._buffer, 0)

    def use_huge_pages(self) -> None:
        """Ask Linux for pages of 2 MB before the first write: 5 % faster from the L3 cache, 18 % from memory."""
        if not self._tensors or not sys.platform.startswith("linux"):
            return
        first = -(-self._lib.ggml_backend_buffer_get_base(self._buffer) // PAGESIZE) * PAGESIZE
        n_bytes = self._lib.ggml_backend_buffer_get_size(self._buffer) // PAGESIZE * PAGESIZE - PAGESIZE
        if n_bytes > _HUGE_PAGE:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(n_bytes), _MADV_HUGEPAGE)

    def hold_weights(self) -> None:
        """Tell the scheduler that these do not change, so that it computes where they are."""
        if self._tensors:
            self._lib.ggml_backend_buffer_set_usage(self._buffer, 1)

    def close(self) -> None:
        """Free the buffer; safe to call twice."""
        self._finalizer()

    def _allocate(self, buffer_type: int, context: int) -> int:
        buffer: int | None = self._lib.ggml_backend_alloc_ctx_tensors_from_buft(context, buffer_type)
        if not buffer:
            total = sum(self._lib.ggml_nbytes(tensor) for tensor in self._tensors.values())
            raise EngineError(f"not enough memory for {total / 2**20:.0f} MiB of tensors; close other programs")
        return buffer

    def _lay_over(self, memory: Memory) -> int:
        lib, base = self._lib, memory.array.ctypes.data
        for tensor, offset in zip(self._tensors.values(), memory.offsets, strict=True):
            assert (base + offset) % _TENSOR_ALIGNMENT == 0, "tensors start aligned"
            assert offset + lib.ggml_nbytes(tensor) <= memory.array.nbytes, "tensors lie inside the memory"
        self._memory = memory  # kept alive as long as the tensors
        buffer: int = lib.ggml_backend_cpu_buffer_from_ptr(base, memory.array.nbytes)
        for tensor, offset in zip(self._tensors.values(), memory.offsets, strict=True):
            lib.ggml_backend_tensor_alloc(buffer, tensor, base + offset)
        return buffer


class Graph:
    """One graph and the records of its nodes. Nodes are added through ``graph.GraphFactory``.

    ``schedule`` is the device's own record of where its nodes run, for devices that need one.
    """

    def __init__(self, lib: Ggml, max_nodes: int) -> None:
        self._stack = ExitStack()
        self.close = weakref.finalize(self, self._stack.close)  # frees the records; safe to call twice
        self.max_nodes = max_nodes
        self.schedule: int | None = None
        n_bytes = max_nodes * lib.ggml_tensor_overhead() + lib.ggml_graph_overhead_custom(max_nodes, False)
        self.context = lib.context(n_bytes)
        self._stack.callback(lib.ggml_free, self.context)
        self.handle = lib.ggml_new_graph_custom(self.context, max_nodes, False)

    def keep(self, schedule: int, free: Any) -> None:
        """Remember the schedule and free it with the graph."""
        self.schedule = schedule
        self._stack.callback(free, schedule)


def lazy_zeros(shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Zeros that begin a page; pages that nobody touches take neither memory nor time."""
    n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    try:
        pages = mmap(-1, max(n_bytes, 1))
    except (OSError, ValueError, OverflowError) as error:
        raise EngineError(
            f"not enough memory for {n_bytes / 2**20:.0f} MiB of K/V cache; use a smaller n_ctx"
        ) from error
    return np.frombuffer(pages, np.uint8, n_bytes).view(dtype).reshape(shape)


def write(lib: Ggml, tensor: Tensor, array: npt.NDArray[Any], first: int = 0) -> None:
    """Copy an array into a tensor, from element ``first`` on; bytes are taken as they are."""
    offset = first * array.itemsize
    assert array.flags.c_contiguous, "bytes lie in order"
    assert offset + array.nbytes <= lib.ggml_nbytes(tensor), "array fits its tensor"
    lib.ggml_backend_tensor_set(tensor, array.ctypes.data, offset, array.nbytes)


def read(lib: Ggml, tensor: Tensor, shape: Sequence[int]) -> npt.NDArray[np.float32]:
    """Float32 values from the beginning of a tensor, in an array of their own."""
    out = np.empty(shape, np.float32)
    read_into(lib, tensor, out)
    return out


def read_into(lib: Ggml, tensor: Tensor, out: npt.NDArray[np.float32]) -> None:
    """Copy values from the beginning of a tensor into an array."""
    assert out.flags.c_contiguous, "bytes lie in order"
    assert out.nbytes <= lib.ggml_nbytes(tensor), "array lies inside its tensor"
    lib.ggml_backend_tensor_get(tensor, out.ctypes.data, 0, out.nbytes)


def copy_rows(lib: Ggml, source: Tensor, target: Tensor, first: int, n: int, row_bytes: int) -> None:
    """Copy n rows from one tensor to the same place of another, wherever the two are."""
    rows = np.empty(n * row_bytes, np.uint8)
    for tensor in (source, target):
        assert (first + n) * row_bytes <= lib.ggml_nbytes(tensor), "rows lie inside both tensors"
    lib.ggml_backend_tensor_get(source, rows.ctypes.data, first * row_bytes, rows.nbytes)
    lib.ggml_backend_tensor_set(target, rows.ctypes.data, first * row_bytes, rows.nbytes)


def _new(lib: Ggml, context: int, kind: int, shape: tuple[int, ...]) -> Tensor:
    make = {1: lib.ggml_new_tensor_1d, 2: lib.ggml_new_tensor_2d}[len(shape)]
    return int(make(context, kind, *shape))
