"""K/V planes of one sequence and the working rows of its open span.

Planes lie in numpy memory with ggml tensors over them, so a stopped position's keys and values can be copied
forward (see ``commit``) and every read stays a plain view: a plane always holds, for each committed position,
what the *latest* lookup of ``slots.visible`` finds there.
"""

from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from localdepth.config import STAGES, Injection, ModelConfig
from localdepth.engine.base import KvType, Limits
from localdepth.engine.ggml import lib as ggml
from localdepth.engine.ggml.handles import Backend, Graph, TensorGroup, aligned_zeros
from localdepth.slots import n_planes

__all__ = ["GgmlKv", "new_lane", "plane_bytes"]

_TYPES = {KvType.F32: (ggml.F32, np.float32), KvType.F16: (ggml.F16, np.float16)}
_MAX_GRAPHS = 512  # kept decode graphs per sequence, about 40 kB each


def plane_bytes(config: ModelConfig, kv_type: KvType, n_ctx: int) -> int:
    """Bytes of one layer's keys and values at one pass."""
    return 2 * n_ctx * config.n_embd_kv * np.dtype(_TYPES[kv_type][1]).itemsize


def new_lane(backend: Backend, config: ModelConfig, n: int) -> TensorGroup:
    """Working rows of a span: e, its injected form, s_r and s_{r+1} taking turns, the coda's output; [n, n_embd]."""
    names = ["embeds", "state0", "state1", "output"]
    if config.injection is Injection.CONCAT_LINEAR:
        names.append("injected")
    return TensorGroup(backend, dict.fromkeys(names, (ggml.F32, (config.n_embd, n))))


class _Planes:
    """Keys and values of all layers of one stage at one pass: array [n_layer, 2, n_ctx, n_embd_kv]."""

    def __init__(self, backend: Backend, config: ModelConfig, limits: Limits, n_layer: int) -> None:
        kind, dtype = _TYPES[limits.kv_type]
        # rows are padded so that each tensor starts aligned
        step = -(-limits.n_ctx * config.n_embd_kv * np.dtype(dtype).itemsize // 64) * 64 // np.dtype(dtype).itemsize
        memory = aligned_zeros((n_layer, 2, step), dtype)
        self.array: npt.NDArray[np.generic] = memory[:, :, : limits.n_ctx * config.n_embd_kv].reshape(
            n_layer, 2, limits.n_ctx, config.n_embd_kv
        )
        shape = (config.n_embd_kv, limits.n_ctx)
        names = [f"{layer}.{side}" for layer in range(n_layer) for side in "kv"]
        self.tensors = TensorGroup(
            backend, dict.fromkeys(names, (kind, shape)), memory.reshape(-1).view(np.uint8), step * memory.itemsize
        )


class GgmlKv:
    """Cache of one sequence; planes of the core are made pass by pass on first use."""

    def __init__(self, backend: Backend, config: ModelConfig, limits: Limits, max_depth: int) -> None:
        self._backend, self._config, self._limits = backend, config, limits
        self.max_depth = max_depth
        self.depths: list[int] = []
        self._planes: dict[str, list[_Planes]] = {stage: [] for stage in STAGES}  # by pass in the core, else one
        self._lane: TensorGroup | None = None
        self._graphs: OrderedDict[tuple[object, ...], Graph] = OrderedDict()
        self.busy = False  # a span is open
        self.closed = False

    @property
    def n(self) -> int:
        return len(self.depths)

    @property
    def lane(self) -> TensorGroup:
        """Working rows of one-token spans; graphs over them are kept."""
        if self._lane is None:
            self._lane = new_lane(self._backend, self._config, 1)
        return self._lane

    def tensors(self, stage: str, index: int) -> TensorGroup:
        """Tensors ``{layer}.k`` and ``{layer}.v`` of one plane, made on first use."""
        made = self._planes[stage]
        while len(made) <= index:
            planes = _Planes(self._backend, self._config, self._limits, self._config.n_layer(stage))
            if made:  # every committed position stopped before this plane existed
                planes.array[:, :, : self.n] = made[-1].array[:, :, : self.n]
            made.append(planes)
        return made[index].tensors

    def commit(self, n: int, depth: int) -> None:
        """Let ``n`` new positions join at ``depth``, visible from deeper passes through their last plane."""
        new = slice(self.n, self.n + n)
        core = self._planes["core"]
        if depth < n_planes(self.max_depth, self._limits.ring):
            for deeper in core[depth:]:
                deeper.array[:, :, new] = core[depth - 1].array[:, :, new]
        self.depths += [depth] * n

    def graph(self, key: tuple[object, ...], build: Callable[[], Graph]) -> Graph:
        """A decode graph, built once; the least recently used makes room."""
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._graphs[key] = build()
            if len(self._graphs) > _MAX_GRAPHS:
                self._graphs.popitem(last=False)[1].close()
        self._graphs.move_to_end(key)
        return graph

    def forget_graphs(self) -> None:
        """Free the kept graphs; they are built again when needed."""
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()

    def truncate(self, n: int) -> None:
        assert not self.busy, "a span is open"
        del self.depths[n:]

    def fork(self, n: int) -> "GgmlKv":
        twin = GgmlKv(self._backend, self._config, self._limits, self.max_depth)
        for stage, made in self._planes.items():
            for index, planes in enumerate(made):
                twin.tensors(stage, index)
                twin._planes[stage][index].array[:, :, :n] = planes.array[:, :, :n]
        twin.depths = self.depths[:n]
        return twin

    def close(self) -> None:
        self.closed = True
        self.forget_graphs()
        for made in self._planes.values():
            for planes in made:
                planes.tensors.close()
            made.clear()
        if self._lane is not None:
            self._lane.close()
        self._lane = None
        self.depths.clear()
