"""How much memory a folder takes under these limits; nothing is allocated to find out."""

import math
from collections.abc import Iterator

from localdepth.engine.base import KvType, Limits, n_slots
from localdepth.engine.onnx.buffers import KEPT_ROWS, plane_bytes
from localdepth.engine.room import smaller
from localdepth.errors import ConfigError
from localdepth.memory import MemoryPlan
from localdepth.onnx_folder.folder import OnnxFolder
from localdepth.onnx_folder.layout import scales_of

__all__ = ["Planner", "packs"]

_LANE_ROWS = 4  # e, its injected form and two states
_GRAPHS = 12_000_000  # bytes that three loaded graphs take besides; measured


def packs(folder: OnnxFolder, limits: Limits) -> bool:
    """Whether weights are copied into layouts that compute faster. Blocks always are: unpacked ones take ten times
    longer, and what they were packed from need not stay in memory.
    """
    return not limits.low_memory or any(map(folder.layout.is_blocks, folder.layout.bits))


class Planner:
    """Plans for one folder; it may be closed afterwards.

    Raises:
        ConfigError: a type of cache that is not float32.
    """

    def __init__(self, folder: OnnxFolder, limits: Limits) -> None:
        if limits.kv_type is not KvType.F32:
            raise ConfigError(f"kv_type={limits.kv_type}: ONNX Runtime keeps K/V in float32; pass f32 or leave it out")
        self._config, self._limits = folder.config, limits
        copies = dict(_copies(folder, packs(folder, limits)))
        self._packed = {"packed": sum(copies.values())} if copies else {}
        self._mapped = sum(piece.n_bytes for name, piece in folder.layout.items() if name not in copies)

    def plan(self, depth: int, limits: Limits | None = None) -> MemoryPlan:
        """Bytes for a sequence at ``depth`` that fills its context.

        Args:
            limits: others than those the planner was made for.
        """
        config, limits = self._config, limits or self._limits
        n_rows, row_bytes = min(limits.n_batch, limits.n_ctx), 4 * config.n_embd
        # One layer's values that live together; attention computes in tiles, whatever the context.
        scratch = 4 * n_rows * (4 * config.n_embd + 3 * config.n_ff + 4 * config.n_head * config.head_dim)
        return MemoryPlan(
            depth=depth,
            n_ctx=limits.n_ctx,
            ring=limits.ring,
            kv_type=str(limits.kv_type),
            mapped=self._mapped,
            packed=self._packed,
            kv=n_slots(config, depth, limits.ring) * plane_bytes(config, limits.n_ctx),
            states=KEPT_ROWS * limits.n_ctx * row_bytes,
            rows=_LANE_ROWS * limits.n_ctx * row_bytes + 4 * config.n_vocab,
            scratch=scratch + _GRAPHS,
        )

    def smaller(self, depth: int, *, loading: bool) -> Iterator[Iterator[tuple[str, MemoryPlan]]]:
        """Ways to need less than ``plan(depth)``, each with its settings, gentlest first."""
        return smaller(self._limits, depth, self.plan, self.plan, loading=loading)


def _copies(folder: OnnxFolder, packed: bool) -> Iterator[tuple[str, int]]:
    """What the copies take that replace pieces of the weights file, by name."""
    config, layout = folder.config, folder.layout
    for name, shape in config.tensors().items():
        is_multiplied = len(shape) == 2 and (name != "token_embd.weight" or config.tied_head)
        if not is_multiplied:
            continue
        if layout.is_blocks(name):
            yield name, layout[name].n_bytes
            yield scales_of(name), 2 * layout[scales_of(name)].n_bytes  # and the sum of each block
        elif packed or layout.bits[name] == 16:  # which is widened
            yield name, 4 * math.prod(shape)
