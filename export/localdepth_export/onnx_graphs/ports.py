"""What goes in and out of our graphs, by name.

``n_total`` int32 [1] counts the positions up to the last new token. Caches come in as ``past.<stage>.<layer>.key`` and
``.value``, float32 [1, n_head_kv, P, kv_head_dim], and leave as ``present. ...``. P is the number of past positions;
or past and present are bound to one buffer, P is what it holds, ``n_total`` at least, and it is written in place.
Caches of ``planes`` passes have these in front: [planes, 1, n_head_kv, P, kv_head_dim].
"""

from collections.abc import Sequence

import numpy as np

from localdepth.config import ModelConfig
from localdepth_export.onnx_graphs.builder import INT64, Builder, Dim, Value
from localdepth_export.onnx_graphs.layers import Cache, Place, kv_head_dim

__all__ = ["SIDES", "declare_past", "declare_place", "declare_planes", "plane_shape", "state_shape"]

SIDES = ("key", "value")


def state_shape(config: ModelConfig) -> tuple[Dim, ...]:
    """Shape of a state, and of embeds."""
    return 1, "n_tokens", config.n_embd


def plane_shape(config: ModelConfig, positions: Dim) -> tuple[Dim, ...]:
    """Shape of one layer's keys, or values, at one pass."""
    return 1, config.n_head_kv, positions, kv_head_dim(config)


def declare_place(scope: Builder, tokens: Value) -> Place:
    """Where ``tokens`` [1,T,...] stand, from the input ``n_total``."""
    total = scope.input("n_total", np.int32, [1])
    n_new = scope.op("Shape", tokens, start=1, end=2)
    first = scope.op("Sub", scope.op("Cast", total, to=INT64), n_new)
    return Place(positions=first, total=total, last=scope.op("Sub", total, scope.constant(1, np.int32)))


def declare_past(scope: Builder, config: ModelConfig, stage: str, planes: Sequence[Dim] = ()) -> list[Cache]:
    """The caches of a stage, as inputs."""
    shape = *planes, *plane_shape(config, "n_past")
    return [
        Cache(*(scope.input(f"past.{stage}.{layer}.{side}", np.float32, shape) for side in SIDES))
        for layer in range(config.n_layer(stage))
    ]


def declare_planes(scope: Builder, prefix: str, caches: Sequence[Cache], shape: Sequence[Dim]) -> None:
    """Keys and values of a stage's layers, as outputs ``<prefix>.<layer>.key`` and ``.value``."""
    for layer, cache in enumerate(caches):
        for side, value in zip(SIDES, cache, strict=True):
            scope.output(f"{prefix}.{layer}.{side}", value, np.float32, shape)
