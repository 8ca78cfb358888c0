"""The ggml engine: spans become chunks, chunks become graphs, graphs run on a device.

A span longer than ``n_batch`` is computed chunk by chunk inside each pass (pass-major), which is what defines
prefill under a ring. Graphs of one-token spans are kept, those of prompts are built and freed: building costs
about 140 µs.
"""

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import cast

import numpy as np
from numpy.typing import NDArray

from localdepth.config import STAGES, Injection
from localdepth.engine.base import F32, Ids, Kv, Limits, Rows, Span, check_open, check_pass, check_span, n_slots
from localdepth.engine.ggml import lib as ggml
from localdepth.engine.ggml.device import CpuDevice, DeviceName, open_device
from localdepth.engine.ggml.graph import Chunk, GraphFactory
from localdepth.engine.ggml.handles import Graph
from localdepth.engine.ggml.kv import GgmlKv, plane_bytes
from localdepth.engine.ggml.parts import HEAD_ROWS, Parts, make_parts
from localdepth.engine.ggml.plan import Planner, largest_graphs
from localdepth.engine.ggml.span import GgmlSpan
from localdepth.engine.ggml.weights import Weights, map_plain, matrices, move, pack
from localdepth.errors import EngineError
from localdepth.gguf import GgufFile
from localdepth.memory import MemoryPlan, available_bytes, check_fits
from localdepth.slots import plane

__all__ = ["GgmlEngine"]

log = logging.getLogger(__name__)

_LAYERS_AT_ONCE = 64  # computed by one graph
_VISIBLE = np.zeros(1, np.float16)  # in a mask
_SMALL = 1 << 27  # bytes that any machine has; asking costs 20 ms


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
            _check_free(cast(GgmlKv, kv))
            check_span(self.config, self.limits, kv.n, ids, state)
        openers = [
            partial(self._open_span, cast(GgmlKv, kv), ids, state)
            for (kv, ids), state in zip(work, states, strict=True)
        ]
        return self._open_all(openers)

    def reopen(self, kvs: Sequence[Kv]) -> list[Span]:
        self._check_alive()
        for kv in kvs:
            _check_free(cast(GgmlKv, kv))
            assert len(set(kv.depths)) == 1, "all positions ran the same depth"
        return self._open_all([partial(self._reopen_span, cast(GgmlKv, kv)) for kv in kvs])

    def core(self, spans: Sequence[Span], n: int = 1) -> None:
        self._check_alive()
        for span in cast(Sequence[GgmlSpan], spans):
            check_pass(span.r + n - 1, span.kv.max_depth)
        at_once = max(1, _LAYERS_AT_ONCE // self.config.n_core)
        for span in cast(Sequence[GgmlSpan], spans):
            end = span.r + n
            while span.r < end:
                # a graph runs several passes, but under pass-major prefill
                self._advance(span, min(at_once, end - span.r) if len(span.chunks) == 1 else 1)

    def _advance(self, span: GgmlSpan, n: int) -> None:
        """Run n passes of the core in one graph per chunk."""
        first = span.r
        indices = tuple(plane(r, self.limits.ring) for r in range(first, first + n))
        planes = [span.kv.tensors("core", index) for index in indices]
        # a kept graph serves every pass that reads and writes the same tensors
        starts = first == 0 and self.config.injection is Injection.NONE
        for chunk in span.chunks:
            build = partial(self._factory.core, chunk, span.lane, planes, first)
            self._run(span, chunk, ("core", *indices, first % 2, starts, chunk.n_kv), build)
            self._rows["core"] += chunk.n * (n - 1)
        span.r += n
        span.coda_rows, span.last_logits = None, None

    def coda(self, spans: Sequence[Span], rows: Rows = "last") -> list[F32]:
        self._check_alive()
        return [self._logits(span, rows) for span in cast(Sequence[GgmlSpan], spans)]

    def commit(self, spans: Sequence[Span]) -> None:
        self._check_alive()
        for span in cast(Sequence[GgmlSpan], spans):
            assert span.r > 0, "a position runs at least one pass"
            self._coda(span, "last")
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

    def _open_all(self, openers: Sequence[Callable[[], GgmlSpan]]) -> list[Span]:
        spans: list[Span] = []
        try:
            for opener in openers:
                spans.append(opener())  # noqa: PERF401  those made so far are dropped when one fails
        except BaseException:
            self.drop(spans)
            raise
        return spans

    def _open_span(self, kv: GgmlKv, ids: Ids, state: F32 | None) -> GgmlSpan:
        span = GgmlSpan(kv, self.device, self.config, self.limits, kv.n, len(ids))
        with span.opening():
            s0 = np.zeros((span.n, self.config.n_embd), np.float32) if state is None else state
            span.lane.write("state0", np.ascontiguousarray(s0, np.float32))
            for chunk in span.chunks:
                tokens = ids[chunk.offset : chunk.offset + chunk.n]
                self._parts.tokens.write("tokens", np.ascontiguousarray(tokens, np.int32))
                build = partial(self._factory.prelude, chunk, span.lane, kv.tensors("prelude", 0))
                self._run(span, chunk, ("prelude", chunk.n_kv), build)
        return span

    def _reopen_span(self, kv: GgmlKv) -> GgmlSpan:
        span = GgmlSpan(kv, self.device, self.config, self.limits, 0, kv.n)
        with span.opening():
            span.r = kv.depths[0]
            span.lane.write("embeds", kv.embeds[: kv.n])
            span.lane.write(f"state{span.r % 2}", kv.states[: kv.n])
            if self.config.injection is Injection.CONCAT_LINEAR:
                for chunk in span.chunks:
                    build = partial(self._factory.injected, chunk, span.lane)
                    self._compute(span, chunk.n, ("injected",), build)
        return span

    def _logits(self, span: GgmlSpan, rows: Rows) -> F32:
        self._coda(span, rows)
        if rows == "all":
            return np.concatenate([self._head(span, offset) for offset in range(0, span.n, HEAD_ROWS)])
        if span.last_logits is None:  # all rows were asked for before
            span.last_logits = self._head(span, span.n - 1)
        return span.last_logits

    def _head(self, span: GgmlSpan, offset: int) -> F32:
        """Logits of a few rows from ``offset`` on."""
        n = min(HEAD_ROWS, span.n - offset)
        self._compute(span, n, ("head",), partial(self._factory.head, Chunk(offset, n, 1), span.lane))
        return self._parts.io.read("logits", (n, self.config.n_vocab))

    def _coda(self, span: GgmlSpan, rows: Rows) -> None:
        """Keys and values of all rows; output of all, or logits of the last."""
        if span.coda_rows in (rows, "all"):
            return
        *before, last = span.chunks
        planes = span.kv.tensors("coda", 0)
        for chunk in span.chunks if rows == "all" else before:
            n_out = chunk.n if rows == "all" else 0
            build = partial(self._factory.coda, chunk, span.lane, planes, span.r, n_out)
            self._run(span, chunk, ("coda", span.r % 2, chunk.n_kv), build)
        if rows == "last":
            build = partial(self._factory.coda_and_head, last, span.lane, planes, span.r)
            self._run(span, last, ("coda and head", span.r % 2, last.n_kv), build)
            self._rows.update(coda=last.n, head=1)
            span.last_logits = self._parts.io.read("logits", (1, self.config.n_vocab))
        span.coda_rows = rows

    def _run(self, span: GgmlSpan, chunk: Chunk, key: tuple[str | int, ...], build: Callable[[], Graph]) -> None:
        """Compute a graph that attends: its positions and mask come first."""
        if self._placed != (span, chunk):
            self._place(span, chunk)
        self._compute(span, chunk.n, key, build)

    def _compute(self, span: GgmlSpan, n: int, key: tuple[str | int, ...], build: Callable[[], Graph]) -> None:
        self._rows[str(key[0])] += n
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
        positions = np.arange(first, first + chunk.n)
        io.write("positions", positions.astype(np.int32))
        io.write("rows", positions)
        if chunk.n == 1 and seen == first:  # the row before, and one position more
            io.write("mask", _VISIBLE, first)
        elif chunk.n == 1:
            io.write("mask", _mask(positions, self.limits.n_ctx))
        else:
            io.write("mask", _mask(positions, chunk.n_kv))
        self._seen = first + 1 if chunk.n == 1 else -1
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
        free = self._free_bytes(full.total)
        if full.total <= free:
            return self.device.is_host
        check_fits(lean, free, self._planner.smaller(depth, packed=False, loading=True))
        log.info("no room for packed weights: %s; %d bytes are free", full, free)
        return False

    def _admit(self, depth: int, kv: GgmlKv | None) -> None:
        """Refuse a cache of this depth, or one that grows to it, where there is no room."""
        plan = self.plan(depth)
        others = [other for other in self._open if other is not kv and not other.closed]
        planned = sum(self.plan(other.max_depth).sequence for other in others)
        if self.limits.memory_limit is None:  # what is written of them is not free any more
            planned -= sum(self.plan(o.max_depth).sequence * o.n // self.limits.n_ctx for o in others)
            planned -= self.plan(kv.max_depth).sequence * kv.n // self.limits.n_ctx if kv else 0
            planned -= plan.weights + plan.scratch - (plan.mapped if self.device.is_host else 0)
        free = self._free_bytes(plan.total + planned)
        check_fits(plan, free - planned, self._planner.smaller(depth, self._packed, loading=False))

    def _free_bytes(self, wanted: int) -> int:
        """Memory we may take in all; small wishes are granted without asking the system."""
        if self.limits.memory_limit is not None:
            return self.limits.memory_limit
        if wanted < _SMALL:
            return _SMALL
        on_device = self.device.free_bytes()
        return available_bytes() if on_device is None else on_device


def _mask(positions: NDArray[np.int64], n_kv: int) -> NDArray[np.float16]:
    """0 where a row may look, -inf ahead of it: [n, n_kv]."""
    return np.where(np.arange(n_kv) > positions[:, None], np.float16(-np.inf), np.float16(0))


def _check_free(kv: GgmlKv) -> None:
    if kv.closed:
        raise EngineError("this cache is closed; open another")
    assert not kv.busy, "a Kv carries one open span"


def _kind(name: str) -> str:
    """The kind of graph a matrix is in."""
    if name.startswith("injection."):
        return "core" if name.startswith("injection.state") else "prelude"
    stage = name.split(".")[0]
    return stage if stage in STAGES else "head"
