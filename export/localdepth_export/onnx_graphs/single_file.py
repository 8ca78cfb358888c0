"""The looped graph with its weights inside: one file that goes wherever ONNX Runtime does.

It is for other programs: our engine runs folders. It says the same of its model as the graphs of a folder do, and its
tokenizer, if it has one, under the keys of a GGUF file. All properties are text, whatever is not text itself is JSON:

    localdepth.<field>              every field of ``ModelConfig``
    localdepth.provenance.<name>    see ``PROVENANCE_KINDS``; lists with commas between
    tokenizer.huggingface.json      the whole tokenizer.json
    tokenizer.chat_template         as it was; only if there is one
    tokenizer.ggml.bos_token_id     an id; only if there is one
    tokenizer.ggml.eos_token_ids    a list of ids, each of which ends an answer
    tokenizer.ggml.add_bos_token    whether every text begins with the first

The file is put together piece by piece, since ``onnx.save`` would hold all weights several times.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from localdepth.errors import ConfigError, StorageError
from localdepth.onnx_folder.folder import is_folder
from localdepth.onnx_folder.layout import Layout
from localdepth.onnx_folder.record import graph_file
from localdepth_export.onnx_graphs.looped import looped_graph
from localdepth_export.onnx_graphs.source import Source
from localdepth_export.onnx_graphs.weights import stretches
from localdepth_train.output import replacing

__all__ = ["single_path", "write_single"]

_NAME = "looped"
_MOST_BYTES = (1 << 31) - 1  # of a protobuf message
_GRAPH, _INITIALIZER = onnx.ModelProto.GRAPH_FIELD_NUMBER, onnx.GraphProto.INITIALIZER_FIELD_NUMBER
_RAW_DATA = onnx.TensorProto.RAW_DATA_FIELD_NUMBER
_DELIMITED = 2  # wire type of messages and bytes
_PRODUCER = b"localdepth"  # near the beginning of the files that we write


def single_path(out: Path) -> Path:
    """The file to write where ``out`` is asked for: itself if it ends in .onnx, else looped.onnx in the folder ``out``.

    Raises:
        StorageError: that folder is a file, or a model, which is all that its folder may hold.
    """
    path = out if out.suffix == ".onnx" and not out.is_dir() else out / graph_file(_NAME)
    place = path.parent
    if place.exists() and not place.is_dir():
        raise StorageError(
            f"{place} is a file, not a folder for {path.name}; name a file that ends in .onnx, or a folder"
        )
    if is_folder(place):
        raise StorageError(f"{place} holds a model folder, whose files belong together; name a file or another folder")
    return path


def write_single(source: Source, path: Path) -> None:
    """Write the looped graph of ``source`` as ``path``, holding one tensor in memory at a time.

    Raises:
        ConfigError: it would be larger than ONNX allows.
        StorageError: the file cannot be written, or holds something else; what ``source.encode`` raises passes.
    """
    layout = source.layout
    model = looped_graph(source.config, layout).model(_NAME, source.properties() | source.tokenizer_properties())
    heads = _take_weights(model.graph, layout)
    assert heads.keys() == layout.keys(), "the looped graph uses every piece once"
    sizes = {name: len(head) + layout[name].n_bytes for name, head in heads.items()}
    graph = model.graph.SerializeToString()
    n_graph = len(graph) + sum(len(_field(_INITIALIZER, size)) + size for size in sizes.values())
    model.ClearField("graph")
    head = model.SerializeToString() + _field(_GRAPH, n_graph) + graph
    if (n_bytes := len(head) - len(graph) + n_graph) > _MOST_BYTES:
        raise ConfigError(
            f"one file of {n_bytes:,} bytes is beyond the {_MOST_BYTES:,} that ONNX allows; store fewer bits, or write "
            "a folder, whose weights may be of any size"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}; name another place") from error
    with replacing(path, _is_ours) as output:
        output.append(head)
        for stretch in stretches(source.config, layout, source.encode):
            if stretch.start == layout[stretch.piece].offset:
                output.append(_field(_INITIALIZER, sizes[stretch.piece]) + heads[stretch.piece])
            output.append(stretch.data.data)


def _take_weights(graph: onnx.GraphProto, layout: Layout) -> dict[str, bytes]:
    """Take the weights out of a graph, which keeps its constants; each, by piece, as a tensor encoded up to its bytes.

    A piece that is seen in two shapes is stored in its own, of which a node makes the other.
    """
    names = {piece.offset: name for name, piece in layout.items()}
    stored = sorted((t for t in graph.initializer if t.external_data), key=lambda tensor: tensor.name not in layout)
    constants = [tensor for tensor in graph.initializer if not tensor.external_data]
    nodes = list(graph.node)
    taken: dict[str, onnx.TensorProto] = {}
    for tensor in stored:
        name = names[next(int(entry.value) for entry in tensor.external_data if entry.key == "offset")]
        if name in taken:
            shape = numpy_helper.from_array(np.array(tensor.dims, np.int64), f"{tensor.name}.shape")
            constants.append(shape)
            nodes.insert(0, helper.make_node("Reshape", [taken[name].name, shape.name], [tensor.name]))
        else:
            taken[name] = onnx.TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type)
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(constants)
    graph.node.extend(nodes)
    return {
        name: tensor.SerializeToString() + _field(_RAW_DATA, layout[name].n_bytes) for name, tensor in taken.items()
    }


def _is_ours(path: Path) -> bool:
    with path.open("rb") as file:
        return _PRODUCER in file.read(32)


def _field(number: int, n_bytes: int) -> bytes:
    """The beginning of a field of ``n_bytes``."""
    return _varint(number << 3 | _DELIMITED) + _varint(n_bytes)


def _varint(value: int) -> bytes:
    groups = [value >> shift & 0x7F for shift in range(0, max(value.bit_length(), 1), 7)]
    return bytes([*(group | 0x80 for group in groups[:-1]), groups[-1]])
