"""Graphs in ONNX Runtime: loaded once, bound to memory of ours, run without copies.

A graph takes its caches and gives them back. Where past and present are bound to one buffer, its kernels write new rows
behind those that are there. That is how they behave and not what ONNX promises, so ``writes_in_place`` tries it when a
model is loaded; where it fails, new rows come in buffers apart and are copied.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from localdepth.config import ModelConfig
from localdepth.engine.onnx.buffers import Buffer, Lane, new_planes
from localdepth.errors import EngineError, MissingExtra
from localdepth.onnx_folder.folder import OnnxFolder
from localdepth.onnx_folder.ports import STAGE_GRAPHS, cache_names

__all__ = ["Bound", "Session", "onnxruntime", "writes_in_place"]

INSTALL_LINE = "pip install onnxruntime"

_AS_REQUESTED = 1  # how an arena grows: by what is asked for, not by powers of two


@cache
def onnxruntime() -> ModuleType:
    """The library, silent, without telemetry, and with one arena for the working memory of all graphs.

    An arena for each graph would keep what the longest prompt took, once for each. Without any, much of what is given
    back to glibc is not used again: a prompt of 4,096 tokens held up to ten times its working memory.

    Raises:
        MissingExtra: it is not installed.
        EngineError: it cannot be loaded.
    """
    try:
        import onnxruntime as library  # takes 0.1 s
    except ModuleNotFoundError:
        raise MissingExtra(f"onnxruntime is not installed; type: {INSTALL_LINE}") from None
    except ImportError as error:
        raise EngineError(f"onnxruntime cannot be loaded: {error}; install it again: {INSTALL_LINE}") from error
    library.set_default_logger_severity(4)  # what matters comes as an exception
    library.disable_telemetry_events()
    place = library.OrtMemoryInfo("Cpu", library.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, library.OrtMemType.DEFAULT)
    library.create_and_register_allocator(place, library.OrtArenaCfg(0, _AS_REQUESTED, -1, -1))
    module: ModuleType = library
    return module


class Session:
    """One graph of a folder.

    Args:
        name: of the graph.
        n_threads: that compute.
        packs: keep copies of weights in layouts that compute faster.
    """

    def __init__(self, folder: OnnxFolder, name: str, n_threads: int, *, packs: bool) -> None:
        stage = STAGE_GRAPHS[name]
        self._caches = [
            tuple(cache_names(f"{way}.{stage}", folder.config.n_layer(stage))) for way in ("past", "present")
        ]
        library = onnxruntime()
        options = library.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = n_threads, 1
        options.enable_mem_pattern = False  # it would keep room for all that a graph makes, for each length of prompt
        for key, value in {
            "session.disable_prepacking": str(int(not packs)),
            "session.use_env_allocators": "1",
            "session.force_spinning_stop": "1",  # threads of this graph must not take the cores of the next
            "session.model_external_initializers_file_folder_path": str(folder.path.absolute()),
        }.items():
            options.add_session_config_entry(key, value)
        try:
            self._session = library.InferenceSession(folder.graphs[name], options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its own share no other base
            raise _failed(f"load {name}.onnx of {folder.path}", error) from error

    def bind(
        self,
        inputs: Mapping[str, Buffer],
        outputs: Mapping[str, Buffer],
        planes: Sequence[Buffer],
        apart: Sequence[Buffer] | None = None,
    ) -> "Bound":
        """Have the graph read and write these.

        Args:
            planes: keys and values of its layers in turn, with the positions before.
            apart: where new ones come out; None writes them into ``planes``.
        """
        past, present = self._caches
        binding = self._session.io_binding()
        into = dict(zip(present, planes if apart is None else apart, strict=True))
        for name, buffer in {**inputs, **dict(zip(past, planes, strict=True))}.items():
            binding.bind_ortvalue_input(name, buffer.value)
        for name, buffer in {**outputs, **into}.items():
            binding.bind_ortvalue_output(name, buffer.value)
        return Bound(self._session, binding, (inputs, outputs, planes, apart))


class Bound:
    """A graph with all that it reads and writes in its place.

    Attributes:
        outputs: what it writes, besides caches.
    """

    def __init__(
        self,
        session: Any,
        binding: Any,
        held: tuple[Mapping[str, Buffer], Mapping[str, Buffer], Sequence[Buffer], Sequence[Buffer] | None],
    ) -> None:
        self._session, self._binding = session, binding
        self._inputs, self.outputs, self._planes, self._apart = held  # the binding itself keeps no memory alive

    def run(self, start: int, n: int) -> None:
        """Compute; the tokens stand at positions ``start .. start + n - 1``."""
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # its own share no other base
            raise _failed("run a graph", error) from error
        if self._apart is not None:
            rows = slice(start, start + n)
            for plane, new in zip(self._planes, self._apart, strict=True):
                plane.array[:, :, rows] = new.array[:, :, rows]


def writes_in_place(session: Session, config: ModelConfig) -> bool:
    """Whether two tokens, one after the other, come out of a pass bit for bit as with buffers apart."""
    noise = np.random.default_rng(0).standard_normal((min(2, config.n_ctx), config.n_embd), np.float32)
    results = []
    for apart in (None, new_planes(config, "core", 2)):
        planes, lane = new_planes(config, "core", 2), Lane(config, 1)
        bound = session.bind(lane.inputs("pass", 0), lane.outputs("pass", 0), planes, apart)
        for position, row in enumerate(noise):
            lane.injected.array[:] = row
            lane.n_total.array[:] = position + 1
            bound.run(position, 1)
        results.append([lane.states[1].array, *(plane.array for plane in planes)])
    return all(np.array_equal(*pair) for pair in zip(*results, strict=True))


def _failed(doing: str, error: Exception) -> EngineError:
    return EngineError(f"ONNX Runtime cannot {doing}: {error}; export the model again, or upgrade onnxruntime")
