"""K/V planes of one sequence and the working rows of its open span.

Planes lie in numpy memory with ggml tensors over them, so a stopped position's keys and values can be copied
forward (see ``commit``) and every read stays a plain view: a plane always holds, for each committed position,
what the *latest* lookup of ``slots.visible`` finds there.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable

import numpy as np

from localdepth.config import STAGES, Injection, ModelConfig
from localdepth.engine.base import KvType, Limits, check_open
from localdepth.engine.ggml import lib as ggml
from localdepth.engine.ggml.device import Device
from localdepth.engine.ggml.handles import Graph, TensorGroup
from localdepth.engine.pages import lazy_zeros
from localdepth.slots import n_planes

__all__ = ["GgmlKv", "new_lane", "plane_bytes"]

_TYPES = {KvType.F32: (ggml.F32, np.float32), KvType.F16: (ggml.F16, np.float16)}
Admit = Callable[[int, "GgmlKv | None"], None]
_MAX_NODES = 1 << 16  # of all kept decode graphs of a sequence, 0.4 kB each


def plane_bytes(config: ModelConfig, kv_type: KvType, n_ctx: int) -> int:
    """Bytes of one layer's keys and values at one pass."""
    return 2 * n_ctx * config.n_embd_kv * np.dtype(_TYPES[kv_type][1]).itemsize


def new_lane(device: Device, config: ModelConfig, n: int) -> TensorGroup:
    """Working rows of a span: e, its injected form, s_r and s_{r+1} taking turns, the coda's output; [n, n_embd]."""
    names = ["embeds", "state0", "state1", "output"]
    if config.injection is Injection.CONCAT_LINEAR:
        names.append("injected")
    return TensorGroup(device.lib, dict.fromkeys(names, (ggml.F32, (config.n_embd, n))), device.memory)


def _new_planes(device: Device, config: ModelConfig, limits: Limits, n_layer: int) -> TensorGroup:
    """Keys and values of all layers of one stage at one pass, ``{layer}.k`` and ``{layer}.v``, [n_ctx, n_embd_kv]."""
    names = [f"{layer}.{side}" for layer in range(n_layer) for side in "kv"]
    specs = dict.fromkeys(names, (_TYPES[limits.kv_type][0], (config.n_embd_kv, limits.n_ctx)))
    planes = TensorGroup(device.lib, specs, device.memory)
    if not device.is_host:
        planes.clear()  # attention multiplies what it masks, and rubbish may not be finite
    return planes


class GgmlKv:
    """Cache of one sequence; planes of the core are made pass by pass on first use.

    Args:
        max_depth: passes its positions may run.
        admit: refuses a depth that there is no room for; called with it and the cache it is for, None for a new one.
    """

    def __init__(self, device: Device, config: ModelConfig, limits: Limits, max_depth: int, admit: Admit) -> None:
        admit(max_depth, None)
        self._device, self._config, self._limits, self._admit = device, config, limits, admit
        self.max_depth = max_depth
        self.depths: list[int] = []
        # e and s_d of committed positions, from which deeper passes go on; untouched pages cost nothing
        self.embeds, self.states = lazy_zeros((2, limits.n_ctx, config.n_embd), np.float32)
        self._planes: dict[str, list[TensorGroup]] = {stage: [] for stage in STAGES}  # by pass in the core, else one
        self._lane: TensorGroup | None = None
        self._graphs: OrderedDict[Hashable, Graph] = OrderedDict()
        self._n_nodes = 0  # in them
        self.busy = False  # a span is open
        self.closed = False

    @property
    def n(self) -> int:
        return len(self.depths)

    @property
    def lane(self) -> TensorGroup:
        """Working rows of one-token spans; graphs over them are kept."""
        if self._lane is None:
            self._lane = new_lane(self._device, self._config, 1)
        return self._lane

    def tensors(self, stage: str, index: int) -> TensorGroup:
        """Tensors ``{layer}.k`` and ``{layer}.v`` of one plane, made on first use."""
        made = self._planes[stage]
        while len(made) <= index:
            planes = _new_planes(self._device, self._config, self._limits, self._config.n_layer(stage))
            if made and self.n:  # every committed position stopped before this plane existed
                self._copy_rows(made[-1], planes, 0, self.n)
            made.append(planes)
        return made[index]

    def allow(self, max_depth: int) -> None:
        check_open(self._limits, max_depth)
        if max_depth > self.max_depth:
            self._admit(max_depth, self)
            self.max_depth = max_depth

    def commit(self, first: int, lane: TensorGroup, n: int, depth: int) -> None:
        """Let n positions from ``first`` on be at ``depth``, visible from deeper passes through their last plane."""
        core = self._planes["core"]
        last = n_planes(depth, self._limits.ring)
        for deeper in core[last:]:
            self._copy_rows(core[last - 1], deeper, first, n)
        rows = slice(first, first + n)
        lane.read_into("embeds", self.embeds[rows])
        lane.read_into(f"state{depth % 2}", self.states[rows])
        self.depths[first:] = [depth] * n

    def graph(self, key: Hashable, build: Callable[[], Graph]) -> Graph:
        """A decode graph, built once; the least recently used make room."""
        graph = self._graphs.get(key)
        if graph is None:
            graph = build()
            while self._graphs and self._n_nodes + graph.max_nodes > _MAX_NODES:
                self._drop(next(iter(self._graphs)))
            self._graphs[key] = graph
            self._n_nodes += graph.max_nodes
        self._graphs.move_to_end(key)
        return graph

    def _drop(self, key: Hashable) -> None:
        graph = self._graphs.pop(key)
        self._n_nodes -= graph.max_nodes
        graph.close()

    def forget_graphs(self) -> None:
        """Free the kept graphs; they are built again when needed."""
        for key in list(self._graphs):
            self._drop(key)

    def truncate(self, n: int) -> None:
        assert not self.busy, "a span is open"
        del self.depths[n:]

    def fork(self, n: int) -> "GgmlKv":
        twin = GgmlKv(self._device, self._config, self._limits, self.max_depth, self._admit)
        for stage, made in self._planes.items():
            for index, planes in enumerate(made):
                self._copy_rows(planes, twin.tensors(stage, index), 0, n)
        twin.depths = self.depths[:n]
        twin.embeds[:n], twin.states[:n] = self.embeds[:n], self.states[:n]
        return twin

    def _copy_rows(self, source: TensorGroup, target: TensorGroup, first: int, n: int) -> None:
        """Copy keys and values of n positions from one plane to another."""
        width = self._config.n_embd_kv
        target.copy_from(source, first * width, n * width, _TYPES[self._limits.kv_type][1])

    def close(self) -> None:
        self.closed = True
        self.forget_graphs()
        for made in self._planes.values():
            for planes in made:
                planes.close()
            made.clear()
        if self._lane is not None:
            self._lane.close()
        self._lane = None
        self.embeds = self.states = np.empty((0, self._config.n_embd), np.float32)
        self.depths.clear()
