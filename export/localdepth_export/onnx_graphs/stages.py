"""The three graphs of our engine, which loops over the passes itself; ``localdepth.onnx_folder`` tells their ports."""

import numpy as np

from localdepth.config import ModelConfig
from localdepth.onnx_folder.layout import Layout
from localdepth.onnx_folder.ports import plane_shape, state_shape
from localdepth_export.onnx_graphs.builder import Builder, Value
from localdepth_export.onnx_graphs.layers import Layers
from localdepth_export.onnx_graphs.ports import declare_past, declare_place, declare_planes

__all__ = ["change", "coda_graph", "decode", "encode", "pass_graph", "prelude_graph"]


def prelude_graph(config: ModelConfig, layout: Layout) -> Builder:
    """From token ids to what the passes need of them."""
    scope = Builder(layout)
    ids = scope.input("ids", np.int64, [1, "n_tokens"])
    layers = Layers(config, scope, declare_place(scope, ids))
    for name, value in zip(("embeds", "injected"), encode(layers, ids), strict=True):
        scope.output(name, value, np.float32, state_shape(config))
    return scope


def pass_graph(config: ModelConfig, layout: Layout) -> Builder:
    """One pass of the core."""
    scope = Builder(layout)
    state, injected = (scope.input(name, np.float32, state_shape(config)) for name in ("state", "injected"))
    layers = Layers(config, scope, declare_place(scope, state))
    out = _run_stage(layers, "core", layers.inject(state, injected))
    scope.output("next_state", out, np.float32, state_shape(config))
    scope.output("change", change(scope, state, out), np.float32, [])
    return scope


def coda_graph(config: ModelConfig, layout: Layout) -> Builder:
    """From a state to logits."""
    scope = Builder(layout)
    state = scope.input("state", np.float32, state_shape(config))
    rows = scope.input("rows", np.int64, ["n_rows"])
    decode(Layers(config, scope, declare_place(scope, state)), state, rows)
    return scope


def encode(layers: Layers, ids: Value) -> tuple[Value, Value]:
    """Embeds and what of them is injected; declares the prelude's caches."""
    embeds = _run_stage(layers, "prelude", layers.embed(ids))
    return embeds, layers.injected(embeds)


def decode(layers: Layers, state: Value, rows: Value) -> None:
    """Declares the logits of some rows, and the coda's caches."""
    scope = layers.scope
    out = _run_stage(layers, "coda", layers.enter_coda(state))
    wanted = scope.op("Gather", scope.op("Squeeze", out, scope.constant([0])), rows, axis=0)
    scope.output("logits", layers.head(wanted), np.float32, ["n_rows", layers.config.n_vocab])


def change(scope: Builder, before: Value, after: Value) -> Value:
    """How far a pass moved the state, both [1,T,E]: one number."""
    last = scope.constant([-1])
    moved, size = (scope.op("ReduceL2", x, last, keepdims=0) for x in (scope.op("Sub", after, before), after))
    tiny = scope.constant(np.finfo(np.float32).tiny, np.float32)
    return scope.op("ReduceMean", scope.op("Div", moved, scope.op("Max", size, tiny)), keepdims=0)


def _run_stage(layers: Layers, stage: str, x: Value) -> Value:
    """A stage with its caches as inputs and outputs."""
    config, scope = layers.config, layers.scope
    out, caches = layers.stage(stage, x, declare_past(scope, config, stage))
    declare_planes(scope, f"present.{stage}", caches, plane_shape(config, "n_present"))
    return out
