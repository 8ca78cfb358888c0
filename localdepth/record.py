"""What a model file says of itself besides its sizes and weights: provenance, check, tokenizer.

The same words in GGUF files and ONNX folders; ``gguf`` and ``onnx_folder`` say how each writes them down.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from localdepth.config import ModelConfig
from localdepth.errors import ConfigError

__all__ = [
    "PROVENANCE_KINDS",
    "Check",
    "CheckStatus",
    "ModelFile",
    "Provenance",
    "StoredSize",
    "TokenizerRecord",
    "quant_of",
    "summary",
]

Provenance = Mapping[str, str | tuple[str, ...]]
PROVENANCE_KINDS: Mapping[str, type[str] | type[tuple[str, ...]]] = {
    **dict.fromkeys(("source", "license", "exporter", "quant", "importance"), str),
    "fallbacks": tuple,  # of "tensor: Q8_0 -> F16"
}


class CheckStatus(StrEnum):
    """What comparing the file with the reference gave."""

    VERIFIED = "verified"
    FAILED = "failed"
    UNVERIFIED = "unverified"  # nobody compared it


@dataclass(frozen=True, slots=True)
class Check:
    """Logits of the file against the reference, depth by depth.

    ``max_abs`` is the largest difference, ``kl`` the mean KL divergence in nats, ``top1`` the share of
    positions with the same best token.
    """

    status: CheckStatus
    depths: tuple[int, ...] = ()
    max_abs: tuple[float, ...] = ()
    kl: tuple[float, ...] = ()
    top1: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if {len(self.max_abs), len(self.kl), len(self.top1)} != {len(self.depths)}:
            raise ConfigError(f"check: one value of each kind is needed for each of the depths {self.depths}")
        if (self.status is CheckStatus.UNVERIFIED) != (not self.depths):
            raise ConfigError(f"check.status is {self.status} with {len(self.depths)} depths compared")
        if self.status is CheckStatus.VERIFIED and not all(map(math.isfinite, (*self.max_abs, *self.kl, *self.top1))):
            raise ConfigError(f"check.status is {self.status} with numbers that are not finite")


@dataclass(frozen=True, slots=True)
class TokenizerRecord:
    """The tokenizer as the file holds it.

    ``json`` is the text of a Hugging Face tokenizer.json; ``eos`` may hold several ids, the first is the
    one other programs read.
    """

    json: str
    bos: int | None = None
    eos: tuple[int, ...] = ()
    add_bos: bool = False
    chat_template: str | None = None

    def check_ids(self, n_vocab: int) -> None:
        """Raise ConfigError for an id outside the vocabulary, or a start token wanted but not named."""
        ids = (*self.eos, *(() if self.bos is None else (self.bos,)))
        if wrong := [i for i in ids if not 0 <= i < n_vocab]:
            raise ConfigError(f"token id {wrong[0]} of the tokenizer is outside 0..{n_vocab - 1}")
        if self.add_bos and self.bos is None:
            raise ConfigError("add_bos_token is true, bos_token_id is missing")


class StoredSize(Protocol):
    """A stretch of a file."""

    @property
    def n_bytes(self) -> int: ...


class ModelFile(Protocol):
    """An open model file of either kind; a context manager."""

    @property
    def path(self) -> Path: ...
    @property
    def config(self) -> ModelConfig: ...
    @property
    def tensors(self) -> Mapping[str, StoredSize]:
        """What is stored, by name; names begin with the stage that uses it."""

    @property
    def tokenizer(self) -> TokenizerRecord | None: ...
    @property
    def provenance(self) -> Provenance: ...
    @property
    def check(self) -> Check | None: ...
    @property
    def checksum(self) -> str | None: ...
    @property
    def n_bytes(self) -> int:
        """Of all that it consists of."""

    @property
    def bytes_by_quant(self) -> Mapping[str, int]:
        """Bytes of tensors, by how they are stored."""

    def array(self, name: str) -> NDArray[np.float32]:
        """Numbers of a tensor of ``config.tensors()``: float32 in its shape, in memory of their own."""

    def is_intact(self) -> bool | None:
        """Whether the weights are those that were written; None where the file does not say. Reads all of them."""

    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...


def quant_of(file: ModelFile) -> str:
    """How the matrices of a model file are stored: what it says, else what most of its bytes are."""
    said, by_quant = file.provenance.get("quant"), file.bytes_by_quant
    return said if isinstance(said, str) else max(by_quant, key=lambda quant: by_quant[quant])


def summary(file: ModelFile) -> dict[str, Any]:
    """What a model file holds, as plain values for people and JSON."""
    tokenizer, check = file.tokenizer, file.check
    return {
        "config": file.config.to_dict(),
        "n_params": file.config.n_params,
        "n_bytes": file.n_bytes,
        "bytes_by_quant": dict(file.bytes_by_quant),
        "tokenizer": tokenizer is not None,
        "chat_template": bool(tokenizer and tokenizer.chat_template),
        "provenance": dict(file.provenance),
        "checksum": file.checksum,
        "check": None if check is None else asdict(check),
    }
