"""Declares what goes in and out of graphs, under the names of ``localdepth.onnx_folder.ports``."""

from collections.abc import Sequence
from itertools import chain

import numpy as np

from localdepth.config import ModelConfig
from localdepth.onnx_folder.ports import Dim, cache_names, plane_shape
from localdepth_export.onnx_graphs.builder import INT64, Builder, Value
from localdepth_export.onnx_graphs.layers import Cache, Place

__all__ = ["declare_past", "declare_place", "declare_planes"]


def declare_place(scope: Builder, tokens: Value) -> Place:
    """Where ``tokens`` [1,T,...] stand, from the input ``n_total``."""
    total = scope.input("n_total", np.int32, [1])
    n_new = scope.op("Shape", tokens, start=1, end=2)
    first = scope.op("Sub", scope.op("Cast", total, to=INT64), n_new)
    return Place(positions=first, total=total, last=scope.op("Sub", total, scope.constant(1, np.int32)))


def declare_past(scope: Builder, config: ModelConfig, stage: str, planes: Sequence[Dim] = ()) -> list[Cache]:
    """The caches of a stage, as inputs."""
    shape = *planes, *plane_shape(config, "n_past")
    sides = [scope.input(name, np.float32, shape) for name in cache_names(f"past.{stage}", config.n_layer(stage))]
    return [Cache(*pair) for pair in zip(sides[::2], sides[1::2], strict=True)]


def declare_planes(scope: Builder, prefix: str, caches: Sequence[Cache], shape: Sequence[Dim]) -> None:
    """Keys and values of a stage's layers, as outputs ``<prefix>.<layer>.key`` and ``.value``."""
    for name, value in zip(cache_names(prefix, len(caches)), chain(*caches), strict=True):
        scope.output(name, value, np.float32, shape)
