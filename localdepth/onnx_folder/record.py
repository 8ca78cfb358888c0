"""What ``config.json`` of an ONNX folder says. All keys are always present:

model_type, format, format_version   "localdepth", "onnx", 1
model                                every field of ``ModelConfig``
bits                                 of the numbers of each matrix, by name
checksums                            SHA-256 of weights, graphs, tokenizer and chat template, by file name
tokenizer                            bos, eos, add_bos as in ``TokenizerRecord``, or null
provenance                           see ``PROVENANCE_KINDS``
check                                the fields of ``Check``, or null

Every graph says the model's fields, too, among its properties: see ``as_properties``.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from localdepth.config import ModelConfig
from localdepth.errors import ConfigError
from localdepth.onnx_folder.layout import WEIGHTS
from localdepth.onnx_folder.ports import STAGE_GRAPHS
from localdepth.record import PROVENANCE_KINDS, Check, CheckStatus, Provenance, TokenizerRecord

__all__ = [
    "CHAT_TEMPLATE",
    "CONFIG",
    "FORMAT",
    "FORMAT_VERSION",
    "TOKENIZER",
    "OnnxRecord",
    "as_properties",
    "from_properties",
    "graph_file",
]

CONFIG, TOKENIZER, CHAT_TEMPLATE = "config.json", "tokenizer.json", "chat_template.jinja"
FORMAT, FORMAT_VERSION = "onnx", 1

_MODEL_TYPE = "localdepth"
_PROPERTY = f"{_MODEL_TYPE}."  # before the name of a field
_KEYS = (
    *("model_type", "format", "format_version", "model", "bits"),
    *("checksums", "tokenizer", "provenance", "check"),
)
_MAX_OPTION = 40  # characters; no option is called longer
_MAX_CHECKSUMS = 64
_T = TypeVar("_T")


def graph_file(name: str) -> str:
    """The file of a graph."""
    return f"{name}.onnx"


def as_properties(config: ModelConfig) -> dict[str, str]:
    """What a graph says of its model: every field in JSON, under its key in a GGUF file."""
    return {f"{_PROPERTY}{name}": json.dumps(value) for name, value in config.to_dict().items()}


def from_properties(said: Mapping[str, str]) -> ModelConfig:
    """Inverse of ``as_properties``; whatever else is said is passed over.

    Raises:
        ConfigError: missing or damaged fields.
    """
    names = [item.name for item in fields(ModelConfig) if f"{_PROPERTY}{item.name}" in said]
    try:
        values = {name: json.loads(said[f"{_PROPERTY}{name}"]) for name in names}
    except (ValueError, RecursionError):
        raise ConfigError("a field of the model is not JSON") from None
    return ModelConfig.from_dict({name: _short(value) for name, value in values.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxRecord:
    """What ``config.json`` says, and the tokenizer beside it.

    Attributes:
        bits: of the numbers of each matrix, by name.
        checksums: SHA-256 in hex of ``weights.bin``, the graphs, and the texts of the tokenizer, by file name.
    """

    config: ModelConfig
    bits: Mapping[str, int]
    checksums: Mapping[str, str]
    tokenizer: TokenizerRecord | None
    provenance: Provenance
    check: Check | None

    def to_dict(self) -> dict[str, Any]:
        """The contents of ``config.json``."""
        tokenizer = self.tokenizer
        return {
            "model_type": _MODEL_TYPE,
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "model": self.config.to_dict(),
            "bits": dict(self.bits),
            "checksums": dict(self.checksums),
            "tokenizer": tokenizer and {"bos": tokenizer.bos, "eos": list(tokenizer.eos), "add_bos": tokenizer.add_bos},
            "provenance": dict(self.provenance),
            "check": None if self.check is None else asdict(self.check),
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "OnnxRecord":
        """Inverse of ``to_dict``, but for the texts of the tokenizer, which lie beside it.

        Raises:
            ConfigError: missing or unknown keys, wrong types, or values that contradict each other.
        """
        _check_keys(CONFIG, record, _KEYS)
        sizes = _get(record, "model", dict)
        config = ModelConfig.from_dict({name: _short(value) for name, value in sizes.items()})
        return cls(
            config=config,
            bits=_bits(record, config),
            checksums=_checksums(record),
            tokenizer=_tokenizer(record, config.n_vocab),
            provenance=_provenance(record),
            check=_check(record),
        )


def _check_keys(where: str, record: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    if wrong := [name for name in record if name not in keys]:
        raise ConfigError(f"{where} has an unknown key {wrong[0]!r:.80}, written by a newer version of localdepth?")
    if missing := [name for name in keys if name not in record]:
        raise ConfigError(f"{where} has no key {missing[0]!r}")


def _get(record: Mapping[str, Any], key: str, kind: type[_T]) -> _T:
    value = record[key]
    if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
        raise ConfigError(f"{key} is of type {type(value).__name__}, not {kind.__name__}")
    return value


def _list(record: Mapping[str, Any], key: str, kind: type[_T]) -> tuple[_T, ...]:
    values = _get(record, key, list)
    return tuple(_get({key: value}, key, kind) for value in values)


def _short(value: Any) -> Any:
    """A value fit for a message."""
    return value[:_MAX_OPTION] if isinstance(value, str) else value


def _bits(record: Mapping[str, Any], config: ModelConfig) -> dict[str, int]:
    bits = _get(record, "bits", dict)
    n_layers = config.n_prelude + config.n_core + config.n_coda
    if n_layers > len(bits):  # before thousands of names are made up
        raise ConfigError(f"{n_layers} layers cannot be made of {len(bits)} matrices")
    return {name: _get(bits, name, int) for name in bits}


def _checksums(record: Mapping[str, Any]) -> dict[str, str]:
    checksums = _get(record, "checksums", dict)
    texts = [] if record["tokenizer"] is None else [TOKENIZER]
    needed = (WEIGHTS, *map(graph_file, STAGE_GRAPHS), *texts)
    if missing := [name for name in needed if name not in checksums]:
        raise ConfigError(f"checksums has none for {missing[0]}")
    if len(checksums) > _MAX_CHECKSUMS or any(Path(name).name != name or "\0" in name for name in checksums):
        raise ConfigError("checksums names more than the files of a folder")
    return {name: _get(checksums, name, str) for name in checksums}


def _tokenizer(record: Mapping[str, Any], n_vocab: int) -> TokenizerRecord | None:
    if record["tokenizer"] is None:
        return None
    special = _get(record, "tokenizer", dict)
    _check_keys("tokenizer", special, ("bos", "eos", "add_bos"))
    tokenizer = TokenizerRecord(
        json="",
        bos=None if special["bos"] is None else _get(special, "bos", int),
        eos=_list(special, "eos", int),
        add_bos=_get(special, "add_bos", bool),
    )
    tokenizer.check_ids(n_vocab)
    return tokenizer


def _provenance(record: Mapping[str, Any]) -> Provenance:
    said = _get(record, "provenance", dict)
    if unknown := [name for name in said if name not in PROVENANCE_KINDS]:
        raise ConfigError(f"provenance has an unknown key {unknown[0]!r:.80}")
    return {name: _get(said, name, str) if PROVENANCE_KINDS[name] is str else _list(said, name, str) for name in said}


def _check(record: Mapping[str, Any]) -> Check | None:
    if record["check"] is None:
        return None
    said = _get(record, "check", dict)
    _check_keys("check", said, tuple(item.name for item in fields(Check)))
    status = _get(said, "status", str)
    if status not in list(CheckStatus):
        raise ConfigError(f"check.status={status!r:.40} is not one of {', '.join(CheckStatus)}")
    return Check(
        CheckStatus(status),
        depths=_list(said, "depths", int),
        max_abs=_list(said, "max_abs", float),
        kl=_list(said, "kl", float),
        top1=_list(said, "top1", float),
    )
