"""Open positions of one sequence: their working rows, and how they fall into lanes."""

import numpy as np

from localdepth.config import ModelConfig
from localdepth.engine.base import F32, Limits
from localdepth.engine.onnx.buffers import Lane
from localdepth.engine.onnx.kv import OnnxKv

__all__ = ["OnnxSpan"]


class OnnxSpan:
    """Positions ``start .. start + n - 1`` after r passes.

    Attributes:
        lanes: tokens that are computed together, ``n_batch`` at most, each lane with where it begins.
        change: of the last pass.
        coda_ran: at r, so that the coda's caches are right.
        last_logits: at r, [1, n_vocab].
    """

    def __init__(self, kv: OnnxKv, config: ModelConfig, limits: Limits, start: int, n: int) -> None:
        self.kv, self.start, self.n, self.r = kv, start, n, 0
        self.lanes = [(start, kv.lane)] if n == 1 else _lanes(config, limits, start, n)
        for first, lane in self.lanes:
            lane.n_total.array[:] = first + lane.n
        self.change = float("inf")
        self.coda_ran = False
        self.last_logits: F32 | None = None

    def advance(self) -> None:
        """Enter pass r + 1: all lanes have run."""
        self.r += 1
        self.change = sum(float(lane.change.array) * lane.n for _, lane in self.lanes) / self.n
        self.coda_ran, self.last_logits = False, None

    def state(self) -> F32:
        return np.concatenate([lane.states[self.r % 2].array[0] for _, lane in self.lanes])

    def embeds(self) -> F32:
        return np.concatenate([lane.embeds.array[0] for _, lane in self.lanes])


def _lanes(config: ModelConfig, limits: Limits, start: int, n: int) -> list[tuple[int, Lane]]:
    firsts = range(0, n, limits.n_batch)
    return [(start + first, Lane(config, min(limits.n_batch, n - first))) for first in firsts]
