"""The ggml engine: spans become chunks, chunks become graphs, graphs run on a device.

A span longer than ``n_batch`` is computed chunk by chunk inside each pass (pass-major), which is what defines
prefill under a ring. Graphs of one-token spans are kept, those of prompts are built and freed: building costs
about 50 µs.
"""

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import cast

import numpy as np
from numpy.typing import NDArray

from localdepth.config import STAGES, Injection
from localdepth.engine.base import F32, Ids, Kv, Limits, Rows, Span, check_open, check_pass, check_span, n_slots
from localdepth.engine.ggml import lib as ggml
from localdepth.engine.ggml.device import Device, DeviceName, open_device
from localdepth.engine.ggml.graph import Chunk, GraphFactory
from localdepth.engine.ggml.handles import Graph, TensorGroup
from localdepth.engine.ggml.kv import GgmlKv, new_lane, plane_bytes
from localdepth.engine.ggml.parts import HEAD_ROWS, Parts, make_parts
from localdepth.engine.ggml.plan import Planner, largest_graphs
from localdepth.engine.ggml.weights import Weights, map_plain, matrices, move, pack
from localdepth.errors import EngineError
from localdepth.gguf import GgufFile
from localdepth.memory import MemoryPlan, available_bytes, check_fits
from localdepth.slots import plane

__all__ = ["GgmlEngine"]

log = logging.getLogger(__name__)

_KV_BUCKET = 256  # attention reads a multiple of this many positions, so that graphs can be kept
_VISIBLE = np.zeros(1, np.float16)  # in a mask
_SMALL = 1 << 27  # bytes that any machine has; asking costs 20 ms


class GgmlSpan:
    """Open positions of one sequence; e and s stay in ggml tensors."""

    def __init__(self, engine: "GgmlEngine", kv: GgmlKv, start: int, n: int) -> None:
        self._engine = engine
        self.kv, self.start, self.n, self.r = kv, start, n, 0
        self.lane = kv.lane if n == 1 else new_lane(engine.device, engine.config, n)
        self.chunks = tuple(_chunks(engine.limits, start, n))
        self.coda_rows: Rows | None = None  # which rows the coda gave at r
        self.last_logits: F32 | None = None  # at r

    @property
    def change(self) -> float:
        if self.r == 0:
            return float("inf")
        now, before = self.state(), self._read(f"state{(self.r - 1) % 2}")
        norms = np.maximum(np.linalg.norm(now, axis=-1), np.finfo(np.float32).tiny)
        return float(np.mean(np.linalg.norm(now - before, axis=-1) / norms))

    def state(self) -> F32:
        return self._read(f"state{self.r % 2}")

    def embeds(self) -> F32:
        return self._read("embeds")

    def end(self) -> None:
        """Leave the Kv free for the next span."""
        self.kv.busy = False
        if self.n > 1:
            self.lane.close()

    def _read(self, name: str) -> F32:
        return self.lane.read(name, (self.n, self._engine.config.n_embd))


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
            _self_test(self.device)
            self._planner = Planner(lib, file, limits)
            self._packed = self._choose_layouts()
            self._parts = self._load(file, importance)
            self._factory = GraphFactory(lib, self.config, self._parts)
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

    def core(self, spans: Sequence[Span]) -> None:
        self._check_alive()
        for span in cast(Sequence[GgmlSpan], spans):
            check_pass(span.r, span.kv.max_depth)
        for span in cast(Sequence[GgmlSpan], spans):
            index = plane(span.r, self.limits.ring)
            # a kept graph serves every pass that reads and writes the same tensors
            first = span.r == 0 and self.config.injection is Injection.NONE
            for chunk in span.chunks:
                build = partial(self._factory.core, chunk, span.lane, span.kv.tensors("core", index), span.r)
                self._run(span, chunk, ("core", index, span.r % 2, first, chunk.n_kv), build)
            span.r += 1
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
            span.end()

    def drop(self, spans: Sequence[Span]) -> None:
        for span in cast(Sequence[GgmlSpan], spans):
            span.end()
            if not span.kv.closed:
                span.kv.truncate(span.start)

    def importance(self) -> dict[str, F32]:
        """Mean square of each column that entered a matrix, by weight name: [n_in], over all rows of all passes.

        Weights that saw nothing are left out. Needs an engine made with ``importance=True``.
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
        span = GgmlSpan(self, kv, kv.n, len(ids))
        with _opening(span):
            s0 = np.zeros((span.n, self.config.n_embd), np.float32) if state is None else state
            span.lane.write("state0", np.ascontiguousarray(s0, np.float32))
            for chunk in span.chunks:
                tokens = ids[chunk.offset : chunk.offset + chunk.n]
                self._parts.tokens.write("tokens", np.ascontiguousarray(tokens, np.int32))
                build = partial(self._factory.prelude, chunk, span.lane, kv.tensors("prelude", 0))
                self._run(span, chunk, ("prelude", chunk.n_kv), build)
        return span

    def _reopen_span(self, kv: GgmlKv) -> GgmlSpan:
        span = GgmlSpan(self, kv, 0, kv.n)
        with _opening(span):
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
        positions = np.arange(first, first + chunk.n)
        io.write("positions", positions.astype(np.int32))
        io.write("rows", positions)
        if chunk.n == 1 and self._seen == first:  # the row before, and one position more
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
        if device.is_host:
            weights = Weights(plain, pack(lib, file, self._planner.packs if self._packed else (), stack))
        else:
            weights = Weights(move(device, file, stack))
        return make_parts(
            device, self.config, self.limits, weights, plain["token_embd.weight"], stack, importance=importance
        )

    def _choose_layouts(self) -> bool:
        """Whether packed layouts fit, where there are any.

        Raises: OutOfMemory when not even the plain ones do.
        """
        depth = min(self.config.default_depth, self.limits.kv_depth)
        full, lean = (self._planner.plan(depth, packed=packed) for packed in (True, False))
        free = self._free_bytes(full.total)
        if full.total <= free:
            return self.device.is_host
        check_fits(lean, free, self._planner.smaller(depth, packed=False))
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
            planned -= plan.weights - plan.mapped + plan.scratch
        free = self._free_bytes(plan.total + planned)
        check_fits(plan, free - planned, self._planner.smaller(depth, self._packed))

    def _free_bytes(self, wanted: int) -> int:
        """Memory we may take in all; small wishes are granted without asking the system."""
        if self.limits.memory_limit is not None:
            return self.limits.memory_limit
        if wanted < _SMALL:
            return _SMALL
        on_device = self.device.free_bytes()
        return available_bytes() if on_device is None else on_device


def _chunks(limits: Limits, start: int, n: int) -> Iterator[Chunk]:
    """Runs of at most n_batch rows; each attends to a bucket that depends on its own last position only."""
    for offset in range(0, n, limits.n_batch):
        rows = min(limits.n_batch, n - offset)
        end = start + offset + rows
        yield Chunk(offset, rows, min(-(-end // _KV_BUCKET) * _KV_BUCKET, limits.n_ctx))


@contextmanager
def _opening(span: GgmlSpan) -> Iterator[None]:
    """Mark the span's Kv as busy; where opening fails, free it."""
    span.kv.busy = True
    try:
        yield
    except BaseException:
        span.end()
        raise


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
