"""Checkpoint -> a folder of ONNX graphs over one file of weights.

    config.json                      what the model is, how it is stored, and where it comes from
    prelude.onnx pass.onnx coda.onnx the graphs of our engine, see ``stages``
    looped.onnx looped_exit.onnx     the whole model, the depth chosen at run time, see ``looped``
    model.onnx genai_config.json     the whole model at one depth, for onnxruntime-genai, see ``unrolled``
    weights.bin                      what all of them share, see ``weights``

and tokenizer, chat template and licences as the checkpoint has them. Every graph carries the model's record, too, so
that one that travels alone still says what it is.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from localdepth.config import ModelConfig
from localdepth.engine.base import F32
from localdepth.errors import CheckpointError
from localdepth.gguf import NAMESPACE, PROVENANCE, CheckStatus, TokenizerRecord
from localdepth_export.convert import Export
from localdepth_export.onnx_graphs.builder import Builder
from localdepth_export.onnx_graphs.looped import looped_exit_graph, looped_graph
from localdepth_export.onnx_graphs.stages import coda_graph, pass_graph, prelude_graph
from localdepth_export.onnx_graphs.unrolled import genai_config, unrolled_graph
from localdepth_export.onnx_graphs.weights import FILE_NAME, Layout, write_weights
from localdepth_export.tokenizer_record import read_license, read_tokenizer
from localdepth_train.checkpoint import CARRIED, Checkpoint
from localdepth_train.output import replacing, replacing_folder

__all__ = ["to_onnx"]

_CONFIG, _GENAI_CONFIG, _UNROLLED = "config.json", "genai_config.json", "model.onnx"
_FORMAT, _FORMAT_VERSION = "onnx", 1
_GRAPHS: Mapping[str, Callable[[ModelConfig, Layout], Builder]] = {
    "prelude.onnx": prelude_graph,
    "pass.onnx": pass_graph,
    "coda.onnx": coda_graph,
    "looped.onnx": looped_graph,
    "looped_exit.onnx": looped_exit_graph,
}
_QUANTS = {32: "F32", 16: "F16", 8: "INT8", 4: "INT4"}


def to_onnx(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    bits: int = 32,
    depth: int | None = None,
    source: str | None = None,
    license_name: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Export:
    """Write ``checkpoint`` as a folder of ONNX graphs.

    Norms and biases are stored as float32. Reads one tensor at a time and needs no torch.

    Args:
        checkpoint: directory of a published or own looped model.
        out: folder to write; it appears complete or not at all, in place of an older export.
        bits: of each number of a matrix: 32, 16 (float, computed in float32), 8 or 4 (in blocks that share a scale).
        depth: of the graph for onnxruntime-genai; None takes the model's default.
        source: where the checkpoint comes from; None takes the name of its directory.
        license_name: of the weights; None takes the one in the checkpoint's model card, if any.
        on_progress: told after each tensor how many of the model's numbers are done, and how many there are.
    Raises:
        ConfigError: unknown bits, or values that 16 bits cannot hold.
        DepthError: the model does not go to ``depth``.
        CheckpointError: the directory cannot be used, or holds values that are not finite.
        StorageError: the folder cannot be written, or holds something else.
    """
    opened = Checkpoint(checkpoint)
    config, layout = opened.config, Layout(opened.config, bits)
    unrolled_depth = config.check_depth(config.default_depth if depth is None else depth)
    tokenizer = read_tokenizer(opened)
    provenance = {
        "source": source or opened.path.resolve().name,
        "exporter": f"localdepth {version('localdepth')}",
        "quant": _QUANTS[bits],
    }
    if known := license_name or read_license(opened):
        provenance["license"] = known
    props = _graph_props(config, provenance)
    with replacing_folder(Path(out), _is_export) as folder:
        checksum = write_weights(folder / FILE_NAME, config, layout, _reader(opened, on_progress))
        for name, make in _GRAPHS.items():
            _write(folder / name, make(config, layout).model(Path(name).stem, props).SerializeToString())
        unrolled = unrolled_graph(config, layout, unrolled_depth)
        _write(folder / _UNROLLED, unrolled.model("unrolled", props).SerializeToString())
        for name, content in opened.carried().items():
            _write(folder / name, content)
        if tokenizer and tokenizer.chat_template:
            _write(folder / "chat_template.jinja", tokenizer.chat_template.encode())
        _write_json(folder / _GENAI_CONFIG, genai_config(config, unrolled_depth, _UNROLLED, tokenizer))
        _write_json(folder / _CONFIG, _record(config, bits, checksum, provenance, tokenizer))
    return Export(
        path=Path(out),
        kind=opened.kind,
        quant=provenance["quant"],
        fallbacks=(),
        n_bytes=sum(path.stat().st_size for path in Path(out).iterdir()),
        n_params=config.n_params,
        has_tokenizer=tokenizer is not None,
    )


def _reader(source: Checkpoint, on_progress: Callable[[int, int], None] | None) -> Callable[[str], F32]:
    """Reads tensors of the checkpoint one by one, and tells how far it has come."""
    done, shapes = 0, source.config.tensors()

    def read(name: str) -> F32:
        nonlocal done
        tensor = source.read(name)
        if not (np.isfinite(tensor.max()) and np.isfinite(tensor.min())):  # without a copy
            raise CheckpointError(f"{name} in {source.path} has values that are not finite; download it again")
        done += math.prod(shapes[name])
        if on_progress:
            on_progress(done, source.config.n_params)
        return tensor

    return read


def _record(
    config: ModelConfig, bits: int, checksum: str, provenance: Mapping[str, str], tokenizer: TokenizerRecord | None
) -> dict[str, Any]:
    """What ``config.json`` says; the words are those of a GGUF file's metadata."""
    special = {"bos": tokenizer.bos, "eos": tokenizer.eos, "add_bos": tokenizer.add_bos} if tokenizer else None
    return {
        "model_type": "localdepth",
        "format": _FORMAT,
        "format_version": _FORMAT_VERSION,
        "bits": bits,
        "checksum": checksum,
        "model": config.to_dict(),
        "tokenizer": special,
        "provenance": provenance,
        "check": {"status": CheckStatus.UNVERIFIED},
    }


def _graph_props(config: ModelConfig, provenance: Mapping[str, str]) -> dict[str, str]:
    """The same as text, under the keys of a GGUF file."""
    fields = {f"{NAMESPACE}{name}": json.dumps(value) for name, value in config.to_dict().items()}
    return fields | {f"{PROVENANCE}{name}": value for name, value in provenance.items()}


def _is_export(folder: Path) -> bool:
    """Whether a folder holds an older export and nothing else, as far as names tell."""
    try:
        record = json.loads((folder / _CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    known = {_CONFIG, _GENAI_CONFIG, _UNROLLED, FILE_NAME, *_GRAPHS, *CARRIED}
    is_ours = isinstance(record, dict) and record.get("format") == _FORMAT
    return is_ours and {path.name for path in folder.iterdir()} <= known


def _write_json(path: Path, record: Mapping[str, Any]) -> None:
    _write(path, (json.dumps(record, indent=2) + "\n").encode())


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as output:
        output.append(content)
