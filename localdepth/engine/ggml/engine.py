"""The ggml engine: spans become chunks, chunks become graphs, graphs run on the CPU.

A span longer than ``n_batch`` is computed chunk by chunk inside each pass (pass-major), which is what defines
prefill under a ring. Graphs of one-token spans are kept, those of prompts are built and freed: building costs
about 50 µs.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import cast

import numpy as np

from localdepth.config import Injection
from localdepth.engine.base import F32, Ids, Kv, KvType, Limits, Rows, Span, check_open, check_pass, check_span, n_slots
from localdepth.engine.ggml import lib as ggml
from localdepth.engine.ggml.graph import Chunk, GraphFactory
from localdepth.engine.ggml.handles import Backend, Graph, Scratch, TensorGroup, read, write
from localdepth.engine.ggml.kv import GgmlKv, new_lane, plane_bytes
from localdepth.engine.ggml.weights import load_weights
from localdepth.errors import EngineError
from localdepth.gguf import GgufFile
from localdepth.slots import plane

__all__ = ["GgmlEngine"]

_KV_BUCKET = 256  # attention reads a multiple of this many positions, so that graphs can be kept
_HEAD_ROWS = 32  # logits computed at a time when all rows are wanted


class GgmlSpan:
    """Open positions of one sequence; e and s stay in ggml tensors."""

    def __init__(self, engine: "GgmlEngine", kv: GgmlKv, n: int) -> None:
        self._engine = engine
        self.kv, self.start, self.n, self.r = kv, kv.n, n, 0
        self.lane = kv.lane if n == 1 else new_lane(engine.backend, engine.config, n)
        self.coda_done = False
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

    def chunks(self) -> Iterator[Chunk]:
        """Runs of at most n_batch rows; each attends to a bucket that depends on its own last position only."""
        limits = self._engine.limits
        for offset in range(0, self.n, limits.n_batch):
            n = min(limits.n_batch, self.n - offset)
            end = self.start + offset + n
            yield Chunk(offset, n, min(-(-end // _KV_BUCKET) * _KV_BUCKET, limits.n_ctx))

    def end(self) -> None:
        """Leave the Kv free for the next span."""
        self.kv.busy = False
        if self.n > 1:
            self.lane.close()

    def _read(self, name: str) -> F32:
        return read(self._engine.backend.lib, self.lane[name], (self.n, self._engine.config.n_embd))


class GgmlEngine:
    """Runs a GGUF file on the CPU.

    Args:
        file: an open model file; its weights are copied, it may be closed afterwards.
        limits: machine settings.
    Raises:
        MissingExtra: ggml's libraries are not installed.
        EngineError: they are damaged or of another version, or memory runs out.
    """

    def __init__(self, file: GgufFile, limits: Limits) -> None:
        self.config, self.limits = file.config, limits
        lib = ggml.library()
        self._open: weakref.WeakSet[GgmlKv] = weakref.WeakSet()
        self._closed = False
        self._stack = ExitStack()
        self._finalizer = weakref.finalize(self, self._stack.close)  # an engine nobody closed must not leak
        try:
            self.backend = Backend(lib, limits.n_threads, self._stack)
            _self_test(self.backend)
            self._weights = self._keep(load_weights(self.backend, file))
            self._io = self._keep(self._new_io())
            kv_bytes = 4 if limits.kv_type is KvType.F32 else 2
            self._factory = GraphFactory(lib, self.config, self._weights, self._io, kv_bytes)
            self._scratch = Scratch(self.backend, self._stack)
            self._reserve()
        except BaseException:
            self._finalizer()
            raise
        self._placed: tuple[GgmlSpan, Chunk] | None = None  # whose positions and mask io holds

    def kv_bytes(self, depth: int, n_ctx: int) -> int:
        slots = n_slots(self.config, depth, self.limits.ring)
        return slots * plane_bytes(self.config, self.limits.kv_type, n_ctx)

    def open(self, max_depth: int) -> GgmlKv:
        self._check_alive()
        check_open(self.limits, max_depth)
        kv = GgmlKv(self.backend, self.config, self.limits, max_depth)
        self._open.add(kv)
        return kv

    def prelude(self, work: Sequence[tuple[Kv, Ids]], states: Sequence[F32 | None]) -> list[Span]:
        self._check_alive()
        for (kv, ids), state in zip(work, states, strict=True):
            if cast(GgmlKv, kv).closed:
                raise EngineError("this cache is closed; open another")
            check_span(self.config, self.limits, kv.n, ids, state)
        spans: list[Span] = []
        try:
            for (kv, ids), state in zip(work, states, strict=True):
                spans.append(self._open_span(cast(GgmlKv, kv), ids, state))
        except BaseException:
            self.drop(spans)
            raise
        return spans

    def _open_span(self, kv: GgmlKv, ids: Ids, state: F32 | None) -> GgmlSpan:
        assert not kv.busy, "a Kv carries one open span"
        span = GgmlSpan(self, kv, len(ids))
        kv.busy = True
        try:
            s0 = np.zeros((span.n, self.config.n_embd), np.float32) if state is None else state
            write(self.backend.lib, span.lane["state0"], np.ascontiguousarray(s0, np.float32))
            for chunk in span.chunks():
                tokens = ids[chunk.offset : chunk.offset + chunk.n]
                write(self.backend.lib, self._io["tokens"], np.ascontiguousarray(tokens, np.int32))
                build = partial(self._factory.prelude, chunk, span.lane, kv.tensors("prelude", 0))
                self._run(span, chunk, ("prelude", chunk.n_kv), build)
        except BaseException:
            span.end()
            raise
        return span

    def core(self, spans: Sequence[Span]) -> None:
        self._check_alive()
        for span in cast(Sequence[GgmlSpan], spans):
            check_pass(span.r, span.kv.max_depth)
        for span in cast(Sequence[GgmlSpan], spans):
            index = plane(span.r, self.limits.ring)
            # a kept graph serves every pass that reads and writes the same tensors
            first = span.r == 0 and self.config.injection is Injection.NONE
            for chunk in span.chunks():
                build = partial(self._factory.core, chunk, span.lane, span.kv.tensors("core", index), span.r)
                self._run(span, chunk, ("core", index, span.r % 2, first, chunk.n_kv), build)
            span.r += 1
            span.coda_done, span.last_logits = False, None

    def coda(self, spans: Sequence[Span], rows: Rows = "last") -> list[F32]:
        self._check_alive()
        return [self._logits(span, rows) for span in cast(Sequence[GgmlSpan], spans)]

    def _logits(self, span: GgmlSpan, rows: Rows) -> F32:
        self._coda(span)
        if rows == "all":
            return np.concatenate([self._head(span, offset) for offset in range(0, span.n, _HEAD_ROWS)])
        if span.last_logits is None:
            span.last_logits = self._head(span, span.n - 1)
        return span.last_logits

    def _head(self, span: GgmlSpan, offset: int) -> F32:
        """Logits of a few rows from ``offset`` on."""
        n = min(_HEAD_ROWS, span.n - offset)
        self._compute(span, ("head",), partial(self._factory.head, Chunk(offset, n, 1), span.lane))
        return read(self.backend.lib, self._io["logits"], (n, self.config.n_vocab))

    def _coda(self, span: GgmlSpan) -> None:
        if span.coda_done:
            return
        for chunk in span.chunks():
            build = partial(self._factory.coda, chunk, span.lane, span.kv.tensors("coda", 0), span.r)
            self._run(span, chunk, ("coda", span.r % 2, chunk.n_kv), build)
        span.coda_done = True

    def commit(self, spans: Sequence[Span]) -> None:
        self._check_alive()
        for span in cast(Sequence[GgmlSpan], spans):
            assert span.r > 0, "a position runs at least one pass"
            self._coda(span)
            span.kv.commit(span.n, span.r)
            span.end()

    def drop(self, spans: Sequence[Span]) -> None:
        for span in cast(Sequence[GgmlSpan], spans):
            span.end()

    def close(self) -> None:
        self._closed = True
        for kv in list(self._open):
            kv.close()
        self._finalizer()

    def _check_alive(self) -> None:
        """Native code would run into freed memory."""
        if self._closed:
            raise EngineError("this model is closed; load it again")

    def _run(self, span: GgmlSpan, chunk: Chunk, key: tuple[object, ...], build: Callable[[], Graph]) -> None:
        """Compute a graph that attends: its positions and mask come first."""
        if self._placed != (span, chunk):
            self._place(span, chunk)
        self._compute(span, key, build)

    def _compute(self, span: GgmlSpan, key: tuple[object, ...], build: Callable[[], Graph]) -> None:
        if span.n == 1:
            self.backend.compute(span.kv.graph(key, lambda: self._built(build)))
            return
        graph = self._built(build)
        try:
            self.backend.compute(graph)
        finally:
            graph.close()

    def _built(self, build: Callable[[], Graph]) -> Graph:
        graph = build()
        try:
            if self._scratch.place(graph):
                for kv in self._open:
                    kv.forget_graphs()
        except BaseException:
            graph.close()
            raise
        return graph

    def _place(self, span: GgmlSpan, chunk: Chunk) -> None:
        lib = self.backend.lib
        first = span.start + chunk.offset
        positions = np.arange(first, first + chunk.n)
        write(lib, self._io["positions"], positions.astype(np.int32))
        write(lib, self._io["rows"], positions.astype(np.int64))
        ahead = np.arange(chunk.n_kv) > positions[:, None]
        write(lib, self._io["mask"], np.where(ahead, np.float16(-np.inf), np.float16(0)))
        self._placed = span, chunk

    def _new_io(self) -> TensorGroup:
        n, n_ctx = min(self.limits.n_batch, self.limits.n_ctx), self.limits.n_ctx
        return TensorGroup(
            self.backend,
            {
                "tokens": (ggml.I32, (n,)),
                "positions": (ggml.I32, (n,)),
                "rows": (ggml.I64, (n,)),  # where new keys and values go
                "mask": (ggml.F16, (n_ctx * n,)),
                "logits": (ggml.F32, (self.config.n_vocab, _HEAD_ROWS)),
            },
        )

    def _reserve(self) -> None:
        """Size scratch memory by the largest graph of every kind, on a cache that is never written."""
        n = min(self.limits.n_batch, self.limits.n_ctx)
        with ExitStack() as stack:
            kv = GgmlKv(self.backend, self.config, self.limits, 1)
            stack.callback(kv.close)
            lane = new_lane(self.backend, self.config, max(n, _HEAD_ROWS))
            stack.callback(lane.close)
            kinds: list[Callable[[], Graph]] = []
            for chunk in (Chunk(0, n, self.limits.n_ctx), Chunk(0, 1, self.limits.n_ctx)):
                kinds += [
                    partial(self._factory.prelude, chunk, lane, kv.tensors("prelude", 0)),
                    partial(self._factory.core, chunk, lane, kv.tensors("core", 0), 0),
                    partial(self._factory.coda, chunk, lane, kv.tensors("coda", 0), 0),
                ]
            kinds += [partial(self._factory.head, Chunk(0, rows, 1), lane) for rows in (_HEAD_ROWS, 1)]
            for build in kinds:
                graph = build()
                stack.callback(graph.close)
                self._scratch.reserve(graph)

    def _keep(self, group: TensorGroup) -> TensorGroup:
        self._stack.callback(group.close)
        return group


def _self_test(backend: Backend) -> None:
    """One small product, compared with numpy: catches a library built for another processor or ABI."""
    lib = backend.lib
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 3, 32), np.float32)
    with ExitStack() as stack:
        tensors = TensorGroup(backend, {"a": (ggml.F32, (32, 3)), "b": (ggml.F32, (32, 3)), "out": (ggml.F32, (3, 3))})
        stack.callback(tensors.close)
        write(lib, tensors["a"], a)
        write(lib, tensors["b"], b)
        graph = Graph(lib, 16)
        stack.callback(graph.close)
        product = lib.ggml_mul_mat(graph.context, tensors["a"], tensors["b"])
        lib.ggml_build_forward_expand(graph.handle, lib.ggml_cpy(graph.context, product, tensors["out"]))
        scratch = Scratch(backend, stack)
        scratch.reserve(graph)
        scratch.place(graph)
        backend.compute(graph)
        if not np.allclose(read(lib, tensors["out"], (3, 3)), b @ a.T, atol=1e-4):
            raise EngineError(f"ggml in {lib.folder} computes a product wrongly; reinstall it: {ggml.INSTALL_LINE}")
