"""A model as a folder of ONNX graphs over one file of weights, and nothing of it that was not checked.

    config.json                      the record: what the model is, how it is stored, where it comes from
    prelude.onnx pass.onnx coda.onnx the graphs of our engine, see ``ports``
    weights.bin                      what all graphs share, see ``layout``
    tokenizer.json                   where the record names a tokenizer
    chat_template.jinja              where it has a checksum of one

Whatever else lies there is for other programs and not read. Graphs and texts have the checksums of the record. ONNX
Runtime gets the bytes of graphs as they were checked; of the weights it reads what these point to, pieces of a file
that has the right length.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localdepth.config import ModelConfig
from localdepth.errors import ConfigError, ModelFileError
from localdepth.gguf_container import map_file
from localdepth.onnx_folder.graph import check_graph
from localdepth.onnx_folder.layout import QUANTS, WEIGHTS, Layout, Piece, from_blocks, scales_of
from localdepth.onnx_folder.ports import STAGE_GRAPHS
from localdepth.onnx_folder.record import (
    CHAT_TEMPLATE,
    CONFIG,
    FORMAT,
    FORMAT_VERSION,
    TOKENIZER,
    OnnxRecord,
    graph_file,
)
from localdepth.record import Check, Provenance, TokenizerRecord

__all__ = ["OnnxFolder", "is_folder", "read"]

_AGAIN = "export it again: localdepth export onnx CHECKPOINT -o FOLDER"

# Far beyond any real file; they bound the time a hostile one can take.
_MAX_RECORD, _MAX_GRAPH, _MAX_TEXT = 1 << 22, 1 << 22, 1 << 28  # bytes
_CHUNK = 1 << 22


@dataclass(eq=False, slots=True)
class OnnxFolder:
    """An open folder. Use it as a context manager, or ``close`` it.

    Attributes:
        graphs: the bytes of those of our engine, by name: prelude, pass, coda.
        layout: where each weight lies.
    """

    path: Path
    record: OnnxRecord
    graphs: Mapping[str, bytes]
    layout: Layout
    _weights: mmap | None = field(repr=False)

    @property
    def config(self) -> ModelConfig:
        return self.record.config

    @property
    def tokenizer(self) -> TokenizerRecord | None:
        return self.record.tokenizer

    @property
    def provenance(self) -> Provenance:
        return self.record.provenance

    @property
    def check(self) -> Check | None:
        return self.record.check

    @property
    def checksum(self) -> str:
        return self.record.checksums[WEIGHTS]

    @property
    def tensors(self) -> Mapping[str, Piece]:
        return self.layout

    @property
    def n_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.path.iterdir() if path.is_file())

    @property
    def bytes_by_quant(self) -> dict[str, int]:
        by_quant: dict[str, int] = {}
        for name in self.config.tensors():
            quant = QUANTS[self.layout.bits[name]]
            parts = [name, scales_of(name)] if self.layout.is_blocks(name) else [name]
            by_quant[quant] = by_quant.get(quant, 0) + sum(self.layout[part].n_bytes for part in parts)
        return by_quant

    def stored(self, name: str) -> NDArray[Any]:
        """A piece of the weights file, a read-only view."""
        if self._weights is None:
            raise ModelFileError(f"{self.path} is closed; read it again")
        piece = self.layout[name]
        view: NDArray[Any] = np.ndarray(piece.shape, piece.dtype, self._weights, piece.offset)
        return view

    def array(self, name: str) -> NDArray[np.float32]:
        """Numbers of a tensor: float32 in its shape, in memory of their own."""
        stored = self.stored(name)
        if self.layout.is_blocks(name):
            scales, n_columns = self.stored(scales_of(name)), self.config.tensors()[name][1]
            return from_blocks(stored, scales, n_columns, self.layout.bits[name])
        return stored.astype(np.float32)

    def is_intact(self) -> bool:
        """Whether weights, graphs and tokenizer are those that were written. Reads all of them."""
        return all(_digest(self.path / name) == wanted for name, wanted in self.record.checksums.items())

    def close(self) -> None:
        """Let go of the files; views handed out stay valid."""
        self._weights = None

    def __enter__(self) -> "OnnxFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a directory claims to be one of ours, whole or not."""
    path = Path(path)
    if (path / WEIGHTS).exists() and (path / graph_file("pass")).exists():
        return True
    try:
        return _read_record(path).get("format") == FORMAT
    except ModelFileError:
        return False


def read(path: str | os.PathLike[str]) -> OnnxFolder:
    """Open a folder and check all it says; weights are mapped, not loaded.

    Raises:
        ModelFileError: missing, unreadable, damaged, foreign, or from another version; the message says what to do.
    """
    path = Path(path)
    record = _read_record(path)
    if record.get("format") != FORMAT:
        raise ModelFileError(
            f"{path} is not a folder of ours: {CONFIG} has no format {FORMAT!r}; make one of a checkpoint with: "
            f"localdepth export onnx {path} -o FOLDER"
        )
    if record.get("format_version") != FORMAT_VERSION:
        raise ModelFileError(
            f"{path}: format_version={record.get('format_version')!r:.40} is not {FORMAT_VERSION}; "
            "upgrade localdepth or export the model again"
        )
    try:
        return _interpret(path, record)
    except (ConfigError, ModelFileError) as error:
        raise ModelFileError(f"{path}: {error}; {_AGAIN}") from None


def _interpret(path: Path, record: Mapping[str, Any]) -> OnnxFolder:
    known = OnnxRecord.from_dict(record)
    known = replace(known, tokenizer=_read_tokenizer(path, known))
    layout = Layout(known.config, known.bits)
    graphs = {name: _read_graph(path / graph_file(name), name, known, layout) for name in STAGE_GRAPHS}
    weights = map_file(_inside(path / WEIGHTS))
    if len(weights) != layout.end:
        n_bytes = len(weights)
        weights.close()
        raise ModelFileError(f"{WEIGHTS} has {n_bytes} bytes, a model of these sizes {layout.end}")
    return OnnxFolder(path, known, graphs, layout, weights)


def _read_tokenizer(folder: Path, record: OnnxRecord) -> TokenizerRecord | None:
    """The tokenizer of a record, with its texts."""
    if record.tokenizer is None:
        return None
    template = _read_text(folder / CHAT_TEMPLATE, record) if CHAT_TEMPLATE in record.checksums else None
    return replace(record.tokenizer, json=_read_text(folder / TOKENIZER, record), chat_template=template)


def _read_graph(path: Path, name: str, record: OnnxRecord, layout: Layout) -> bytes:
    raw = _read_written(path, _MAX_GRAPH, record)
    try:
        check_graph(raw, name, record.config, layout)
    except (ConfigError, ModelFileError) as error:
        raise ModelFileError(f"{path.name}: {error}") from None
    return raw


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        record = json.loads(_read_bytes(path, _MAX_RECORD))
        json.dumps(record, ensure_ascii=False).encode()  # half a character would stop whoever prints it
    except (ValueError, RecursionError):
        raise ModelFileError(f"{path} is not JSON, it is damaged; {_AGAIN}") from None
    if not isinstance(record, dict):
        raise ModelFileError(f"{path} holds no record; {_AGAIN}")
    return record


def _read_text(path: Path, record: OnnxRecord) -> str:
    try:
        return _read_written(path, _MAX_TEXT, record).decode()
    except UnicodeDecodeError:
        raise ModelFileError(f"{path.name} is not UTF-8") from None


def _read_written(path: Path, limit: int, record: OnnxRecord) -> bytes:
    """A small file, as it was when the record was made."""
    raw = _read_bytes(path, limit)
    if hashlib.sha256(raw).hexdigest() != record.checksums[path.name]:
        raise ModelFileError(f"{path.name} is not what its checksum says, it was damaged or changed")
    return raw


def _read_bytes(path: Path, limit: int) -> bytes:
    """A whole small file."""
    with map_file(_inside(path)) as buffer:
        if len(buffer) > limit:
            raise ModelFileError(f"{path} has {len(buffer)} bytes, over {limit}; do not use this folder")
        return bytes(buffer)


def _inside(path: Path) -> Path:
    """The path itself, if it does not lead out of its folder."""
    try:
        leads_out = path.is_symlink() and path.resolve().parent != path.parent.resolve()
    except (OSError, RuntimeError, ValueError):  # a circle of links, a null character
        leads_out = True
    if leads_out:
        raise ModelFileError(f"{path} is a link out of its folder; copy the file itself there")
    return path


def _digest(path: Path) -> str:
    """SHA-256 of a file; nothing where it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(_inside(path), "rb", buffering=0) as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except (OSError, ModelFileError):
        return ""
    return digest.hexdigest()
