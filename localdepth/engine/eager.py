"""What a plain engine shares: one cache of numpy planes and the order of the stages, no batching, no tricks.

Subclasses supply the arithmetic of one layer. The latest lookup is written here literally, position by
position, so this file is its definition for the tests of faster engines.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np

from localdepth.config import ModelConfig
from localdepth.engine.base import F32, Ids, Kv, KvType, Limits, Rows, Span, check_open, check_pass, check_span, n_slots
from localdepth.errors import EngineError
from localdepth.memory import MemoryPlan
from localdepth.slots import plane, visible

__all__ = ["Attend", "EagerEngine", "EagerKv", "EagerSpan"]

Planes = tuple[F32, F32]  # keys and values, each [n_ctx, n_head_kv, head_dim]
# new keys and values [n, n_head_kv, head_dim] -> all that the new positions may see, [start + n, ...]
Attend = Callable[[F32, F32], Planes]


class EagerKv:
    """Cache of one sequence: planes by (stage, layer, plane)."""

    def __init__(self, engine: "EagerEngine", max_depth: int) -> None:
        self._engine = engine
        self.max_depth = max_depth
        self.depths: list[int] = []
        self.planes: dict[tuple[str, int, int], Planes] = {}
        # e and s_d of committed positions, from which deeper passes go on
        self.embeds, self.states = np.zeros((2, engine.limits.n_ctx, engine.config.n_embd), np.float32)
        self.span: EagerSpan | None = None

    @property
    def n(self) -> int:
        return len(self.depths)

    def slot(self, stage: str, layer: int, index: int) -> Planes:
        """The plane, made on first use."""
        config, limits = self._engine.config, self._engine.limits
        key = stage, layer, index
        if key not in self.planes:
            shape = limits.n_ctx, config.n_head_kv, config.head_dim
            self.planes[key] = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        return self.planes[key]

    def truncate(self, n: int) -> None:
        del self.depths[n:]

    def allow(self, max_depth: int) -> None:
        check_open(self._engine.limits, max_depth)
        self.max_depth = max(self.max_depth, max_depth)

    def commit(self, span: "EagerSpan") -> None:
        """Let the positions of a span be at the depth it ran."""
        rows = slice(span.start, span.start + span.n)
        self.embeds[rows], self.states[rows] = span.embeds(), span.state()
        self.depths[span.start :] = [span.r] * span.n
        self.span = None

    def fork(self, n: int) -> "EagerKv":
        twin = EagerKv(self._engine, self.max_depth)
        twin.embeds[:n], twin.states[:n] = self.embeds[:n], self.states[:n]
        twin.depths = self.depths[:n]
        twin.planes = {key: (k.copy(), v.copy()) for key, (k, v) in self.planes.items()}
        return twin

    def close(self) -> None:
        self.planes.clear()
        self.depths.clear()


class EagerSpan:
    """Open positions of one sequence."""

    def __init__(self, kv: EagerKv, start: int, embeds: F32, state: F32, r: int = 0) -> None:
        self.kv = kv
        self.start, self.n, self.r = start, len(embeds), r
        self._embeds = embeds
        self._states = state, state  # s_{r-1}, s_r
        self.coda: F32 | None = None  # the coda's output at r
        self.last_logits: F32 | None = None  # at r

    @property
    def change(self) -> float:
        if self.r == 0:
            return float("inf")
        before, now = self._states
        norms = np.linalg.norm(now, axis=-1)
        return float(np.mean(np.linalg.norm(now - before, axis=-1) / np.maximum(norms, np.finfo(np.float32).tiny)))

    def state(self) -> F32:
        return self._states[1].copy()

    def embeds(self) -> F32:
        return self._embeds.copy()

    def advance(self, state: F32) -> None:
        """Enter pass r + 1 with its state."""
        self._states = self._states[1], state
        self.r += 1
        self.coda = self.last_logits = None


class EagerEngine(ABC):
    """Implements the seam over four pieces of arithmetic."""

    def __init__(self, config: ModelConfig, limits: Limits) -> None:
        self.config, self.limits = config, limits
        self._closed = False

    @abstractmethod
    def embed(self, ids: Ids) -> F32:
        """Token vectors, [n, n_embd]."""

    @abstractmethod
    def block(self, stage: str, layer: int, x: F32, start: int, attend: Attend) -> F32:
        """One layer on x [n, n_embd] at positions ``start ..``."""

    @abstractmethod
    def inject(self, s: F32, e: F32, r: int) -> F32:
        """What pass r feeds its first core layer."""

    @abstractmethod
    def enter_coda(self, s: F32) -> F32:
        """What the coda starts from."""

    @abstractmethod
    def head(self, x: F32) -> F32:
        """Logits, [n, n_vocab]."""

    def kv_bytes(self, depth: int, n_ctx: int) -> int:
        return n_slots(self.config, depth, self.limits.ring) * 2 * self.config.n_embd_kv * n_ctx * 4

    def plan(self, depth: int) -> MemoryPlan:
        limits, row_bytes = self.limits, 4 * self.config.n_embd * self.limits.n_ctx
        return MemoryPlan(
            depth=depth,
            n_ctx=limits.n_ctx,
            ring=limits.ring,
            kv_type=str(limits.kv_type),
            mapped=0,
            packed={"float32": 4 * self.config.n_params},
            kv=self.kv_bytes(depth, limits.n_ctx),
            states=2 * row_bytes,
            rows=3 * row_bytes,
            scratch=4 * limits.n_ctx * (limits.n_ctx * self.config.n_head + 2 * self.config.n_ff),
        )

    def open(self, max_depth: int) -> EagerKv:
        self._check_alive()
        check_open(self.limits, max_depth)
        return EagerKv(self, max_depth)

    def prelude(self, work: Sequence[tuple[Kv, Ids]], states: Sequence[F32 | None]) -> list[Span]:
        self._check_alive()
        for (kv, ids), state in zip(work, states, strict=True):
            check_span(self.config, self.limits, kv.n, ids, state)
        return [self._open_span(cast(EagerKv, kv), ids, state) for (kv, ids), state in zip(work, states, strict=True)]

    def _open_span(self, kv: EagerKv, ids: Ids, state: F32 | None) -> Span:
        assert kv.span is None, "a Kv carries one open span"
        e = self._stage("prelude", self.embed(ids), kv, kv.n)
        kv.span = EagerSpan(kv, kv.n, e, np.zeros_like(e) if state is None else np.asarray(state, np.float32))
        return kv.span

    def reopen(self, kvs: Sequence[Kv]) -> list[Span]:
        self._check_alive()
        return [self._reopen_span(cast(EagerKv, kv)) for kv in kvs]

    def _reopen_span(self, kv: EagerKv) -> Span:
        assert kv.span is None, "a Kv carries one open span"
        assert len(set(kv.depths)) == 1, "all positions ran the same depth"
        kv.span = EagerSpan(kv, 0, kv.embeds[: kv.n].copy(), kv.states[: kv.n].copy(), kv.depths[0])
        return kv.span

    def core(self, spans: Sequence[Span], n: int = 1) -> None:
        for span in cast(Sequence[EagerSpan], spans):
            check_pass(span.r + n - 1, span.kv.max_depth)
        for span in cast(Sequence[EagerSpan], spans):
            for _ in range(n):
                x = self.inject(span.state(), span.embeds(), span.r)
                span.advance(self._stage("core", x, span.kv, span.start, span.r))

    def coda(self, spans: Sequence[Span], rows: Rows = "last") -> list[F32]:
        return [self._logits(span, rows) for span in cast(Sequence[EagerSpan], spans)]

    def _logits(self, span: EagerSpan, rows: Rows) -> F32:
        out = self._coda(span)
        if rows == "all":
            return self.head(out)
        if span.last_logits is None:
            span.last_logits = self.head(out[-1:])
        return span.last_logits

    def _coda(self, span: EagerSpan) -> F32:
        if span.coda is None:
            span.coda = self._stage("coda", self.enter_coda(span.state()), span.kv, span.start)
        return span.coda

    def commit(self, spans: Sequence[Span]) -> None:
        for span in cast(Sequence[EagerSpan], spans):
            assert span.r > 0, "a position runs at least one pass"
            self._coda(span)
            span.kv.commit(span)

    def drop(self, spans: Sequence[Span]) -> None:
        for span in cast(Sequence[EagerSpan], spans):
            span.kv.span = None
            span.kv.truncate(span.start)

    def close(self) -> None:
        self._closed = True

    def _check_alive(self) -> None:
        if self._closed:
            raise EngineError("this model is closed; load it again")

    def _stage(self, stage: str, x: F32, kv: EagerKv, start: int, r: int = 0) -> F32:
        for layer in range(self.config.n_layer(stage)):
            x = self.block(stage, layer, x, start, self._attend(stage, layer, kv, start, r))
        return x

    def _attend(self, stage: str, layer: int, kv: EagerKv, start: int, r: int) -> Attend:
        """Writes at this pass's plane, reads each older position at the plane it is visible through."""
        ring = self.limits.ring
        half = self.limits.kv_type is KvType.F16

        def attend(keys: F32, values: F32) -> Planes:
            end = start + len(keys)
            write = plane(r, ring) if stage == "core" else 0
            read = [visible(r, depth, ring) for depth in kv.depths[:start]] if stage == "core" else [0] * start
            own = kv.slot(stage, layer, write)
            for store, new in zip(own, (keys, values), strict=True):
                store[start:end] = new.astype(np.float16) if half else new
            planes = {index: kv.slot(stage, layer, index) for index in {*read, write}}
            both = []
            for side in (0, 1):
                seen = own[side][:end].copy()
                for index in set(read) - {write}:
                    chosen = [p for p in range(start) if read[p] == index]
                    seen[chosen] = planes[index][side][chosen]
                both.append(seen)
            return both[0], both[1]

        return attend
