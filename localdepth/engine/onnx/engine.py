"""The ONNX Runtime engine: three graphs, run pass by pass over memory of ours.

A span longer than ``n_batch`` is computed lane by lane inside each pass (pass-major), which is what defines prefill
where passes share planes in a ring. Graphs are bound once for each pass of single tokens, where only a few numbers
change from one to the next; those of prompts are bound and let go.
"""

import logging
import weakref
from collections.abc import Iterable, Sequence
from typing import cast

import numpy as np

from localdepth.config import Injection
from localdepth.engine.base import F32, Ids, Kv, Limits, Rows, Span, check_open, check_pass, check_span, n_slots
from localdepth.engine.onnx.buffers import Buffer, Lane, new_planes, plane_bytes
from localdepth.engine.onnx.kv import OnnxKv
from localdepth.engine.onnx.plan import Planner, packs
from localdepth.engine.onnx.session import Bound, Session, writes_in_place
from localdepth.engine.onnx.span import OnnxSpan
from localdepth.engine.opening import check_free, open_all
from localdepth.engine.room import check_room, free_bytes
from localdepth.errors import EngineError
from localdepth.memory import MemoryPlan, check_fits
from localdepth.onnx_folder.folder import OnnxFolder
from localdepth.onnx_folder.ports import STAGE_GRAPHS
from localdepth.slots import plane

__all__ = ["OnnxEngine"]

log = logging.getLogger(__name__)


class OnnxEngine:
    """Runs a folder of ONNX graphs on the CPU.

    Args:
        folder: an open folder; it may be closed afterwards.
        limits: machine settings; ``kv_type`` must be float32, which is what the graphs compute in.
        in_place: let caches be written where they are; None tries whether that works here.
    Raises:
        ConfigError: another type of cache.
        MissingExtra: ONNX Runtime is not installed.
        EngineError: it cannot run the graphs.
        OutOfMemory: the model does not fit; what would is said.
    """

    def __init__(self, folder: OnnxFolder, limits: Limits, in_place: bool | None = None) -> None:
        self.config, self.limits = folder.config, limits
        self._planner = Planner(folder, limits)
        self._open: weakref.WeakSet[OnnxKv] = weakref.WeakSet()
        self._check_loadable()
        packed = packs(folder, limits)
        self._sessions = {name: Session(folder, name, limits.n_threads, packs=packed) for name in STAGE_GRAPHS}
        if in_place is None:
            in_place = writes_in_place(self._sessions["pass"], self.config)
        self._apart: dict[str, list[Buffer]] = {}  # where new keys and values come out, by stage
        if not in_place:
            log.warning("ONNX Runtime does not write caches in place here; they are copied, which takes longer")
            self._apart = {stage: new_planes(self.config, stage, limits.n_ctx) for stage in STAGE_GRAPHS.values()}

    def plan(self, depth: int) -> MemoryPlan:
        return self._planner.plan(depth)

    def kv_bytes(self, depth: int, n_ctx: int) -> int:
        return n_slots(self.config, depth, self.limits.ring) * plane_bytes(self.config, n_ctx)

    def open(self, max_depth: int) -> OnnxKv:
        self._check_alive()
        check_open(self.limits, max_depth)
        return OnnxKv(self.config, self.limits, max_depth, self._admit, self._open)

    def prelude(self, work: Sequence[tuple[Kv, Ids]], states: Sequence[F32 | None]) -> list[Span]:
        self._check_alive()
        for (kv, ids), state in zip(work, states, strict=True):
            check_free(cast(OnnxKv, kv))
            check_span(self.config, self.limits, kv.n, ids, state)
        pairs = zip(work, states, strict=True)
        return open_all((self._new_span(cast(OnnxKv, kv), ids, state) for (kv, ids), state in pairs), self.drop)

    def reopen(self, kvs: Sequence[Kv]) -> list[Span]:
        self._check_alive()
        for kv in kvs:
            check_free(cast(OnnxKv, kv))
            assert len(set(kv.depths)) == 1, "all positions ran the same depth"
        return open_all((self._old_span(cast(OnnxKv, kv)) for kv in kvs), self.drop)

    def core(self, spans: Sequence[Span], n: int = 1) -> None:
        self._check_alive()
        for span in cast(Sequence[OnnxSpan], spans):
            check_pass(span.r + n - 1, span.kv.max_depth)
        for span in cast(Sequence[OnnxSpan], spans):
            for _ in range(n):
                self._pass(span)

    def coda(self, spans: Sequence[Span], rows: Rows = "last") -> list[F32]:
        self._check_alive()
        return [self._logits(span, rows) for span in cast(Sequence[OnnxSpan], spans)]

    def commit(self, spans: Sequence[Span]) -> None:
        self._check_alive()
        for span in cast(Sequence[OnnxSpan], spans):
            assert span.r > 0, "a position runs at least one pass"
            if not span.coda_ran:
                self._coda(span, None)
            span.kv.commit(span.lanes, span.r)
            span.kv.busy = False

    def drop(self, spans: Sequence[Span]) -> None:
        for span in cast(Sequence[OnnxSpan], spans):
            span.kv.busy = False
            if not span.kv.closed:
                span.kv.truncate(span.start)

    def close(self) -> None:
        for kv in list(self._open):
            kv.close()
        self._sessions.clear()
        self._apart.clear()

    def _check_alive(self) -> None:
        if not self._sessions:
            raise EngineError("this model is closed; load it again")

    def _new_span(self, kv: OnnxKv, ids: Ids, state: F32 | None) -> OnnxSpan:
        span = OnnxSpan(kv, self.config, self.limits, kv.n, len(ids))
        for first, lane in span.lanes:
            rows = slice(first - span.start, first - span.start + lane.n)
            lane.ids.array[0] = ids[rows]
            lane.states[0].array[0] = 0 if state is None else state[rows]
            self._run(span, first, lane, "prelude", 0)
        return span

    def _old_span(self, kv: OnnxKv) -> OnnxSpan:
        span = OnnxSpan(kv, self.config, self.limits, 0, kv.n)
        span.r = kv.depths[0]
        kv.restore(span.lanes, span.r)
        return span

    def _pass(self, span: OnnxSpan) -> None:
        for first, lane in span.lanes:
            self._run(span, first, lane, "pass", plane(span.r, self.limits.ring))
        if span.r == 0 and self.config.injection is Injection.NONE:
            for _, lane in span.lanes:
                lane.injected.array[:] = 0  # it entered once
        span.advance()

    def _logits(self, span: OnnxSpan, rows: Rows) -> F32:
        if rows == "last" and span.last_logits is not None:
            return span.last_logits
        logits = self._coda(span, rows)
        if span.last_logits is None:
            span.last_logits = logits[-1:].copy()
        return span.last_logits if len(logits) == 1 else logits

    def _coda(self, span: OnnxSpan, rows: Rows | None) -> F32:
        """Run the coda for the logits of some rows, or of none."""
        logits = []
        for first, lane in span.lanes:
            is_last = lane is span.lanes[-1][1]
            wanted = range(lane.n if rows == "all" else 0)
            if rows == "last" and is_last:
                wanted = range(lane.n - 1, lane.n)
            logits.append(self._run(span, first, lane, "coda", 0, wanted).outputs["logits"].array)
        span.coda_ran = True
        return np.concatenate(logits)

    def _run(self, span: OnnxSpan, first: int, lane: Lane, graph: str, index: int, rows: Iterable[int] = ()) -> Bound:
        """Run a graph for the tokens of a lane, which begin at position ``first``, over the planes ``index``."""
        key = graph, index, span.r % 2, rows
        bound = lane.bound.get(key)
        if bound is None:
            stage = STAGE_GRAPHS[graph]
            bound = self._sessions[graph].bind(
                lane.inputs(graph, span.r, rows),
                lane.outputs(graph, span.r, len(list(rows))),
                span.kv.planes(stage, index),
                self._apart.get(stage),
            )
            if span.n == 1:
                lane.bound[key] = bound
        bound.run(first, lane.n)
        return bound

    def _check_loadable(self) -> None:
        """Refuse a model whose weights do not fit beside a sequence of the default depth."""
        depth = min(self.config.default_depth, self.limits.kv_depth)
        plan = self.plan(depth)
        check_fits(plan, free_bytes(self.limits, plan.total), self._planner.smaller(depth, loading=True))

    def _admit(self, depth: int, kv: OnnxKv | None) -> None:
        """Refuse a cache of this depth, or one that grows to it, where there is no room."""
        others = [other for other in self._open if other is not kv]
        plan = self.plan(depth)
        loaded = sum(plan.packed.values()) + plan.scratch
        check_room(self.limits, self.plan, depth, kv, others, loaded, self._planner.smaller(depth, loading=False))
