"""Write localdepth model files: tensor by tensor, and never half.

The gguf package encodes the header. Tensor data are written here, because ``GGUFWriter`` hands them to
``ndarray.tofile``, which forgets that its last buffered bytes did not fit on the disk and so leaves a model with a
hole in it.
"""

import hashlib
import io
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from mmap import mmap
from pathlib import Path

import numpy as np
from gguf.constants import GGUF_DEFAULT_ALIGNMENT, GGUFValueType
from gguf.gguf_writer import GGUFWriter, WriterState
from numpy.typing import NDArray

from localdepth.config import ModelConfig
from localdepth.errors import ConfigError
from localdepth.gguf import ARCHITECTURE, CHECK, FORMAT_VERSION, NAMESPACE, PROVENANCE, Key, read
from localdepth.gguf_container import MAGIC, Header, map_file, read_header, read_tensors
from localdepth.quant import Quant
from localdepth.record import PROVENANCE_KINDS, Check, Provenance, TokenizerRecord
from localdepth_train.output import replacing

__all__ = ["write", "write_check"]

_Plain = bool | int | float | str | tuple[int, ...] | tuple[float, ...] | tuple[str, ...]

_CHUNK_BYTES = 1 << 24
_NO_CHECKSUM = "0" * 64  # keeps the place in the header until the data are known
_KINDS = {  # float64, so that every setting comes back as it was
    bool: GGUFValueType.BOOL,
    int: GGUFValueType.UINT32,
    float: GGUFValueType.FLOAT64,
    str: GGUFValueType.STRING,
}


def write(
    path: str | os.PathLike[str],
    config: ModelConfig,
    quants: Mapping[str, Quant],
    tensors: Iterable[tuple[str, NDArray[np.uint8]]],
    *,
    tokenizer: TokenizerRecord | None = None,
    provenance: Provenance | None = None,
    check: Check | None = None,
) -> None:
    """Write a model file, holding one tensor in memory at a time.

    Args:
        path: the file to make or to replace; its mode is kept, a symbolic link is followed.
        quants: how each tensor of ``config.tensors()`` is stored.
        tensors: name and stored bytes of each tensor, in the order of ``config.tensors()``; pulled one by one.
    Raises:
        ConfigError: tensors, quants, token ids or provenance do not fit the model.
        StorageError: the file cannot be written; what ``tensors`` raises passes unchanged.
    """
    shapes = config.tensors()
    _check_quants(shapes, quants)
    values: dict[str, _Plain] = {Key.FORMAT_VERSION: FORMAT_VERSION, Key.CHECKSUM: _NO_CHECKSUM}
    values |= {f"{NAMESPACE}{name}": value for name, value in config.to_dict().items()}
    values |= _provenance_values(provenance or {})
    values |= _check_values(check) if check else {}
    values |= _tokenizer_values(tokenizer, config.n_vocab) if tokenizer else {}
    header = _encode(values, {name: (shape, quants[name]) for name, shape in shapes.items()})
    with replacing(Path(path), _is_gguf) as output:
        output.append(header)
        output.pad(GGUF_DEFAULT_ALIGNMENT)
        stream, checksum = iter(tensors), hashlib.sha256()
        for name, shape in shapes.items():
            data = _next(stream, name, quants[name].n_bytes(shape))
            checksum.update(data)
            output.append(data)
            del data  # before the next is made
            output.pad(GGUF_DEFAULT_ALIGNMENT)
        for name, _ in stream:
            raise ConfigError(f"tensor {name} comes after the last one of the model")
        output.overwrite(header.index(_NO_CHECKSUM.encode()), checksum.hexdigest().encode())


def write_check(path: str | os.PathLike[str], check: Check) -> None:
    """Put ``check`` into a model file in place of the one it has; all else stays byte for byte.

    Raises:
        ModelFileError: not a sound model file.
        StorageError: the new file cannot be written; the old one stays.
    """
    _replace_keys(Path(path), CHECK, _check_values(check))


def _replace_keys(path: Path, prefix: str, values: Mapping[str, _Plain]) -> None:
    read(path).close()  # refuses what must not be trusted
    encoded = _encode(values, {})
    added = _entries(encoded, read_header(encoded, keep=_nothing))
    with replacing(path, _is_gguf) as output, map_file(path) as buffer:
        header = read_header(buffer, keep=_nothing)
        table = read_tensors(buffer, header)
        entries = {key: raw for key, raw in _entries(buffer, header).items() if not key.startswith(prefix)}
        entries |= {key: raw for key, raw in added.items() if key.startswith(prefix)}
        output.append(buffer[:16])  # magic, version, number of tensors
        output.append(struct.pack("<Q", len(entries)) + b"".join(entries.values()))
        output.append(buffer[header.end : table.end])
        output.pad(header.alignment)
        for start in range(table.data_start, len(buffer), _CHUNK_BYTES):
            output.append(buffer[start : start + _CHUNK_BYTES])


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _entries(buffer: mmap | bytes, header: Header) -> dict[str, bytes]:
    """The encoded metadata, key by key."""
    return {key: buffer[entry.start : entry.end] for key, entry in header.entries.items()}


def _nothing(key: str) -> bool:
    return False


def _check_quants(shapes: Mapping[str, tuple[int, ...]], quants: Mapping[str, Quant]) -> None:
    if differing := sorted(set(shapes) ^ set(quants)):
        raise ConfigError(f"the quants do not name the tensors of the model: {', '.join(differing[:3])}")
    for name, shape in shapes.items():
        if not quants[name].fits(shape):
            raise ConfigError(f"tensor {name} of shape {list(shape)} cannot be stored as {quants[name]}; use F32")


def _tokenizer_values(tokenizer: TokenizerRecord, n_vocab: int) -> dict[str, _Plain]:
    tokenizer.check_ids(n_vocab)
    values: dict[str, _Plain | None] = {
        Key.TOKENIZER_JSON: tokenizer.json,
        Key.BOS_ID: tokenizer.bos,
        Key.EOS_ID: tokenizer.eos[0] if tokenizer.eos else None,
        Key.EOS_IDS: tokenizer.eos if len(tokenizer.eos) > 1 else None,
        Key.ADD_BOS: tokenizer.add_bos,
        Key.CHAT_TEMPLATE: tokenizer.chat_template,
    }
    return {key: value for key, value in values.items() if value is not None}


def _provenance_values(provenance: Provenance) -> dict[str, _Plain]:
    for name, value in provenance.items():
        kind = PROVENANCE_KINDS.get(name)
        if kind is None:
            raise ConfigError(f"provenance {name!r} is not one of {', '.join(PROVENANCE_KINDS)}")
        if not isinstance(value, kind):
            raise ConfigError(f"provenance {name}={value!r} is not a {kind.__name__}")
    return {f"{PROVENANCE}{name}": value for name, value in provenance.items()}


def _check_values(check: Check) -> dict[str, _Plain]:
    return {
        f"{CHECK}status": str(check.status),
        f"{CHECK}depths": tuple(map(int, check.depths)),
        f"{CHECK}max_abs": tuple(map(float, check.max_abs)),
        f"{CHECK}kl": tuple(map(float, check.kl)),
        f"{CHECK}top1": tuple(map(float, check.top1)),
    }


def _encode(values: Mapping[str, _Plain], tensors: Mapping[str, tuple[tuple[int, ...], Quant]]) -> bytes:
    """Header, metadata and tensor records of a file; empty arrays, which the format lacks, are left out."""
    writer = GGUFWriter(None, ARCHITECTURE)
    for key, value in values.items():
        if not isinstance(value, tuple):
            writer.add_key_value(key, value, _KINDS[type(value)])
        elif value:
            writer.add_key_value(key, value, GGUFValueType.ARRAY, sub_type=_KINDS[type(value[0])])
    for name, (shape, quant) in tensors.items():
        row = (*shape[:-1], shape[-1] // quant.block * quant.block_bytes)
        writer.add_tensor_info(name, row, np.dtype(np.uint8), quant.n_bytes(shape), raw_dtype=quant.ggml_type)
    buffer = io.BytesIO()
    writer.fout, writer.state = [io.BufferedWriter(buffer)], WriterState.EMPTY  # into memory, not into a file
    writer.write_header_to_file()
    try:
        writer.write_kv_data_to_file()
    except UnicodeEncodeError as error:
        raise ConfigError(f"a text of the tokenizer or the provenance is not Unicode: {error.reason}") from None
    writer.write_ti_data_to_file()
    return buffer.getvalue()


def _next(stream: Iterator[tuple[str, NDArray[np.uint8]]], name: str, n_bytes: int) -> memoryview:
    given, data = next(stream, (None, None))
    if data is None or given != name:
        raise ConfigError(f"tensor {name} comes next in the file, {given or 'nothing'} was given")
    if data.dtype != np.uint8 or data.nbytes != n_bytes:
        raise ConfigError(f"tensor {name} needs {n_bytes} bytes of uint8, got {data.nbytes} of {data.dtype}")
    return np.ascontiguousarray(data).data
