"""How much memory a file will take under these limits; nothing large is allocated to find out.

Weights are mapped, caches are pages that nobody touches, and ggml's allocator says what graphs would need.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

from localdepth.config import Injection
from localdepth.engine.base import Limits, n_slots
from localdepth.engine.ggml.device import CpuDevice, Device
from localdepth.engine.ggml.graph import Begins, Chunk, Ends, GraphFactory, Work
from localdepth.engine.ggml.handles import Graph
from localdepth.engine.ggml.kv import GgmlKv, new_lane, plane_bytes
from localdepth.engine.ggml.lib import Ggml
from localdepth.engine.ggml.parts import HEAD_ROWS, io_bytes, make_parts, n_rows
from localdepth.engine.ggml.weights import Weights, map_plain, plan_packs
from localdepth.engine.room import smaller
from localdepth.gguf import GgufFile
from localdepth.memory import MemoryPlan

__all__ = ["Planner", "largest_graphs"]


class Planner:
    """Plans for one file; it may be closed afterwards.

    Attributes:
        packs: the packed layouts that this CPU has for it.
    """

    def __init__(self, lib: Ggml, file: GgufFile, limits: Limits) -> None:
        self._config, self._limits = file.config, limits
        self.packs = () if limits.low_memory else tuple(plan_packs(lib, file))
        self._sizes = {name: info.n_bytes for name, info in file.tensors.items()}
        with ExitStack() as stack:
            device = CpuDevice(lib, limits.n_threads, stack)
            plain = map_plain(lib, file, stack)
            embedding = plain["token_embd.weight"]
            parts = make_parts(device, file.config, limits, Weights(plain), embedding, stack)
            factory = GraphFactory(lib, file.config, parts)
            self._scratch = device.measure(largest_graphs(factory, device, limits, stack))

    def plan(self, depth: int, limits: Limits | None = None, packed: bool = True) -> MemoryPlan:
        """Bytes for a sequence at ``depth`` that fills its context.

        Args:
            limits: others than those the planner was made for.
            packed: with the packed layouts.
        """
        config, limits = self._config, limits or self._limits
        packs = self.packs if packed else ()
        replaced = {name for pack in packs if pack.serves_all for name in pack.names}
        layouts: dict[str, int] = {}
        for pack in packs:
            layouts[pack.layout] = layouts.get(pack.layout, 0) + pack.n_bytes
        row_bytes = 4 * config.n_embd
        n_kept_rows = 4 if config.injection is Injection.CONCAT_LINEAR else 3  # e, its injection, two states
        return MemoryPlan(
            depth=depth,
            n_ctx=limits.n_ctx,
            ring=limits.ring,
            kv_type=str(limits.kv_type),
            mapped=sum(size for name, size in self._sizes.items() if name not in replaced),
            packed=layouts,
            kv=n_slots(config, depth, limits.ring) * plane_bytes(config, limits.kv_type, limits.n_ctx),
            states=2 * limits.n_ctx * row_bytes,
            rows=n_kept_rows * limits.n_ctx * row_bytes + io_bytes(config, limits),
            scratch=self._scratch,
        )

    def smaller(self, depth: int, packed: bool, loading: bool) -> Iterator[Iterator[tuple[str, MemoryPlan]]]:
        """Ways to need less than ``plan(depth)``, each with its settings, gentlest first.

        Args:
            loading: name settings of ``load``, not of a request.
        """
        if packed and self.packs:
            yield iter([("low_memory=True (--low-memory)", self.plan(depth, packed=False))])
        yield from smaller(
            self._limits,
            depth,
            lambda depth, limits: self.plan(depth, limits, packed=False),
            lambda depth: self.plan(depth, packed=packed),
            loading=loading,
        )


def largest_graphs(factory: GraphFactory, device: Device, limits: Limits, stack: ExitStack) -> Iterator[Graph]:
    """The largest graph of every kind, over a cache that is never written; freed with ``stack``."""
    n, config = n_rows(limits), factory.config
    kv = GgmlKv(device, config, limits, 1, lambda depth, kv: None)
    stack.callback(kv.close)
    lane = new_lane(device, config, max(n, HEAD_ROWS))
    stack.callback(lane.close)
    kinds = [partial(factory.head, Chunk(0, HEAD_ROWS, 1), lane)]
    for rows in (n, 1):
        for ends in (None, Ends.OUTPUT, Ends.LOGITS):
            work = Work(Begins.PRELUDE, passes=(0, 0, 0), parity=0, starts=True, ends=ends)
            kinds.append(partial(factory.span, Chunk(0, rows, limits.n_ctx), lane, kv.tensors, work))
    for build in kinds:
        graph = build()
        stack.callback(graph.close)
        yield graph
