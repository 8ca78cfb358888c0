"""A model as a folder of ONNX graphs over one file of weights.

    config.json                      what the model is, how it is stored, and where it comes from
    prelude.onnx pass.onnx coda.onnx the graphs of our engine, see ``stages``
    looped.onnx looped_exit.onnx     the whole model, the depth chosen at run time, see ``looped``
    model.onnx genai_config.json     the whole model at one depth, for onnxruntime-genai, see ``unrolled``
    weights.bin                      what all of them share, see ``weights``

and tokenizer, chat template and licences as they were. Every graph carries the model's record, too, so that one that
travels alone still says what it is.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from localdepth.config import ModelConfig
from localdepth.onnx_folder.folder import is_folder, read
from localdepth.onnx_folder.layout import WEIGHTS, Layout
from localdepth.onnx_folder.record import CHAT_TEMPLATE, CONFIG, TOKENIZER, OnnxRecord, graph_file
from localdepth.record import Check, CheckStatus, TokenizerRecord
from localdepth_export.onnx_graphs.builder import Builder
from localdepth_export.onnx_graphs.looped import looped_exit_graph, looped_graph
from localdepth_export.onnx_graphs.source import Source
from localdepth_export.onnx_graphs.stages import coda_graph, pass_graph, prelude_graph
from localdepth_export.onnx_graphs.unrolled import genai_config, unrolled_graph
from localdepth_export.onnx_graphs.weights import write_weights
from localdepth_train.checkpoint import CARRIED
from localdepth_train.output import replacing, replacing_folder

__all__ = ["write_check", "write_folder"]

_GENAI_CONFIG, _UNROLLED = "genai_config.json", "model"
_GRAPHS: Mapping[str, Callable[[ModelConfig, Layout], Builder]] = {
    "prelude": prelude_graph,
    "pass": pass_graph,
    "coda": coda_graph,
    "looped": looped_graph,
    "looped_exit": looped_exit_graph,
}


def write_folder(source: Source, out: Path, depth: int | None = None) -> None:
    """Write ``source`` as the folder ``out``, complete or not at all.

    Args:
        depth: of the graph for onnxruntime-genai; None takes the model's default.
    Raises:
        DepthError: the model does not go to ``depth``.
        StorageError: the folder cannot be written, or holds something else; what ``source.encode`` raises passes.
    """
    config, layout, tokenizer = source.config, source.layout, source.tokenizer
    depth = config.check_depth(config.default_depth if depth is None else depth)
    properties = source.properties()
    with replacing_folder(out, _is_export) as folder:
        checksums = {WEIGHTS: write_weights(folder / WEIGHTS, config, layout, source.encode)}
        graphs = {name: make(config, layout) for name, make in _GRAPHS.items()}
        graphs[_UNROLLED] = unrolled_graph(config, layout, depth)
        ours = _texts(tokenizer)
        ours |= {graph_file(name): graph.model(name, properties).SerializeToString() for name, graph in graphs.items()}
        checksums |= {name: hashlib.sha256(content).hexdigest() for name, content in ours.items()}
        for name, content in {**source.files, **ours}.items():
            _write(folder / name, content)
        _write_json(folder / _GENAI_CONFIG, genai_config(config, depth, graph_file(_UNROLLED), tokenizer))
        record = OnnxRecord(
            config=config,
            bits=source.bits,
            checksums=checksums,
            tokenizer=tokenizer,
            provenance=source.provenance,
            check=Check(CheckStatus.UNVERIFIED),
        )
        _write_json(folder / CONFIG, record.to_dict())


def write_check(folder: str | os.PathLike[str], check: Check) -> None:
    """Put ``check`` into the record of a folder in place of the one it has; all else stays.

    Raises:
        ModelFileError: not a sound folder of ours.
        StorageError: the record cannot be written; the old one stays.
    """
    with read(folder) as opened:
        record = replace(opened.record, check=check)
    _write_json(Path(folder) / CONFIG, record.to_dict())


def _texts(tokenizer: TokenizerRecord | None) -> dict[str, bytes]:
    """What of a tokenizer lies beside the record."""
    if tokenizer is None:
        return {}
    texts = {TOKENIZER: tokenizer.json, CHAT_TEMPLATE: tokenizer.chat_template}
    return {name: text.encode() for name, text in texts.items() if text is not None}


def _is_export(folder: Path) -> bool:
    """Whether a folder holds an older export and nothing else, as far as names tell."""
    known = {CONFIG, _GENAI_CONFIG, WEIGHTS, *map(graph_file, (*_GRAPHS, _UNROLLED)), *CARRIED}
    return is_folder(folder) and {path.name for path in folder.iterdir()} <= known


def _write_json(path: Path, record: Mapping[str, Any]) -> None:
    _write(path, (json.dumps(record, indent=2) + "\n").encode())


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as output:
        output.append(content)
