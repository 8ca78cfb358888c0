"""What a localdepth model file says: its keys, its tensors, and nothing that was not checked.

A file is GGUF with ``general.architecture = "localdepth"``:

    localdepth.format_version    1
    localdepth.checksum          SHA-256 of the tensors' bytes, see ``GgufFile.is_intact``; optional
    localdepth.<field>           every field of ``ModelConfig``
    localdepth.provenance.<name> where the weights come from, see ``PROVENANCE_KINDS``
    localdepth.check.<field>     comparison with the reference, see ``Check``
    localdepth.router.<name>     reserved, handed on as it is
    tokenizer.*                  see ``TokenizerRecord``; optional

and one tensor for each name of ``ModelConfig.tensors()``, the core once. An unknown key under
``localdepth.`` is an error; keys of other namespaces are ignored. The writer imports every key from here.
"""

import hashlib
import math
import mmap as mapping
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from mmap import PAGESIZE, mmap
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from gguf.constants import Keys
from gguf.quants import dequantize
from numpy.typing import NDArray

from localdepth.config import PLAIN_MODELS, ModelConfig, plain_model
from localdepth.errors import ConfigError, ModelFileError
from localdepth.gguf_container import StoredTensor, Value, damaged, map_file, read_header, read_tensors
from localdepth.quant import Quant
from localdepth.record import PROVENANCE_KINDS, Check, CheckStatus, Provenance, TokenizerRecord

__all__ = [
    "ARCHITECTURE",
    "CHECK",
    "FORMAT_VERSION",
    "NAMESPACE",
    "PROVENANCE",
    "ROUTER",
    "GgufFile",
    "Key",
    "TensorInfo",
    "read",
]

ARCHITECTURE = "localdepth"
FORMAT_VERSION = 1
NAMESPACE = f"{ARCHITECTURE}."
PROVENANCE = f"{NAMESPACE}provenance."
CHECK = f"{NAMESPACE}check."
ROUTER = f"{NAMESPACE}router."

_MAX_SHOWN = 3  # names in a message
_MAX_OPTION = 40  # characters; no option is called longer
_T = TypeVar("_T")


class Key(StrEnum):
    """Keys of fixed name; the others are a prefix and a field."""

    ARCHITECTURE = Keys.General.ARCHITECTURE
    FORMAT_VERSION = f"{NAMESPACE}format_version"
    CHECKSUM = f"{NAMESPACE}checksum"
    TOKENIZER_JSON = Keys.Tokenizer.HF_JSON
    BOS_ID = Keys.Tokenizer.BOS_ID
    EOS_ID = Keys.Tokenizer.EOS_ID
    EOS_IDS = "tokenizer.ggml.eos_token_ids"  # ours: models with several ends of text
    ADD_BOS = Keys.Tokenizer.ADD_BOS
    CHAT_TEMPLATE = Keys.Tokenizer.CHAT_TEMPLATE


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: row-major shape ``[out, in]`` or ``[n]``, ``n_bytes`` bytes at byte ``offset`` of the file."""

    name: str
    shape: tuple[int, ...]
    quant: Quant
    offset: int
    n_bytes: int


@dataclass(eq=False, slots=True)
class GgufFile:
    """An open model file. Use it as a context manager, or ``close`` it."""

    path: Path
    config: ModelConfig
    tensors: Mapping[str, TensorInfo]
    tokenizer: TokenizerRecord | None
    provenance: Provenance
    check: Check | None
    router: Mapping[str, Value]
    checksum: str | None
    _buffer: mmap | None = field(repr=False)

    def mapped(self) -> NDArray[np.uint8]:
        """The whole file as bytes: uint8, a read-only view; tensors begin at their ``offset``."""
        return np.frombuffer(self._open(), np.uint8)

    def data(self, name: str) -> NDArray[np.uint8]:
        """Stored bytes of a tensor: ``[n_bytes]`` uint8, a read-only view into the file."""
        info = self.tensors[name]
        return np.frombuffer(self._open(), np.uint8, info.n_bytes, info.offset)

    def let_go(self, name: str) -> None:
        """Take the pages of a tensor out of our memory, where the system can; reading it again brings them back."""
        info, advice = self.tensors[name], getattr(mapping, "MADV_DONTNEED", None)
        first = -(-info.offset // PAGESIZE) * PAGESIZE
        n_bytes = (info.offset + info.n_bytes - first) // PAGESIZE * PAGESIZE
        if advice is not None and n_bytes > 0:
            self._open().madvise(advice, first, n_bytes)

    def _open(self) -> mmap:
        if self._buffer is None:
            raise ModelFileError(f"{self.path} is closed; read it again")
        return self._buffer

    def array(self, name: str) -> NDArray[np.float32]:
        """Numbers of a tensor: float32 in its row-major shape, in memory of their own."""
        info = self.tensors[name]
        rows = self.data(name).reshape(math.prod(info.shape[:-1]), -1)
        values = dequantize(rows, info.quant.ggml_type)
        return np.require(values, np.float32, ["C", "W"]).reshape(info.shape)

    def is_intact(self) -> bool | None:
        """Whether the weights are those that were written; None where the file does not say. Reads all of them."""
        if self.checksum is None:
            return None
        digest = hashlib.sha256()
        for name in self.config.tensors():
            digest.update(self.data(name).data)
            self.let_go(name)
        return digest.hexdigest() == self.checksum

    @property
    def n_bytes(self) -> int:
        return self.path.stat().st_size

    @property
    def bytes_by_quant(self) -> dict[str, int]:
        by_quant: dict[str, int] = {}
        for info in self.tensors.values():
            by_quant[info.quant] = by_quant.get(info.quant, 0) + info.n_bytes
        return by_quant

    def close(self) -> None:
        """Let go of the file; views handed out by ``data`` stay valid and keep it mapped until they die."""
        self._buffer = None

    def __enter__(self) -> "GgufFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read(path: str | os.PathLike[str]) -> GgufFile:
    """Open a model file and check all it says; tensor data are mapped, not loaded.

    Raises:
        ModelFileError: missing, unreadable, damaged, foreign, or from another version; the message says what to do.
    """
    path = Path(path)
    buffer = map_file(path)
    try:
        return _interpret(path, buffer)
    except ConfigError as error:
        buffer.close()
        raise ModelFileError(f"{path}: {error}; export the model again") from None
    except ModelFileError as error:
        buffer.close()
        raise ModelFileError(f"{path}: {error}") from None


def _interpret(path: Path, buffer: mmap) -> GgufFile:
    header = read_header(buffer, keep=_is_read)
    values = {key: entry.value for key, entry in header.entries.items() if entry.value is not None}
    _refuse_foreign(values)
    config = _config(values)
    table = read_tensors(buffer, header)
    return GgufFile(
        path=path,
        config=config,
        tensors=_tensors(config, table.tensors, table.data_start),
        tokenizer=_tokenizer(values, config.n_vocab),
        provenance=_provenance(values),
        check=_check(values),
        router={key.removeprefix(ROUTER): value for key, value in values.items() if key.startswith(ROUTER)},
        checksum=_get(values, Key.CHECKSUM, str),
        _buffer=buffer,
    )


# Every key read from a file; others outside our namespace are only stepped over.
_FIXED = frozenset(str(key) for key in Key)
_KNOWN = _FIXED.union(
    (f"{NAMESPACE}{item.name}" for item in fields(ModelConfig)),
    (f"{PROVENANCE}{name}" for name in PROVENANCE_KINDS),
    (f"{CHECK}{item.name}" for item in fields(Check)),
)


def _is_read(key: str) -> bool:
    return key.startswith(NAMESPACE) or key in _FIXED


def _refuse_foreign(values: Mapping[str, Value]) -> None:
    """Refuse other architectures, other versions, and keys of ours that we do not know."""
    architecture = _get(values, Key.ARCHITECTURE, str) or "none"
    if architecture.startswith(PLAIN_MODELS):
        raise ModelFileError(f"this is a {plain_model(architecture, 'BASE, its original checkpoint,')}")
    if architecture != ARCHITECTURE:
        raise ModelFileError(
            f"architecture {architecture!r:.40} is not {ARCHITECTURE!r}; pass a file made by `localdepth export gguf`"
        )
    version = _get(values, Key.FORMAT_VERSION, int)
    if version != FORMAT_VERSION:
        raise ModelFileError(
            f"{Key.FORMAT_VERSION}={version} is not {FORMAT_VERSION}; upgrade localdepth or export the model again"
        )
    ours = [key for key in values if key.startswith(NAMESPACE) and not key.startswith(ROUTER)]
    if unknown := [key for key in ours if key not in _KNOWN]:
        raise ModelFileError(f"unknown keys {_some(unknown)}; upgrade localdepth or export the model again")


def _config(values: Mapping[str, Value]) -> ModelConfig:
    record: dict[str, Any] = {}
    for item in fields(ModelConfig):
        value = values.get(f"{NAMESPACE}{item.name}")
        if isinstance(value, tuple | np.ndarray):
            raise ConfigError(f"{NAMESPACE}{item.name} is an array, not one value")
        if value is not None:
            record[item.name] = value[:_MAX_OPTION] if isinstance(value, str) else value
    return ModelConfig.from_dict(record)


def _tensors(config: ModelConfig, stored: Mapping[str, StoredTensor], data_start: int) -> dict[str, TensorInfo]:
    """The tensors in the order of ``config.tensors()``, each of the shape and kind the model needs."""
    n_layers = config.n_prelude + config.n_core + config.n_coda
    if n_layers > len(stored):  # before thousands of names are made up
        raise damaged(f"{n_layers} layers cannot be made of {len(stored)} tensors")
    shapes = config.tensors()
    if missing := [name for name in shapes if name not in stored]:
        raise damaged(f"missing tensors {_some(missing)}")
    if surplus := [name for name in stored if name not in shapes]:
        raise damaged(f"tensors {_some(surplus)} do not belong to a model of these sizes")
    if wrong := [name for name in shapes if stored[name].shape != shapes[name]]:
        have, need = stored[wrong[0]].shape, shapes[wrong[0]]
        raise damaged(f"tensors {_some(wrong)} have other shapes than the model, {list(have)} instead of {list(need)}")
    return {name: _tensor(stored[name], data_start) for name in shapes}


def _tensor(stored: StoredTensor, data_start: int) -> TensorInfo:
    try:
        quant = Quant(stored.ggml_type.name)
    except ValueError:
        raise ModelFileError(
            f"tensor {stored.name!r} is stored as {stored.ggml_type.name}; export the model again as one of "
            f"{', '.join(Quant)}"
        ) from None
    if not quant.fits(stored.shape):
        raise ModelFileError(
            f"tensor {stored.name!r} is a norm or a bias and stored as {quant}, not F32; export it again"
        )
    return TensorInfo(stored.name, stored.shape, quant, data_start + stored.offset, stored.n_bytes)


def _tokenizer(values: Mapping[str, Value], n_vocab: int) -> TokenizerRecord | None:
    json = _get(values, Key.TOKENIZER_JSON, str)
    if json is None:
        return None
    eos = _get(values, Key.EOS_ID, int)
    record = TokenizerRecord(
        json=json,
        bos=_get(values, Key.BOS_ID, int),
        eos=_array(values, Key.EOS_IDS, "iu") or (() if eos is None else (eos,)),
        add_bos=_get(values, Key.ADD_BOS, bool) or False,
        chat_template=_get(values, Key.CHAT_TEMPLATE, str),
    )
    record.check_ids(n_vocab)
    return record


def _provenance(values: Mapping[str, Value]) -> Provenance:
    found = ((name, _get(values, f"{PROVENANCE}{name}", kind)) for name, kind in PROVENANCE_KINDS.items())
    return {name: value for name, value in found if value is not None}


def _check(values: Mapping[str, Value]) -> Check | None:
    if not any(key.startswith(CHECK) for key in values):
        return None
    status = _get(values, f"{CHECK}status", str)
    if status not in list(CheckStatus):
        raise ConfigError(f"{CHECK}status={status!r:.40} is not one of {', '.join(CheckStatus)}")
    return Check(
        CheckStatus(status),
        depths=_array(values, f"{CHECK}depths", "iu"),
        max_abs=_array(values, f"{CHECK}max_abs", "f"),
        kl=_array(values, f"{CHECK}kl", "f"),
        top1=_array(values, f"{CHECK}top1", "f"),
    )


def _get(values: Mapping[str, Value], key: str, kind: type[_T]) -> _T | None:
    """The value of ``key``, or None where the file has no such key."""
    value = values.get(key)
    if value is None:
        return None
    if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
        raise ConfigError(f"{key} is of type {type(value).__name__}, not {kind.__name__}")
    return value


def _array(values: Mapping[str, Value], key: str, kinds: str) -> tuple[Any, ...]:
    """The numbers of an array, or () where the file has no such key; ``kinds`` are numpy's letters."""
    value = values.get(key, np.empty(0, kinds[0]))
    if not isinstance(value, np.ndarray) or value.dtype.kind not in kinds:
        raise ConfigError(f"{key} is not an array of {'integers' if 'i' in kinds else 'floats'}")
    return tuple(value.tolist())


def _some(names: list[str]) -> str:
    more = len(names) - _MAX_SHOWN
    return ", ".join(names[:_MAX_SHOWN]) + (f" and {more} more" if more > 0 else "")
