"""Graphs of ONNX nodes, written down in the order they run.

A ``Builder`` is one scope: a graph, or the body of a loop in it. Values are names, unique across all scopes of a
graph, so a body simply uses those of the scopes around it. Weights and constants belong to the outermost scope;
weights lie in the file that a ``Layout`` describes and are only pointed to.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any, NewType

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from localdepth.onnx_folder.layout import WEIGHTS, Layout, Piece
from localdepth.onnx_folder.ports import IR_VERSION, OPSETS, Dim

__all__ = ["FLOAT", "INT32", "INT64", "Builder", "Value"]

Value = NewType("Value", str)
FLOAT, INT32, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT32, onnx.TensorProto.INT64


_MICROSOFT = "com.microsoft"
_MICROSOFT_OPS = frozenset(
    {
        "FusedMatMul",
        "GatherBlockQuantized",
        "GroupQueryAttention",
        "MatMulNBits",
        "RotaryEmbedding",
        "SkipSimplifiedLayerNormalization",
    }
)


class Builder:
    """One scope of a graph in the making.

    Args:
        layout: where the weights lie.
        around: the scope that this one is a body in; None for the graph itself.
    """

    def __init__(self, layout: Layout, around: "Builder | None" = None) -> None:
        self.layout = layout
        self._root: Builder = around._root if around else self
        self._numbers: Iterator[int] = around._numbers if around else count()
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._inputs: dict[str, onnx.ValueInfoProto] = {}
        self._outputs: dict[str, onnx.ValueInfoProto] = {}
        self._names: dict[str, str] = {}  # what a value is called outside
        self._widened: dict[str, Value] = {}

    def body(self) -> "Builder":
        """A scope inside this one."""
        return Builder(self.layout, self)

    def input(self, name: str, dtype: npt.DTypeLike, shape: Sequence[Dim]) -> Value:
        """Declare an input; in a body, ``name`` is but a hint."""
        value = Value(name) if self._root is self else self._unique(name)
        self._inputs[value] = _declared(value, dtype, shape)
        return value

    def output(self, name: str, value: Value, dtype: npt.DTypeLike, shape: Sequence[Dim]) -> None:
        """Let a value leave the graph under ``name``; in a body, only the order of outputs counts."""
        if value in self._names or value in self._inputs:
            value = self.op("Identity", value)
        self._names[value] = name if self._root is self else value
        self._outputs[value] = _declared(self._names[value], dtype, shape)

    def op(self, kind: str, *inputs: Value, **attributes: Any) -> Value:
        """Add a node; its first output."""
        return self.ops(kind, *inputs, outputs=(0,), **attributes)[0]

    def ops(self, kind: str, *inputs: Value, outputs: Sequence[int], **attributes: Any) -> list[Value]:
        """Add a node; those of its outputs that are wanted, by number in rising order."""
        names = [self._unique(kind) if i in outputs else Value("") for i in range(outputs[-1] + 1)]
        domain = _MICROSOFT if kind in _MICROSOFT_OPS else ""
        self._nodes.append(helper.make_node(kind, inputs, names, names[0], domain=domain, **attributes))
        return [names[i] for i in outputs]

    def constant(self, values: object, dtype: npt.DTypeLike = np.int64) -> Value:
        """A number, or a few in lists; equal ones are stored once."""
        array = np.array(values, dtype)
        name = f"constant.{array.dtype}.{array.tolist()}"
        self._root._initializers.setdefault(name, numpy_helper.from_array(array, name))
        return Value(name)

    def stored(self, name: str, shape: Sequence[int] | None = None) -> Value:
        """A piece of the weights file as it lies there, seen in ``shape`` where that differs from its own."""
        piece = self.layout[name]
        seen = piece.shape if shape is None else tuple(shape)
        key = name if seen == piece.shape else f"{name}.{'x'.join(map(str, seen))}"
        self._root._initializers.setdefault(key, _external(key, piece, seen))
        return Value(key)

    def weight(self, name: str) -> Value:
        """A float tensor of the model as float32; one that is stored shorter is widened when the graph is loaded."""
        root = self._root
        if self.layout[name].dtype == np.float32:
            return root.stored(name)
        if name not in root._widened:
            root._widened[name] = root.op("Cast", root.stored(name), to=FLOAT)
        return root._widened[name]

    def graph(self, name: str) -> onnx.GraphProto:
        """All that has been written down."""
        for node in self._nodes:
            _rename(node, self._names)
        return helper.make_graph(
            self._nodes,
            name,
            list(self._inputs.values()),
            list(self._outputs.values()),
            list(self._initializers.values()),
        )

    def model(self, name: str, metadata: Mapping[str, str]) -> onnx.ModelProto:
        """The graph as a model file; it finds its weights in its own folder."""
        opsets = [helper.make_opsetid(domain, version) for domain, version in OPSETS.items()]
        model = helper.make_model(
            self.graph(name), opset_imports=opsets, ir_version=IR_VERSION, producer_name="localdepth"
        )
        helper.set_model_props(model, dict(metadata))
        return model

    def _unique(self, hint: str) -> Value:
        return Value(f"{hint}.{next(self._numbers)}")


def _declared(name: str, dtype: npt.DTypeLike, shape: Sequence[Dim]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), list(shape))


def _external(name: str, piece: Piece, shape: tuple[int, ...]) -> onnx.TensorProto:
    """A tensor whose bytes lie in the weights file."""
    tensor = onnx.TensorProto(name=name, dims=shape, data_type=helper.np_dtype_to_tensor_dtype(piece.dtype))
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": WEIGHTS, "offset": piece.offset, "length": piece.n_bytes}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _rename(node: onnx.NodeProto, names: Mapping[str, str]) -> None:
    """Call values by their outward names, in the node and in the bodies it holds."""
    for values in (node.input, node.output):
        values[:] = [names.get(value, value) for value in values]
    for attribute in node.attribute:
        for inner in attribute.g.node:
            _rename(inner, names)
