"""What goes in and out of the graphs of our engine, by name. A state and embeds are float32 [1,T,E].

    prelude   ids [1,T] -> embeds, injected
    pass      state, injected -> next_state, change: ||s_{r+1} - s_r|| / ||s_{r+1}||, the mean over positions
    coda      state, rows [n] -> logits [n,V] of these rows; negative ones count from the end

``injected`` is what of the embeds enters a pass. It enters every one; where ``injection`` is "none" the first only, and
the caller gives zeros to the others.

All take ``n_total`` int32 [1], the positions up to the last new token. Caches come in as ``past.<stage>.<layer>.key``
and ``.value``, float32 [1, n_head_kv, P, kv_head_dim], and leave as ``present. ...``. P is the number of past
positions; or past and present are bound to one buffer, P is what it holds, ``n_total`` at least, and it is written in
place. Caches of ``planes`` passes, in graphs for others, have these in front: [planes, 1, n_head_kv, P, kv_head_dim].
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from localdepth.config import ModelConfig

__all__ = [
    "IR_VERSION",
    "OPSETS",
    "SIDES",
    "STAGE_GRAPHS",
    "Dim",
    "Port",
    "Ports",
    "cache_names",
    "kv_head_dim",
    "plane_shape",
    "stage_ports",
    "state_shape",
]

IR_VERSION = 10
OPSETS = {"": 21, "com.microsoft": 1}  # operators, by domain
SIDES = ("key", "value")
STAGE_GRAPHS = {"prelude": "prelude", "pass": "core", "coda": "coda"}  # and the stage each holds

Dim = int | str  # a size, or the name of one that is known when the graph runs

_HEAD_MULTIPLE = 8  # GroupQueryAttention refuses heads of other sizes


@dataclass(frozen=True, slots=True)
class Port:
    """An input or an output."""

    dtype: np.dtype[Any]
    shape: tuple[Dim, ...]


@dataclass(frozen=True, slots=True)
class Ports:
    """Inputs and outputs of a graph, by name."""

    inputs: Mapping[str, Port]
    outputs: Mapping[str, Port]


def kv_head_dim(config: ModelConfig) -> int:
    """Width of a head in the caches: head_dim, padded with zeros to what GroupQueryAttention takes."""
    return config.head_dim + -config.head_dim % _HEAD_MULTIPLE


def state_shape(config: ModelConfig) -> tuple[Dim, ...]:
    """Shape of a state, and of embeds."""
    return 1, "n_tokens", config.n_embd


def plane_shape(config: ModelConfig, positions: Dim) -> tuple[Dim, ...]:
    """Shape of one layer's keys, or values, at one pass."""
    return 1, config.n_head_kv, positions, kv_head_dim(config)


def cache_names(prefix: str, n_layer: int) -> Iterator[str]:
    """Names of keys and values in turn, layer by layer: ``<prefix>.<layer>.key`` and ``.value``."""
    return (f"{prefix}.{layer}.{side}" for layer in range(n_layer) for side in SIDES)


def stage_ports(config: ModelConfig, graph: str) -> Ports:
    """What the graph of this name takes and gives."""
    state = Port(np.dtype(np.float32), state_shape(config))
    own: dict[str, tuple[dict[str, Port], dict[str, Port]]] = {
        "prelude": ({"ids": Port(np.dtype(np.int64), (1, "n_tokens"))}, {"embeds": state, "injected": state}),
        "pass": (
            {"state": state, "injected": state},
            {"next_state": state, "change": Port(np.dtype(np.float32), ())},
        ),
        "coda": (
            {"state": state, "rows": Port(np.dtype(np.int64), ("n_rows",))},
            {"logits": Port(np.dtype(np.float32), ("n_rows", config.n_vocab))},
        ),
    }
    inputs, outputs = own[graph]
    stage = STAGE_GRAPHS[graph]
    return Ports(
        {**inputs, "n_total": Port(np.dtype(np.int32), (1,)), **_caches(config, "past", stage)},
        {**outputs, **_caches(config, "present", stage)},
    )


def _caches(config: ModelConfig, way: str, stage: str) -> dict[str, Port]:
    port = Port(np.dtype(np.float32), plane_shape(config, f"n_{way}"))
    return dict.fromkeys(cache_names(f"{way}.{stage}", config.n_layer(stage)), port)
