"""K/V planes of one sequence, and the working rows of its single tokens.

A stopped position's keys and values are copied forward (see ``commit``), so a plane always holds, for each committed
position, what the *latest* lookup of ``slots.visible`` finds there.
"""

from collections.abc import Callable, Sequence
from weakref import WeakSet

import numpy as np

from localdepth.config import STAGES, ModelConfig
from localdepth.engine.base import F32, Limits, check_open
from localdepth.engine.onnx.buffers import KEPT_ROWS, Buffer, Lane, new_planes
from localdepth.engine.pages import lazy_zeros
from localdepth.slots import n_planes

__all__ = ["OnnxKv"]

Admit = Callable[[int, "OnnxKv | None"], None]


class OnnxKv:
    """Cache of one sequence; planes of the core are made pass by pass on first use.

    Args:
        max_depth: passes its positions may run.
        admit: refuses a depth that there is no room for; called with it and the cache it is for, None for a new one.
        family: open caches of the same engine, which it joins.
    """

    def __init__(
        self, config: ModelConfig, limits: Limits, max_depth: int, admit: Admit, family: "WeakSet[OnnxKv]"
    ) -> None:
        admit(max_depth, None)
        family.add(self)
        self._family = family
        self._config, self._limits, self._admit = config, limits, admit
        self.max_depth = max_depth
        self.depths: list[int] = []
        self._kept: F32 = lazy_zeros((KEPT_ROWS, limits.n_ctx, config.n_embd), np.float32)
        self.lane = Lane(config, 1)  # of one-token spans; graphs bound to it are kept
        self._planes: dict[str, list[list[Buffer]]] = {stage: [] for stage in STAGES}  # by plane in the core, else one
        self.busy = False  # a span is open
        self.closed = False

    @property
    def n(self) -> int:
        return len(self.depths)

    def planes(self, stage: str, index: int) -> list[Buffer]:
        """Keys and values of a stage's layers in turn, made on first use."""
        made = self._planes[stage]
        while len(made) <= index:
            planes = new_planes(self._config, stage, self._limits.n_ctx)
            if made and self.n:  # every committed position stopped before this plane existed
                _copy_rows(made[-1], planes, slice(self.n))
            made.append(planes)
        return made[index]

    def allow(self, max_depth: int) -> None:
        check_open(self._limits, max_depth)
        if max_depth > self.max_depth:
            self._admit(max_depth, self)
            self.max_depth = max_depth

    def commit(self, lanes: Sequence[tuple[int, Lane]], depth: int) -> None:
        """Let the tokens of lanes, each with where it begins, be at ``depth``: the last positions from now on.

        They are visible from deeper passes through their last plane.
        """
        core, last = self._planes["core"], n_planes(depth, self._limits.ring)
        del self.depths[lanes[0][0] :]
        for first, lane in lanes:
            rows = slice(first, first + lane.n)
            for deeper in core[last:]:
                _copy_rows(core[last - 1], deeper, rows)
            for store, new in zip(self._kept, lane.kept(depth), strict=True):
                store[rows] = new
            self.depths += [depth] * lane.n

    def restore(self, lanes: Sequence[tuple[int, Lane]], depth: int) -> None:
        """Put back what ``commit`` kept of these tokens."""
        for first, lane in lanes:
            for store, old in zip(self._kept, lane.kept(depth), strict=True):
                old[:] = store[first : first + lane.n]

    def truncate(self, n: int) -> None:
        assert not self.busy, "a span is open"
        del self.depths[n:]

    def fork(self, n: int) -> "OnnxKv":
        twin = OnnxKv(self._config, self._limits, self.max_depth, self._admit, self._family)
        for stage, made in self._planes.items():
            for index, planes in enumerate(made):
                _copy_rows(planes, twin.planes(stage, index), slice(n))
        twin.depths = self.depths[:n]
        twin._kept[:, :n] = self._kept[:, :n]
        return twin

    def close(self) -> None:
        self.closed = True
        self._family.discard(self)
        self.lane.bound.clear()
        for made in self._planes.values():
            made.clear()
        self._kept = np.empty((KEPT_ROWS, 0, self._config.n_embd), np.float32)
        self.depths.clear()


def _copy_rows(source: Sequence[Buffer], target: Sequence[Buffer], rows: slice) -> None:
    """Copy keys and values of some positions from one plane to another."""
    for old, new in zip(source, target, strict=True):
        new.array[:, :, rows] = old.array[:, :, rows]
