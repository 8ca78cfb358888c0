"""Every native object we own, each freed exactly once: compute backend, tensor groups, graphs, scratch memory."""

import math
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import numpy.typing as npt

from localdepth.engine.ggml.lib import Ggml
from localdepth.errors import EngineError

__all__ = ["Backend", "Graph", "Scratch", "TensorGroup", "aligned_zeros", "read", "write"]

_ALIGNMENT = 64  # bytes; at least what any ggml CPU kernel asks for
_SUCCESS = 0

Tensor = int  # address of a struct ggml_tensor
Shape = tuple[int, ...]  # ggml order: ne0 (contiguous) first


class Backend:
    """ggml's CPU backend with a fixed number of threads."""

    def __init__(self, lib: Ggml, n_threads: int, stack: ExitStack) -> None:
        self.lib = lib
        self.handle = lib.ggml_backend_cpu_init()
        if not self.handle:
            raise EngineError("ggml's CPU backend does not start; reinstall llama-cpp-python")
        stack.callback(lib.ggml_backend_free, self.handle)
        lib.ggml_backend_cpu_set_n_threads(self.handle, n_threads)

    def compute(self, graph: "Graph") -> None:
        """Run an allocated graph to its end."""
        status = self.lib.ggml_backend_graph_compute(self.handle, graph.handle)
        if status != _SUCCESS:
            raise EngineError(f"ggml ended a computation with status {status}; the request was dropped")


class TensorGroup:
    """Named tensors in one buffer: allocated by ggml, or laid over a numpy array that the caller keeps.

    Args:
        tensors: name -> (ggml type id, shape in ggml order).
        over: memory from ``aligned_zeros`` to lay the tensors over, in order; None allocates.
        step: bytes from one tensor to the next in that memory.
    """

    def __init__(
        self,
        backend: Backend,
        tensors: Mapping[str, tuple[int, Shape]],
        over: npt.NDArray[np.uint8] | None = None,
        step: int = 0,
    ) -> None:
        lib = self._lib = backend.lib
        self._stack = ExitStack()
        self._finalizer = weakref.finalize(self, self._stack.close)
        try:
            context = lib.context((len(tensors) + 1) * lib.ggml_tensor_overhead())
            self._stack.callback(lib.ggml_free, context)
            self._tensors = {name: _new(lib, context, kind, shape) for name, (kind, shape) in tensors.items()}
            if tensors:  # a stage may have no layers
                buffer = self._allocate(backend, context) if over is None else self._lay_over(over, step)
                self._stack.callback(lib.ggml_backend_buffer_free, buffer)
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

    def close(self) -> None:
        """Free the buffer; safe to call twice."""
        self._finalizer()

    def _allocate(self, backend: Backend, context: int) -> int:
        buffer: int | None = self._lib.ggml_backend_alloc_ctx_tensors(context, backend.handle)
        if not buffer:
            total = sum(self._lib.ggml_nbytes(tensor) for tensor in self._tensors.values())
            raise EngineError(f"not enough memory for {total / 2**20:.0f} MiB of tensors; close other programs")
        return buffer

    def _lay_over(self, memory: npt.NDArray[np.uint8], step: int) -> int:
        lib, address = self._lib, memory.ctypes.data
        sizes = [lib.ggml_nbytes(tensor) for tensor in self._tensors.values()]
        assert address % _ALIGNMENT == step % _ALIGNMENT == 0, "tensors start aligned"
        assert max(sizes) <= step, "each tensor fits its step"
        assert step * len(sizes) <= memory.nbytes, "all steps fit the memory"
        self._memory = memory  # kept alive as long as the tensors
        buffer: int = lib.ggml_backend_cpu_buffer_from_ptr(address, memory.nbytes)
        for i, tensor in enumerate(self._tensors.values()):
            lib.ggml_backend_tensor_alloc(buffer, tensor, address + i * step)
        return buffer


def aligned_zeros(shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Zeros at an aligned address; pages that nobody touches take no memory."""
    n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    try:
        raw = np.zeros(n_bytes + _ALIGNMENT, np.uint8)
    except MemoryError as error:
        raise EngineError(
            f"not enough memory for {n_bytes / 2**20:.0f} MiB of K/V cache; use a smaller n_ctx"
        ) from error
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + n_bytes].view(dtype).reshape(shape)


class Scratch:
    """Memory for the intermediate tensors of all graphs: one buffer, sized in advance."""

    def __init__(self, backend: Backend, stack: ExitStack) -> None:
        self._lib = backend.lib
        self._handle = self._lib.ggml_gallocr_new(self._lib.ggml_backend_get_default_buffer_type(backend.handle))
        stack.callback(self._lib.ggml_gallocr_free, self._handle)

    def reserve(self, graph: "Graph") -> None:
        """Make room for a graph like this one; call it for every kind before the first ``place``."""
        if not self._lib.ggml_gallocr_reserve(self._handle, graph.handle):
            raise EngineError("not enough memory for the engine's scratch buffer; use a smaller n_ctx")

    @property
    def n_bytes(self) -> int:
        """Size of the buffer."""
        return int(self._lib.ggml_gallocr_get_buffer_size(self._handle, 0))

    def place(self, graph: "Graph") -> bool:
        """Give the graph's intermediate tensors their addresses.

        Returns True when the buffer had to grow: graphs placed earlier then point into freed memory and must go.
        """
        before = self.n_bytes
        if not self._lib.ggml_gallocr_alloc_graph(self._handle, graph.handle):
            raise EngineError("not enough memory to compute; the request was dropped, close other programs")
        return self.n_bytes != before


class Graph:
    """One graph and the records of its nodes. Nodes are added through ``graph.GraphFactory``."""

    def __init__(self, lib: Ggml, max_nodes: int) -> None:
        stack = ExitStack()
        self.close = weakref.finalize(self, stack.close)  # frees the records; safe to call twice
        n_bytes = max_nodes * lib.ggml_tensor_overhead() + lib.ggml_graph_overhead_custom(max_nodes, False)
        self.context = lib.context(n_bytes)
        stack.callback(lib.ggml_free, self.context)
        self.handle = lib.ggml_new_graph_custom(self.context, max_nodes, False)


def write(lib: Ggml, tensor: Tensor, array: npt.NDArray[Any]) -> None:
    """Copy an array into the beginning of a tensor; bytes are taken as they are."""
    assert array.flags.c_contiguous, "bytes lie in order"
    assert array.nbytes <= lib.ggml_nbytes(tensor), "array fits its tensor"
    lib.ggml_backend_tensor_set(tensor, array.ctypes.data, 0, array.nbytes)


def read(lib: Ggml, tensor: Tensor, shape: Sequence[int]) -> npt.NDArray[np.float32]:
    """Copy float32 values out of the beginning of a tensor."""
    out = np.empty(shape, np.float32)
    assert out.nbytes <= lib.ggml_nbytes(tensor), "array lies inside its tensor"
    lib.ggml_backend_tensor_get(tensor, out.ctypes.data, 0, out.nbytes)
    return out


def _new(lib: Ggml, context: int, kind: int, shape: Shape) -> Tensor:
    make = {1: lib.ggml_new_tensor_1d, 2: lib.ggml_new_tensor_2d}[len(shape)]
    return int(make(context, kind, *shape))
