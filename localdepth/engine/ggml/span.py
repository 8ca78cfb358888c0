"""Open positions of one sequence: their working rows, and how they fall into chunks."""

from collections.abc import Callable, Iterator

import numpy as np

from localdepth.config import ModelConfig
from localdepth.engine.base import F32, Ids, Limits, Rows
from localdepth.engine.ggml.device import Device
from localdepth.engine.ggml.graph import Begins, Chunk
from localdepth.engine.ggml.kv import GgmlKv, new_lane

__all__ = ["GgmlSpan"]

_KV_BUCKET = 256  # attention reads a multiple of this many positions, so that graphs can be kept


class GgmlSpan:
    """Open positions of one sequence; e and s stay in ggml tensors.

    Attributes:
        r: passes that were asked for.
        done: passes that were computed.
        begins: what must be computed before the next pass.
        ids: tokens [n], of a new span.
        coda_rows: which rows the coda gave at r.
        last_logits: at r, [1, n_vocab].
    """

    def __init__(
        self,
        kv: GgmlKv,
        device: Device,
        config: ModelConfig,
        limits: Limits,
        start: int,
        n: int,
        look: Callable[["GgmlSpan"], None],
    ) -> None:
        self._shape, self._look = (n, config.n_embd), look
        self.kv, self.start, self.n, self.r = kv, start, n, 0
        self.done = 0
        self.begins: Begins | None = None
        self.ids: Ids = np.empty(0, np.int32)
        self.lane = kv.lane if n == 1 else new_lane(device, config, n)
        self.chunks = tuple(_chunks(limits, start, n))
        self.coda_rows: Rows | None = None
        self.last_logits: F32 | None = None

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
        """Rows of the lane, [n, n_embd], computed as far as was asked."""
        self._look(self)
        return self.lane.read(name, self._shape)


def _chunks(limits: Limits, start: int, n: int) -> Iterator[Chunk]:
    """Runs of at most n_batch rows; each attends to a bucket that depends on its own last position only."""
    for offset in range(0, n, limits.n_batch):
        rows = min(limits.n_batch, n - offset)
        end = start + offset + rows
        yield Chunk(offset, rows, min(-(-end // _KV_BUCKET) * _KV_BUCKET, limits.n_ctx))
