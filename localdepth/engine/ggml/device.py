"""Where graphs run: on the CPU, or on another device with the CPU behind it for what that device cannot do.

A device gives intermediate tensors their memory and computes graphs. The CPU shares one scratch buffer between all
graphs; other devices go through ggml's scheduler, which keeps a buffer per graph, cuts the graph where an operator
is not supported and copies between devices.
"""

import ctypes
from collections.abc import Iterable
from contextlib import ExitStack
from enum import StrEnum
from typing import Protocol

import numpy as np

from localdepth.engine.ggml import lib as ggml
from localdepth.engine.ggml.handles import Graph, TensorGroup
from localdepth.engine.ggml.lib import GPU_TYPES, Ggml
from localdepth.errors import EngineError

__all__ = ["CpuDevice", "Device", "DeviceName", "GpuDevice", "open_device"]

_SUCCESS = 0


class DeviceName(StrEnum):
    """Where an engine computes; "auto" takes a GPU where ggml has one."""

    AUTO = "auto"
    CPU = "cpu"
    GPU = "gpu"


class Device(Protocol):
    """What the engine needs of a device.

    Attributes:
        name: for people.
        is_host: tensors lie in memory we can see.
        memory: where tensors go, as ``TensorGroup`` takes it: None for memory of ours, else a ggml buffer type.
    """

    lib: Ggml
    name: str
    is_host: bool
    memory: int | None

    def place(self, graph: Graph) -> bool:
        """Give the graph's intermediate tensors their addresses.

        Returns True when graphs placed earlier point into freed memory and must go.
        """

    def compute(self, graph: Graph) -> None:
        """Run a placed graph to its end."""

    def free_bytes(self) -> int | None:
        """Memory left on a device of its own; None where that is the machine's, or nobody knows."""


class CpuDevice:
    """ggml's CPU backend with a fixed number of threads."""

    name, is_host = "CPU", True
    memory: int | None = None

    def __init__(self, lib: Ggml, n_threads: int, stack: ExitStack) -> None:
        self.lib, self._n_threads = lib, n_threads
        self.handle = lib.ggml_backend_cpu_init()
        if not self.handle:
            raise EngineError("ggml's CPU backend does not start; reinstall llama-cpp-python")
        stack.callback(lib.ggml_backend_free, self.handle)
        lib.ggml_backend_cpu_set_n_threads(self.handle, n_threads)
        self._scratch = self._allocator(stack)

    def measure(self, graphs: Iterable[Graph]) -> int:
        """Bytes of scratch memory that the largest of these graphs needs, without allocating any."""
        lib, largest, work = self.lib, 0, 0
        with ExitStack() as stack:
            allocator = self._allocator(stack)
            for graph in graphs:
                size = ctypes.c_size_t()
                lib.ggml_gallocr_reserve_n_size(allocator, graph.handle, None, None, ctypes.byref(size))
                largest = max(largest, size.value)
                work = max(work, lib.ggml_graph_plan(graph.handle, self._n_threads, None).work_size)
        return largest + work

    def reserve(self, graph: Graph) -> None:
        """Make room for a graph like this one; call it for every kind before the first ``place``."""
        if not self.lib.ggml_gallocr_reserve(self._scratch, graph.handle):
            raise EngineError("not enough memory for the engine's scratch buffer; use a smaller n_ctx")

    def place(self, graph: Graph) -> bool:
        before = self._scratch_bytes()
        if not self.lib.ggml_gallocr_alloc_graph(self._scratch, graph.handle):
            raise EngineError("not enough memory to compute; the request was dropped, close other programs")
        return self._scratch_bytes() != before

    def compute(self, graph: Graph) -> None:
        _check(self.lib.ggml_backend_graph_compute(self.handle, graph.handle))

    def free_bytes(self) -> int | None:
        return None

    def _allocator(self, stack: ExitStack) -> int:
        allocator: int = self.lib.ggml_gallocr_new(self.lib.ggml_backend_get_default_buffer_type(self.handle))
        stack.callback(self.lib.ggml_gallocr_free, allocator)
        return allocator

    def _scratch_bytes(self) -> int:
        return int(self.lib.ggml_gallocr_get_buffer_size(self._scratch, 0))


class GpuDevice:
    """Any other device of ggml's registry, with the CPU for operators it lacks."""

    is_host = False
    memory: int | None

    def __init__(self, lib: Ggml, device: int, n_threads: int, stack: ExitStack) -> None:
        self.lib, self._device = lib, device
        self.name = lib.ggml_backend_dev_description(device).decode(errors="replace")
        handle = lib.ggml_backend_dev_init(device, None)
        if not handle:
            raise EngineError(f"the device {self.name} does not start; use device='cpu' (--device cpu)")
        stack.callback(lib.ggml_backend_free, handle)
        self._cpu = CpuDevice(lib, n_threads, stack)
        self._backends = (ctypes.c_void_p * 2)(handle, self._cpu.handle)  # in order of preference
        self.memory = lib.ggml_backend_get_default_buffer_type(handle)

    def place(self, graph: Graph) -> bool:
        graph.keep(self._schedule(graph), self.lib.ggml_backend_sched_free)
        if not self.lib.ggml_backend_sched_alloc_graph(graph.schedule, graph.handle):
            raise EngineError(f"not enough memory on {self.name}; the request was dropped, use device='cpu'")
        return False

    def compute(self, graph: Graph) -> None:
        _check(self.lib.ggml_backend_sched_graph_compute(graph.schedule, graph.handle))

    def free_bytes(self) -> int | None:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.lib.ggml_backend_dev_memory(self._device, ctypes.byref(free), ctypes.byref(total))
        return free.value if total.value else None  # some devices do not say

    def _schedule(self, graph: Graph) -> int:
        schedule: int = self.lib.ggml_backend_sched_new(self._backends, None, 2, graph.max_nodes, False, False)
        return schedule


def open_device(lib: Ggml, name: DeviceName, n_threads: int, stack: ExitStack) -> Device:
    """The device of this name, tried out, and closed with ``stack``.

    Raises:
        EngineError: a GPU was asked for and there is none, it does not start, or it computes wrongly.
    """
    device = _find(lib, name, n_threads, stack)
    _self_test(device)
    return device


def _find(lib: Ggml, name: DeviceName, n_threads: int, stack: ExitStack) -> Device:
    if name is DeviceName.CPU:
        return CpuDevice(lib, n_threads, stack)
    found = lib.devices()
    gpu = next((device for device in found if lib.ggml_backend_dev_type(device) in GPU_TYPES), None)
    if gpu is not None:
        return GpuDevice(lib, gpu, n_threads, stack)
    if name is DeviceName.GPU:
        seen = ", ".join(lib.ggml_backend_dev_name(device).decode(errors="replace") for device in found) or "none"
        raise EngineError(
            f"device='gpu': this build of ggml has no GPU device (it has {seen}); use device='cpu', or build "
            "llama-cpp-python for your GPU, see the README"
        )
    return CpuDevice(lib, n_threads, stack)


def _check(status: int) -> None:
    if status != _SUCCESS:
        raise EngineError(f"ggml ended a computation with status {status}; the request was dropped")


def _self_test(device: Device) -> None:
    """One small product, compared with numpy: catches a library built for another processor or ABI."""
    lib = device.lib
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 3, 32), np.float32)
    with ExitStack() as stack:
        specs = {"a": (ggml.F32, (32, 3)), "b": (ggml.F32, (32, 3)), "out": (ggml.F32, (3, 3))}
        tensors = TensorGroup(lib, specs, device.memory)
        stack.callback(tensors.close)
        tensors.write("a", a)
        tensors.write("b", b)
        graph = Graph(lib, 16)
        stack.callback(graph.close)
        product = lib.ggml_mul_mat(graph.context, tensors["a"], tensors["b"])
        lib.ggml_build_forward_expand(graph.handle, lib.ggml_cpy(graph.context, product, tensors["out"]))
        device.place(graph)
        device.compute(graph)
        if not np.allclose(tensors.read("out", (3, 3)), b @ a.T, atol=1e-4):
            raise EngineError(f"ggml in {lib.folder} computes a product wrongly; reinstall it: {ggml.INSTALL_LINE}")
