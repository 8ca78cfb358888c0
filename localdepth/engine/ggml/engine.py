"""The ggml engine: spans become chunks, chunks become graphs, graphs run on a device.

Calls only note what is wanted of a span; when somebody looks, all of it becomes one graph per chunk. Where passes
share planes in a ring, a span longer than ``n_batch`` is computed chunk by chunk inside each pass (pass-major), which
is what defines prefill there. Graphs of one-token spans are kept, those of prompts are built and freed: building
costs about 140 µs.
"""

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache, partial
from itertools import product
from typing import cast

import numpy as np
from numpy.typing import NDArray

from localdepth.config import STAGES, Injection
from localdepth.engine.base import F32, Ids, Kv, Limits, Rows, Span, check_open, check_pass, check_span, n_slots
from localdepth.engine.ggml import lib as ggml
from localdepth.engine.ggml.device import CpuDevice, DeviceName, open_device
from localdepth.engine.ggml.graph import Begins, Chunk, Ends, GraphFactory, Work
from localdepth.engine.ggml.handles import Graph
from localdepth.engine.ggml.kv import GgmlKv, plane_bytes
from localdepth.engine.ggml.parts import HEAD_ROWS, Parts, make_parts
from localdepth.engine.ggml.plan import Planner, largest_graphs
from localdepth.engine.ggml.span import GgmlSpan
from localdepth.engine.ggml.weights import Weights, map_plain, matrices, move, pack
from localdepth.engine.opening import check_free, open_all
from localdepth.engine.room import check_room, free_bytes
from localdepth.errors import EngineError
from localdepth.gguf import GgufFile
from localdepth.memory import MemoryPlan, available_bytes, check_fits
from localdepth.slots import plane

__all__ = ["GgmlEngine"]

log = logging.getLogger(__name__)

_LAYERS_AT_ONCE = 64  # of the core, computed by one graph
_ENDS: dict[Rows | None, Ends | None] = {None: None, "last": Ends.LOGITS, "all": Ends.OUTPUT}


class GgmlEngine:
    """Runs a GGUF file.

    Args:
        file: an open model file; it may be closed afterwards, and stays mapped.
        limits: machine settings.
        device: where to compute.
        importance: add up the squares of what enters each product; see ``importance``.
    Raises:
        MissingExtra: ggml's libraries are not installed.
        EngineError: they are damaged or of another version, or there is no such device.
        OutOfMemory: the model does not fit; what would is said.
    """

    def __init__(
        self,
        file: GgufFile,
        limits: Limits,
        device: DeviceName = DeviceName.CPU,
        importance: bool = False,
    ) -> None:
        self.config, self.limits = file.config, limits
        lib = ggml.library()
        self._open: weakref.WeakSet[GgmlKv] = weakref.WeakSet()
        self._closed = False
        self._stack = ExitStack()
        self._finalizer = weakref.finalize(self, self._stack.close)  # an engine nobody closed must not leak
        self._placed: tuple[GgmlSpan, Chunk] | None = None  # whose positions and mask io holds
        self._seen = -1  # positions that the single row in io's mask lets through; -1 while there are several rows
        self._rows: Counter[str] = Counter()  # computed, by kind of graph
        try:
            self.device = open_device(lib, device, limits.n_threads, self._stack)
            self._planner = Planner(lib, file, limits)
            self._packed = self._choose_layouts()
            self._parts = self._load(file, importance)
            self._factory = GraphFactory(lib, self.config, self._parts)
            if isinstance(self.device, CpuDevice):
                with ExitStack() as stack:
                    for graph in largest_graphs(self._factory, self.device, limits, stack):
                        self.device.reserve(graph)
        except BaseException:
            self._finalizer()
            raise

    def plan(self, depth: int) -> MemoryPlan:
        return self._planner.plan(depth, packed=self._packed)

    def kv_bytes(self, depth: int, n_ctx: int) -> int:
        slots = n_slots(self.config, depth, self.limits.ring)
        return slots * plane_bytes(self.config, self.limits.kv_type, n_ctx)

    def open(self, max_depth: int) -> GgmlKv:
        self._check_alive()
        check_open(self.limits, max_depth)
        kv = GgmlKv(self.device, self.config, self.limits, max_depth, self._admit)
        self._open.add(kv)
        return kv

    def prelude(self, work: Sequence[tuple[Kv, Ids]], states: Sequence[F32 | None]) -> list[Span]:
        self._check_alive()
        for (kv, ids), state in zip(work, states, strict=True):
            check_free(cast(GgmlKv, kv))
            check_span(self.config, self.limits, kv.n, ids, state)
        return open_all(
            (self._new_span(cast(GgmlKv, kv), ids, state) for (kv, ids), state in zip(work, states, strict=True)),
            self.drop,
        )

    def reopen(self, kvs: Sequence[Kv]) -> list[Span]:
        self._check_alive()
        for kv in kvs:
            check_free(cast(GgmlKv, kv))
            assert len(set(kv.depths)) == 1, "all positions ran the same depth"
        return open_all((self._old_span(cast(GgmlKv, kv)) for kv in kvs), self.drop)

    def core(self, spans: Sequence[Span], n: int = 1) -> None:
        self._check_alive()
        for span in cast(Sequence[GgmlSpan], spans):
            check_pass(span.r + n - 1, span.kv.max_depth)
        for span in cast(Sequence[GgmlSpan], spans):
            span.r += n
            span.coda_rows, span.last_logits = None, None

    def coda(self, spans: Sequence[Span], rows: Rows = "last") -> list[F32]:
        self._check_alive()
        return [self._logits(span, rows) for span in cast(Sequence[GgmlSpan], spans)]

    def commit(self, spans: Sequence[Span]) -> None:
        self._check_alive()
        for span in cast(Sequence[GgmlSpan], spans):
            assert span.r > 0, "a position runs at least one pass"
            self._look(span, "last")
            span.kv.commit(span.start, span.lane, span.n, span.r)
            self._end(span)

    def drop(self, spans: Sequence[Span]) -> None:
        for span in cast(Sequence[GgmlSpan], spans):
            self._end(span)
            if not span.kv.closed:
                span.kv.truncate(span.start)

    def _end(self, span: GgmlSpan) -> None:
        span.end()
        self._placed = None  # or its cache could not be freed

    def importance(self) -> dict[str, F32]:
        """Mean square of each column that entered a matrix, by weight name: [n_in], over all rows of all passes.

        Weights that saw nothing are left out. Needs an engine made with ``importance=True`` that was asked for the
        logits of all rows: where only the last is wanted, the coda's last layer sees fewer rows than count.
        """
        assert self._parts.sums is not None, "made with importance=True"
        means = {}
        for name, n_in in matrices(self.config).items():
            if rows := self._rows[_kind(name)]:
                means[name] = self._parts.sums.read(name, (n_in,)) / np.float32(rows)
        return means

    def close(self) -> None:
        self._closed = True
        for kv in list(self._open):
            kv.close()
        self._finalizer()

    def _check_alive(self) -> None:
        """Native code would run into freed memory."""
        if self._closed:
            raise EngineError("this model is closed; load it again")

    def _new_span(self, kv: GgmlKv, ids: Ids, state: F32 | None) -> GgmlSpan:
        span = GgmlSpan(kv, self.device, self.config, self.limits, kv.n, len(ids), self._look)
        if state is None:
            span.lane.fill("state0", 0, 0, span.n * self.config.n_embd)
        else:
            span.lane.write("state0", np.ascontiguousarray(state, np.float32))
        span.begins, span.ids = Begins.PRELUDE, ids.astype(np.int32)
        return span

    def _old_span(self, kv: GgmlKv) -> GgmlSpan:
        span = GgmlSpan(kv, self.device, self.config, self.limits, 0, kv.n, self._look)
        span.r = span.done = kv.depths[0]
        span.lane.write("embeds", kv.embeds[: kv.n])
        span.lane.write(f"state{span.r % 2}", kv.states[: kv.n])
        if self.config.injection is Injection.CONCAT_LINEAR:
            span.begins = Begins.INJECTED
        return span

    def _logits(self, span: GgmlSpan, rows: Rows) -> F32:
        self._look(span, rows)
        if rows == "all":
            return np.concatenate([self._head(span, offset) for offset in range(0, span.n, HEAD_ROWS)])
        if span.last_logits is None:  # all rows were asked for before
            span.last_logits = self._head(span, span.n - 1)
        return span.last_logits

    def _head(self, span: GgmlSpan, offset: int) -> F32:
        """Logits of a few rows from ``offset`` on."""
        n = min(HEAD_ROWS, span.n - offset)
        self._compute(span, "head", partial(self._factory.head, Chunk(offset, n, 1), span.lane))
        self._rows["head"] += n
        return self._parts.io.read("logits", (n, self.config.n_vocab))

    def _look(self, span: GgmlSpan, rows: Rows | None = None) -> None:
        """Compute what was asked of the span up to here, and the coda for these rows."""
        if span.coda_rows in (rows, "all"):
            rows = None
        if rows is None and span.begins is None and span.done == span.r:
            return
        apart = self._passes_apart(span)
        starts = span.done == 0 and self.config.injection is Injection.NONE
        at_once = max(1, _LAYERS_AT_ONCE // self.config.n_core) if apart else 1
        works = _works(span.begins, starts, span.done, span.r, self.limits.ring, at_once, _ENDS[rows])
        order = product(span.chunks, works) if apart else ((chunk, work) for work, chunk in product(works, span.chunks))
        for chunk, work in order:
            self._run(span, chunk, work)
        span.begins, span.done = None, span.r
        if rows is not None:
            span.coda_rows = rows
        if rows == "last":
            span.last_logits = self._parts.io.read("logits", (1, self.config.n_vocab))

    def _passes_apart(self, span: GgmlSpan) -> bool:
        """Whether a chunk may run all its passes before the next: none overwrites what that one must still see."""
        return len(span.chunks) == 1 or self.limits.ring is None or span.r <= self.limits.ring

    def _run(self, span: GgmlSpan, chunk: Chunk, work: Work) -> None:
        """Compute a graph; its tokens, positions and mask come first."""
        if self._placed != (span, chunk):
            self._place(span, chunk)
        if work.begins is Begins.PRELUDE:
            self._parts.tokens.write("tokens", span.ids[chunk.offset : chunk.offset + chunk.n])
        if work.ends is Ends.LOGITS and chunk is not span.chunks[-1]:
            work = replace(work, ends=Ends.KEYS)  # the span's last row is in another chunk
        self._compute(span, (work, chunk.n_kv), partial(self._factory.span, chunk, span.lane, span.kv.tensors, work))
        if self._parts.sums is not None:
            self._count(chunk.n, work)

    def _count(self, n: int, work: Work) -> None:
        """Note how many rows each kind of matrix saw."""
        self._rows["prelude"] += n * (work.begins is Begins.PRELUDE)
        self._rows["core"] += n * len(work.passes)
        self._rows["coda"] += n * (work.ends is not None)
        self._rows["head"] += work.ends is Ends.LOGITS

    def _compute(self, span: GgmlSpan, key: Hashable, build: Callable[[], Graph]) -> None:
        if span.n == 1:
            self.device.compute(span.kv.graph(key, lambda: self._built(build)))
            return
        graph = self._built(build)
        try:
            self.device.compute(graph)
        finally:
            graph.close()

    def _built(self, build: Callable[[], Graph]) -> Graph:
        graph = build()
        try:
            if self.device.place(graph):
                for kv in self._open:
                    kv.forget_graphs()
        except BaseException:
            graph.close()
            raise
        return graph

    def _place(self, span: GgmlSpan, chunk: Chunk) -> None:
        """Write the chunk's positions, and what each may look at."""
        io = self._parts.io
        first = span.start + chunk.offset
        seen, self._seen, self._placed = self._seen, -1, None  # an interrupt must not leave what is not written
        if chunk.n == 1:
            io.fill("positions", first, 0, 1)
            io.fill("rows", first, 0, 1)
            if seen == first:  # the row before, and one position more
                io.fill("mask", 0, first, 1)
            else:
                io.write("mask", _mask(np.array([first]), self.limits.n_ctx))
            self._seen = first + 1
        else:
            positions = np.arange(first, first + chunk.n)
            io.write("positions", positions.astype(np.int32))
            io.write("rows", positions)
            io.write("mask", _mask(positions, chunk.n_kv))
        self._placed = span, chunk

    def _load(self, file: GgufFile, importance: bool) -> Parts:
        """Make every tensor that outlives the graphs."""
        device, lib, stack = self.device, self.device.lib, self._stack
        plain = map_plain(lib, file, stack)
        plain.hold_weights()  # of a model on another device the embedding stays here
        if device.is_host:
            weights = Weights(plain, pack(lib, file, self._planner.packs if self._packed else (), stack))
        else:
            weights = Weights(move(device, file, stack))
        return make_parts(
            device, self.config, self.limits, weights, plain["token_embd.weight"], stack, importance=importance
        )

    def _choose_layouts(self) -> bool:
        """Whether packed layouts fit beside a sequence of the default depth, where there are any.

        Raises: OutOfMemory when not even the plain ones do. Deeper requests are judged when they come.
        """
        depth = min(self.config.default_depth, self.limits.kv_depth)
        full, lean = (self._planner.plan(depth, packed=packed) for packed in (True, False))
        free = free_bytes(self.limits, full.total, self._available)
        if full.total <= free:
            return self.device.is_host
        check_fits(lean, free, self._planner.smaller(depth, packed=False, loading=True))
        log.info("no room for packed weights: %s; %d bytes are free", full, free)
        return False

    def _admit(self, depth: int, kv: GgmlKv | None) -> None:
        """Refuse a cache of this depth, or one that grows to it, where there is no room."""
        others = [other for other in self._open if other is not kv and not other.closed]
        plan = self.plan(depth)
        loaded = plan.weights + plan.scratch - (plan.mapped if self.device.is_host else 0)
        ways = self._planner.smaller(depth, self._packed, loading=False)
        check_room(self.limits, self.plan, depth, kv, others, loaded, ways, self._available)

    def _available(self) -> int:
        on_device = self.device.free_bytes()
        return available_bytes() if on_device is None else on_device


def _mask(positions: NDArray[np.int64], n_kv: int) -> NDArray[np.float16]:
    """0 where a row may look, -inf ahead of it: [n, n_kv]."""
    return np.where(np.arange(n_kv) > positions[:, None], np.float16(-np.inf), np.float16(0))


@lru_cache
def _works(
    begins: Begins | None, starts: bool, first: int, end: int, ring: int | None, at_once: int, ends: Ends | None
) -> Sequence[Work]:
    """Passes ``first .. end - 1`` and what is before and after them, in as few pieces as may be."""
    works = [
        Work(None, tuple(plane(i, ring) for i in range(r, min(r + at_once, end))), r % 2, starts and r == first, None)
        for r in range(first, end, at_once)
    ] or [Work(None, (), end % 2, False, None)]
    works[0] = replace(works[0], begins=begins)
    works[-1] = replace(works[-1], ends=ends)
    return tuple(works)


def _kind(name: str) -> str:
    """The kind of graph a matrix is in."""
    if name.startswith("injection."):
        return "core" if name.startswith("injection.state") else "prelude"
    stage = name.split(".")[0]
    return stage if stage in STAGES else "head"
