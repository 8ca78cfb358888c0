"""A graph of our engine, looked through before ONNX Runtime sees it.

Kernels trust sizes and positions that reach them, so a graph must be one that our exporter could have written for the
model: its properties, ports, weights and operators are those of the model, where tokens stand comes from ``n_total``
alone, and attention gets as many as there are. What is left to go wrong, shapes that do not match, ONNX Runtime
refuses by itself.
"""

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localdepth.config import ModelConfig, RopeStyle
from localdepth.errors import ModelFileError
from localdepth.onnx_folder.layout import BLOCK, ROPE_TABLES, WEIGHTS, Layout, Piece
from localdepth.onnx_folder.ports import IR_VERSION, OPSETS, STAGE_GRAPHS, Port, cache_names, stage_ports
from localdepth.onnx_folder.protobuf import Message, read_model
from localdepth.onnx_folder.record import CONFIG, from_properties

__all__ = ["check_graph"]

_DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype(np.float32),
    2: np.dtype(np.uint8),
    6: np.dtype(np.int32),
    7: np.dtype(np.int64),
    9: np.dtype(np.bool_),
    10: np.dtype(np.float16),
}
_EXTERNAL = 1  # data_location
_FLOAT = 1  # type of an attribute
_MAX_DIMS = 4
_MAX_CONSTANT = 1024  # bytes; ours are lists of a few numbers
_MAX_PADDING = 8  # numbers at the end of a head
_FLAG = range(2)

_Allowed = Mapping[str, Container[float]]  # the values that an attribute may have, by its name

# Operators without attributes, and those whose attributes are the same for all models; see ``_attributes`` for others.
_ELEMENTWISE = ("Add", "Div", "Max", "Mul", "Sub")
_PLAIN = (*_ELEMENTWISE, "Identity", "Pad", "Reshape", "Sigmoid", "Slice", "Squeeze")
_STANDARD: Mapping[str, _Allowed] = {
    **{op: {} for op in _PLAIN},
    "Cast": {"to": range(1, 11)},
    "Gather": {"axis": range(1)},
    "ReduceL2": {"keepdims": _FLAG},
    "ReduceMean": {"keepdims": _FLAG},
    "Shape": {"start": range(1, 2), "end": range(2, 3)},
}


@dataclass(frozen=True, slots=True)
class _Node:
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def input(self, i: int) -> str:
        """One of the inputs; none is called ""."""
        return self.inputs[i] if i < len(self.inputs) else ""


def check_graph(raw: bytes, name: str, config: ModelConfig, layout: Layout) -> None:
    """Look through the graph ``name`` of a model.

    Raises:
        ModelFileError: it is damaged, or not one that our exporter writes for this model.
        ConfigError: it does not say what model it is of.
    """
    model = read_model(raw)
    opsets = {item["domain"]: item["version"] for item in model["opset_import"]}
    if model["ir_version"] != IR_VERSION or opsets != OPSETS or len(opsets) != len(model["opset_import"]):
        raise ModelFileError(f"the graph is of IR {model['ir_version']} with operators {opsets}, not {OPSETS}")
    graph = model["graph"]
    if not graph:
        raise ModelFileError("there is no graph in the file")
    _check_properties({item["key"]: item["value"] for item in model["metadata_props"]}, config)
    ports = stage_ports(config, name)
    _check_ports("input", graph["input"], ports.inputs)
    _check_ports("output", graph["output"], ports.outputs)
    weights, constants = _initializers(graph["initializer"], layout)
    reading = _Reading(config, name, layout, weights, constants)
    for node in graph["node"]:
        reading.add(node)
    reading.finish()


def _check_properties(said: Mapping[str, str], config: ModelConfig) -> None:
    """The record says of the model what the graph says; much of it can be seen nowhere else."""
    ours, theirs = config.to_dict(), from_properties(said).to_dict()
    if differing := [f"{name} {ours[name]} against {theirs[name]}" for name in ours if ours[name] != theirs[name]]:
        raise ModelFileError(f"{CONFIG} and the graph are of different models: {', '.join(differing)}")


def _check_ports(way: str, values: list[Message], wanted: Mapping[str, Port]) -> None:
    found = {}
    for value in values:
        tensor = value["type"].get("tensor_type") or {}
        dims = [dim["dim_param"] or dim["dim_value"] for dim in (tensor.get("shape") or {}).get("dim", ())]
        found[value["name"]] = Port(_dtype(tensor.get("elem_type", 0)), tuple(dims))
    if len(found) != len(values) or found != wanted:
        differing = next((name for name in [*wanted, *found] if found.get(name) != wanted.get(name)), "a name twice")
        raise ModelFileError(f"{way} {differing!r:.80} of the graph is not what a model of these sizes has")


def _initializers(tensors: list[Message], layout: Layout) -> tuple[dict[str, Piece], dict[str, NDArray[Any]]]:
    """Weights in the file, in the shapes that the graph sees, and constants in the graph."""
    pieces = {piece.offset: piece for piece in layout.values()}
    weights: dict[str, Piece] = {}
    constants: dict[str, NDArray[Any]] = {}
    for tensor in tensors:
        name, dtype, shape = tensor["name"], _dtype(tensor["data_type"]), tuple(tensor["dims"])
        if name in weights or name in constants or name == "":
            raise ModelFileError(f"the graph has two tensors called {name!r:.80}")
        if len(shape) > _MAX_DIMS or min(shape, default=0) < 0:
            raise ModelFileError(f"tensor {name!r:.80} has shape {list(shape[: _MAX_DIMS + 1])}")
        n_bytes = math.prod(shape) * dtype.itemsize
        if tensor["data_location"] == _EXTERNAL:
            piece = pieces.get(_offset(name, tensor))
            if piece is None or (dtype, n_bytes) != (piece.dtype, piece.n_bytes):
                raise ModelFileError(f"tensor {name!r:.80} is none of the weights of a model of these sizes")
            weights[name] = replace(piece, shape=shape)
        elif tensor["data_location"] or tensor["external_data"] or len(tensor["raw_data"]) != n_bytes:
            raise ModelFileError(f"tensor {name!r:.80} has {len(tensor['raw_data'])} bytes where {n_bytes} belong")
        elif n_bytes > _MAX_CONSTANT:
            raise ModelFileError(f"tensor {name!r:.80} has {n_bytes} bytes in the graph, over {_MAX_CONSTANT}")
        else:
            constants[name] = np.frombuffer(tensor["raw_data"], dtype).reshape(shape)
    return weights, constants


def _offset(name: str, tensor: Message) -> int:
    """Where a weight lies in the file that all weights lie in."""
    place = {item["key"]: item["value"] for item in tensor["external_data"]}
    if place.get("location") != WEIGHTS:
        raise ModelFileError(
            f"tensor {name!r:.80} lies in {place.get('location', '')!r:.80}; weights lie in {WEIGHTS} beside the graph"
        )
    if set(place) != {"location", "offset", "length"} or len(place) != len(tensor["external_data"]):
        raise ModelFileError(f"tensor {name!r:.80} does not say where in {WEIGHTS} it lies")
    if not (place["offset"].isascii() and place["offset"].isdigit() and len(place["offset"]) < 20):
        raise ModelFileError(f"tensor {name!r:.80} lies at {place['offset']!r:.40} of {WEIGHTS}")
    return int(place["offset"])


def _dtype(number: int) -> np.dtype[Any]:
    if number not in _DTYPES:
        raise ModelFileError(f"the graph has numbers of type {number}, which ours do not have")
    return _DTYPES[number]


class _Reading:
    """Follows the nodes of a graph in the order they run."""

    def __init__(
        self,
        config: ModelConfig,
        name: str,
        layout: Layout,
        weights: Mapping[str, Piece],
        constants: Mapping[str, NDArray[Any]],
    ) -> None:
        ports = stage_ports(config, name)
        self._inputs, self._outputs = set(ports.inputs), set(ports.outputs)
        self._weights, self._constants = weights, constants
        self._tables = [layout[table] for table in ROPE_TABLES]
        self._allowed = _attributes(config, layout)
        self._made: dict[str, _Node] = {}
        stage = STAGE_GRAPHS[name]
        caches = (cache_names(f"{way}.{stage}", config.n_layer(stage)) for way in ("past", "present"))
        self._caches = list(zip(*caches, strict=True))  # that are still to come, in order
        self._tokens = "ids" if name == "prelude" else "state"
        # Dimensions of values that begin with [1,T], a row for each token. In a broadcast, T may become something else.
        self._ranks: dict[str, int | None] = {
            value: len(port.shape) for value, port in ports.inputs.items() if "n_tokens" in port.shape
        }

    def add(self, node: Message) -> None:
        """Take one node more."""
        op, domain = node["op_type"], node["domain"]
        allowed = self._allowed.get((domain, op))
        if allowed is None:
            raise ModelFileError(f"the graph has an operator {op!r:.40} of {domain!r:.40}, which ours do not have")
        for attribute in node["attribute"]:
            value = attribute["f" if attribute["type"] == _FLOAT else "i"]
            if value not in allowed.get(attribute["name"], ()):
                raise ModelFileError(f"{op} has {attribute['name']!r:.40} = {value}, unlike this model")
        made = _Node(op, tuple(node["input"]), tuple(node["output"]))
        if unknown := [value for value in made.inputs if not (value == "" or self._is_known(value))]:
            raise ModelFileError(f"{op} takes {unknown[0]!r:.80} before it is made")
        for value in made.outputs:
            if value != "" and self._is_known(value):
                raise ModelFileError(f"{op} makes {value!r:.80} again")
            self._made[value] = made
        self._check_place(made)
        rank = self._rank(made)
        for value in made.outputs[:1] if made.op == "GroupQueryAttention" else made.outputs:  # others are caches
            self._ranks[value] = rank

    def finish(self) -> None:
        """All nodes have been added."""
        if missing := [name for name in self._outputs if name not in self._made] + [past for past, _ in self._caches]:
            raise ModelFileError(f"the graph does nothing for {missing[0]!r:.80}")

    def _is_known(self, value: str) -> bool:
        return any(value in names for names in (self._made, self._inputs, self._weights, self._constants))

    def _check_place(self, node: _Node) -> None:
        """Where a kernel reads and writes by a position or a size that it is given, it must be the right one."""
        match node.op:
            case "GroupQueryAttention":
                keys, values = self._caches[:2] if len(self._caches) > 1 else [("", ""), ("", "")]
                del self._caches[:2]
                place = [self._origin(value) for value in node.inputs[5:]]
                right = (
                    node.inputs[3:5] == (keys[0], values[0])
                    and node.outputs[1:] == (keys[1], values[1])
                    and place == [("Sub", "n_total", 1), "n_total"]
                    and [self._ranks.get(value) for value in node.inputs[:3]] == [3, 3, 3]
                )
            case "RotaryEmbedding":
                first = ("Sub", ("Cast", "n_total"), ("Shape", self._tokens))
                tables = [self._weights[name] for name in node.inputs[2:] if name in self._weights]
                right = (
                    self._origin(node.input(1)) == first
                    and tables == self._tables
                    and self._ranks.get(node.input(0)) == 3
                )
            case "Pad":
                *others, last = self._numbers(node.input(1)) or [_MAX_PADDING]
                right = len(node.inputs) == 2 and not any(others) and 0 <= last < _MAX_PADDING
            case _:
                right = True
        if not right:
            raise ModelFileError(f"{node.op} of {node.input(0)!r:.80} is not what a model of these sizes has")

    def _rank(self, node: _Node) -> int | None:
        """Dimensions of what a node makes, where it is sure to begin with [1,T]."""
        first = self._ranks.get(node.input(0))
        match node.op:
            case "Gather" | "GatherBlockQuantized":
                matrix = self._n_dims(node.input(0))
                return matrix + 1 if matrix and self._ranks.get(node.input(1)) == 2 else None
            case "Reshape":
                shape = self._numbers(node.input(1))
                return len(shape) if first and shape[:2] == [0, 0] else None
            case "Slice":
                return first if first != 2 and self._numbers(node.input(3)) == [-1] else None
            case "FusedMatMul":
                return first if self._n_dims(node.input(1)) == 2 else None
            case "Squeeze" | "Shape" | "ReduceL2" | "ReduceMean":
                return None
            case op if op in (*_ELEMENTWISE, "SkipSimplifiedLayerNormalization"):
                wide = [value for value in node.inputs if self._n_dims(value) not in (0, 1)]
                [rank, *others] = {self._ranks.get(value) for value in wide} or {None}
                return None if others or rank == 2 else rank
        return first

    def _n_dims(self, value: str) -> int | None:
        """Dimensions of a weight, also of one that is widened, or of a constant; None of anything else."""
        node = self._made.get(value)
        if node and node.op == "Cast":
            value = node.input(0)
        tensor = self._weights.get(value, self._constants.get(value))
        return None if tensor is None else len(tensor.shape)

    def _numbers(self, value: str) -> list[Any]:
        """A constant as a list; empty where it is none."""
        constant = self._constants.get(value)
        return [] if constant is None else constant.reshape(-1).tolist()

    def _origin(self, value: str, depth: int = 2) -> object:
        """How a value comes from inputs and constants, through the operators that places are made with."""
        if value in self._constants:
            return self._constants[value].tolist()
        node = self._made.get(value)
        if node is None:
            return value
        if node.op not in ("Cast", "Shape", "Sub") or depth == 0:  # no place of ours is made in more steps
            return None
        return node.op, *(self._origin(name, depth - 1) for name in node.inputs)


def _attributes(config: ModelConfig, layout: Layout) -> dict[tuple[str, str], _Allowed]:
    """What each operator may be told, by domain and name."""

    def only(value: float) -> Container[float]:
        return (value,)

    def only_float32(value: float) -> Container[float]:
        with np.errstate(over="ignore"):  # no attribute is infinite
            return only(float(np.float32(value)))

    widths = {"bits": range(4, 9, 4), "block_size": only(BLOCK)}
    epsilon = only_float32(config.norm_eps)
    matrices = [shape for shape in config.tensors().values() if len(shape) == 2]
    microsoft: Mapping[str, _Allowed] = {
        "FusedMatMul": {"transB": only(1)},
        "GatherBlockQuantized": {**widths, "gather_axis": only(0), "quantize_axis": only(1)},
        "GroupQueryAttention": {
            "num_heads": only(config.n_head),
            "kv_num_heads": only(config.n_head_kv),
            "scale": only_float32(1 / math.sqrt(config.head_dim)),
        },
        "MatMulNBits": {
            **widths,
            "N": range(1, 1 + max(rows for rows, _ in matrices)),
            "K": range(1, 1 + max(columns for _, columns in matrices)),
            "accuracy_level": range(5),
        },
        "RotaryEmbedding": {
            "num_heads": range(1, config.n_head + 1),
            "rotary_embedding_dim": only(config.head_dim),
            "interleaved": only(config.rope_style is RopeStyle.INTERLEAVED),
        },
        "SkipSimplifiedLayerNormalization": {"epsilon": epsilon},
    }
    standard: Mapping[str, _Allowed] = {
        **_STANDARD,
        "SimplifiedLayerNormalization": {"axis": only(-1), "epsilon": epsilon},
    }
    return {("", op): allowed for op, allowed in standard.items()} | {
        ("com.microsoft", op): allowed for op, allowed in microsoft.items()
    }
