"""Memory that graphs are bound to: caches, and the working rows of tokens."""

from collections.abc import Hashable, Iterable
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localdepth.config import ModelConfig
from localdepth.engine.base import F32
from localdepth.engine.pages import lazy_zeros
from localdepth.onnx_folder.ports import SIDES, kv_head_dim

__all__ = ["KEPT_ROWS", "Buffer", "Lane", "new_planes", "plane_bytes"]


KEPT_ROWS = 3  # of each committed position, from which deeper passes go on: e, s_d and what is injected


class Buffer:
    """An array, and the same memory as ONNX Runtime knows it."""

    def __init__(self, array: NDArray[Any]) -> None:
        assert array.flags.c_contiguous, "a view must be one stretch"
        self.array = array

    @cached_property
    def value(self) -> Any:
        """An ``OrtValue`` that shares the memory."""
        from onnxruntime import OrtValue

        return OrtValue.ortvalue_from_numpy(self.array)


def plane_bytes(config: ModelConfig, n_ctx: int) -> int:
    """Bytes of one layer's keys and values at one pass."""
    return len(SIDES) * 4 * n_ctx * config.n_head_kv * kv_head_dim(config)


def new_planes(config: ModelConfig, stage: str, n_ctx: int) -> list[Buffer]:
    """Keys and values of a stage's layers in turn, each [1, n_head_kv, n_ctx, kv_head_dim]; pages come when written."""
    shape = len(SIDES) * config.n_layer(stage), 1, config.n_head_kv, n_ctx, kv_head_dim(config)
    return [Buffer(plane) for plane in lazy_zeros(shape, np.float32)]


class Lane:
    """Working rows of n tokens that are computed together, [1, n, n_embd] each.

    Attributes:
        embeds, injected, states: e, its injected form, s_r and s_{r+1} taking turns.
        n_total: positions up to the last of the tokens.
        change: of the last pass.
        bound: graphs bound to these rows.
    """

    def __init__(self, config: ModelConfig, n: int) -> None:
        rows = np.zeros((4, n, config.n_embd), np.float32)
        self.n, self._n_vocab = n, config.n_vocab
        self.embeds, self.injected, *self.states = (Buffer(row[None]) for row in rows)
        self.ids = Buffer(np.zeros((1, n), np.int64))
        self.n_total = Buffer(np.zeros(1, np.int32))
        self.change = Buffer(np.zeros((), np.float32))
        self.bound: dict[Hashable, Any] = {}

    def kept(self, r: int) -> tuple[F32, ...]:
        """What a cache keeps of these tokens after r passes: ``KEPT_ROWS`` views [n, n_embd]."""
        return tuple(buffer.array[0] for buffer in (self.embeds, self.states[r % 2], self.injected))

    def inputs(self, graph: str, r: int, rows: Iterable[int] = ()) -> dict[str, Buffer]:
        """What a graph takes after r passes, besides caches; ``rows`` are those the coda decodes."""
        state = {"state": self.states[r % 2]}
        own = {
            "prelude": {"ids": self.ids},
            "pass": {**state, "injected": self.injected},
            "coda": {**state, "rows": Buffer(np.array([*rows], np.int64))},
        }
        return {**own[graph], "n_total": self.n_total}

    def outputs(self, graph: str, r: int, n_rows: int = 0) -> dict[str, Buffer]:
        """What it gives."""
        if graph == "prelude":
            return {"embeds": self.embeds, "injected": self.injected}
        if graph == "pass":
            return {"next_state": self.states[(r + 1) % 2], "change": self.change}
        return {"logits": Buffer(np.empty((n_rows, self._n_vocab), np.float32))}
