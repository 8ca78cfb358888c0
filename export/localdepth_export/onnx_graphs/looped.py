"""Whole models in one graph that holds the core once; how often it runs is known when the graph runs.

    looped        ids -> logits [n,V]; as many passes as the caches of the core have planes
    looped_exit   ids, threshold, max_passes -> logits [n,V], n_passes [1], and of the core only the new keys and values

``looped`` is a ``Scan`` over the planes: where past and present are bound to one buffer, ONNX Runtime hands its body
views of it and nothing is copied. ``looped_exit`` is a ``Loop``, which copies the planes it reads: it ends after
``max_passes``, or after the first pass whose change is not above ``threshold``. Its caller keeps the planes,
``max_passes`` of them at least. They put ``new.core.<layer>.key`` and ``.value``, [n_passes, 1, n_head_kv, T,
kv_head_dim], in their places, and the last of the new planes in those that were not reached, where later tokens that
run more passes look for it.

``looped`` may also travel alone, its weights and tokenizer inside: see ``single_file``, which lists the properties.

Both want the ``state`` s_0, [1,T,E], or [1,1,E] for all positions (zeros are the rule), and the ``rows`` to decode (-1
is the last). For the rest see ``localdepth.onnx_folder.ports``.
"""

from collections.abc import Sequence
from itertools import chain

import numpy as np

from localdepth.config import Injection, ModelConfig
from localdepth.onnx_folder.layout import Layout
from localdepth.onnx_folder.ports import SIDES, plane_shape, state_shape
from localdepth_export.onnx_graphs.builder import Builder, Value
from localdepth_export.onnx_graphs.layers import Cache, Layers
from localdepth_export.onnx_graphs.ports import declare_past, declare_place, declare_planes
from localdepth_export.onnx_graphs.stages import change, decode, encode

__all__ = ["looped_exit_graph", "looped_graph"]


def looped_graph(config: ModelConfig, layout: Layout) -> Builder:
    """The whole model; the caches say how deep."""
    scope = Builder(layout)
    layers, state, injected, rows = _open(config, scope)
    enters_once = config.injection is Injection.NONE
    if enters_once:
        state = scope.op("Add", state, injected)
    body = scope.body()
    inner = layers.inside(body)
    x = body.input("state", np.float32, state_shape(config))
    planes = [
        Cache(*(body.input(side, np.float32, plane_shape(config, "n_past")) for side in SIDES))
        for _ in range(config.n_core)
    ]
    out, present = inner.stage("core", x if enters_once else inner.inject(x, injected), planes)
    body.output("state", out, np.float32, state_shape(config))
    for value in chain(*present):
        body.output("plane", value, np.float32, plane_shape(config, "n_present"))
    past = list(chain(*declare_past(scope, config, "core", ["n_passes"])))
    final, *stacked = scope.ops(
        "Scan", state, *past, outputs=range(1 + len(past)), body=body.graph("pass"), num_scan_inputs=len(past)
    )
    declare_planes(scope, "present.core", _caches(stacked), ["n_passes", *plane_shape(config, "n_present")])
    decode(layers, final, rows)
    return scope


def looped_exit_graph(config: ModelConfig, layout: Layout) -> Builder:
    """The whole model; it stops where the state settles."""
    scope = Builder(layout)
    threshold, max_passes = scope.input("threshold", np.float32, []), scope.input("max_passes", np.int64, [])
    layers, state, injected, rows = _open(config, scope)
    end = scope.op("Add", layers.place.positions, scope.op("Shape", injected, start=1, end=2))
    past = declare_past(scope, config, "core", ["n_planes"])
    body = scope.body()
    inner = layers.inside(body)
    r, _ = body.input("r", np.int64, []), body.input("goes_on", np.bool_, [])
    x = body.input("state", np.float32, state_shape(config))
    if config.injection is Injection.NONE:
        is_first = body.op("Equal", r, body.constant(0))
        injected = body.op("Where", is_first, injected, body.constant(0, np.float32))
    planes = [Cache(*(body.op("Gather", side, r, axis=0) for side in cache)) for cache in past]
    out, present = inner.stage("core", inner.inject(x, injected), planes)
    body.output("goes_on", body.op("Greater", change(body, x, out), threshold), np.bool_, [])
    body.output("state", out, np.float32, state_shape(config))
    for value in chain(*present):
        new = body.op("Slice", value, layers.place.positions, end, body.constant([2]))
        body.output("new", new, np.float32, plane_shape(config, "n_tokens"))
    final, *stacked = scope.ops(
        "Loop",
        max_passes,
        scope.constant(True, np.bool_),
        state,
        outputs=range(1 + 2 * config.n_core),
        body=body.graph("pass"),
    )
    final = scope.op("Reshape", final, scope.constant([1, -1, config.n_embd]))  # a Loop forgets the shape
    scope.output("n_passes", scope.op("Shape", stacked[0], start=0, end=1), np.int64, [1])
    declare_planes(scope, "new.core", _caches(stacked), ["n_passes", *plane_shape(config, "n_tokens")])
    decode(layers, final, rows)
    return scope


def _open(config: ModelConfig, scope: Builder) -> tuple[Layers, Value, Value, Value]:
    """The layers, s_0, what is injected, and the rows wanted: the inputs of both graphs, and the prelude."""
    ids = scope.input("ids", np.int64, [1, "n_tokens"])
    layers = Layers(config, scope, declare_place(scope, ids))
    embeds, injected = encode(layers, ids)
    state = scope.input("state", np.float32, [1, "n_given", config.n_embd])
    rows = scope.input("rows", np.int64, ["n_rows"])
    return layers, scope.op("Expand", state, scope.op("Shape", embeds)), injected, rows


def _caches(values: Sequence[Value]) -> list[Cache]:
    """Caches from their keys and values in turn."""
    return [Cache(*pair) for pair in zip(values[::2], values[1::2], strict=True)]
