"""Checkpoint -> GGUF: quantise tensor by tensor, record what was done."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from localdepth.engine.ggml.quantize import quantize
from localdepth.errors import CheckpointError, ConfigError
from localdepth.gguf import Check, CheckStatus
from localdepth.quant import Quant
from localdepth_export.gguf_writer import write
from localdepth_export.tokenizer_record import read_license, read_tokenizer
from localdepth_train.checkpoint import Checkpoint

__all__ = ["QUANTS", "Export", "to_gguf"]

QUANTS = (Quant.F32, Quant.F16, Quant.BF16, Quant.Q8_0)
_FALLBACK = {Quant.Q8_0: Quant.F16}  # where a shape cannot hold the blocks
_F16_MAX = float(np.finfo(np.float16).max)
# Largest magnitude each quant can hold; Q8_0 stores 127 steps of a float16 scale.
_LARGEST = {
    Quant.F32: float(np.finfo(np.float32).max),
    Quant.F16: _F16_MAX,
    Quant.BF16: (2 - 2**-7) * 2.0**127,
    Quant.Q8_0: 127 * _F16_MAX,
}


@dataclass(frozen=True, slots=True)
class Export:
    """What an export wrote.

    Attributes:
        fallbacks: tensors whose shape could not hold the quant asked for, "name: Q8_0 -> F16".
        n_bytes: size of the file.
    """

    path: Path
    kind: str
    quant: Quant
    fallbacks: tuple[str, ...]
    n_bytes: int
    n_params: int
    has_tokenizer: bool


def to_gguf(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    quant: str | Quant = Quant.Q8_0,
    license_name: str | None = None,
) -> Export:
    """Write ``checkpoint`` as one GGUF file.

    Matrices are stored as ``quant``, norms and biases as float32. Reads one tensor at a time and needs no torch.

    Args:
        checkpoint: directory of a published or own looped model.
        out: file to write; it appears complete or not at all.
        quant: one of F32, F16, BF16, Q8_0, in any case.
        license_name: of the weights; None takes the one in the checkpoint's model card, if any.
    Raises:
        ConfigError: unknown quant, or values the quant cannot hold.
        CheckpointError: the directory cannot be used, or holds values that are not finite.
        StorageError: the file cannot be written.
    """
    quant = _parse(quant)
    source = Checkpoint(checkpoint)
    shapes = source.config.tensors()
    quants = {name: _choose(shape, quant) for name, shape in shapes.items()}
    fallbacks = tuple(
        f"{name}: {quant} -> {chosen}"
        for name, chosen in quants.items()
        if chosen is not quant and len(shapes[name]) > 1
    )
    tokenizer = read_tokenizer(source)
    provenance: dict[str, str | tuple[str, ...]] = {
        "source": source.path.resolve().name,
        "exporter": f"localdepth {version('localdepth')}",
        "quant": str(quant),
        "fallbacks": fallbacks,
    }
    if known := license_name or read_license(source):
        provenance["license"] = known
    write(
        out,
        source.config,
        quants,
        _encoded(source, quants),
        tokenizer=tokenizer,
        provenance=provenance,
        check=Check(CheckStatus.UNVERIFIED),
    )
    return Export(
        path=Path(out),
        kind=source.kind,
        quant=quant,
        fallbacks=fallbacks,
        n_bytes=Path(out).stat().st_size,
        n_params=source.config.n_params,
        has_tokenizer=tokenizer is not None,
    )


def _parse(quant: str) -> Quant:
    name = quant.upper() if isinstance(quant, str) else quant
    if name not in QUANTS:
        raise ConfigError(f"quant={quant!r} is not one of {', '.join(QUANTS)}")
    return Quant(name)


def _choose(shape: tuple[int, ...], quant: Quant) -> Quant:
    if len(shape) == 1:
        return Quant.F32
    while not quant.fits(shape):
        quant = _FALLBACK[quant]
    return quant


def _encoded(source: Checkpoint, quants: dict[str, Quant]) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    for name, quant in quants.items():
        array = source.read(name)
        largest = max(float(array.max()), -float(array.min()))  # without a copy
        if not np.isfinite(largest):
            raise CheckpointError(f"{name} in {source.path} has values that are not finite; download it again")
        if largest > _LARGEST[quant]:
            raise ConfigError(f"{name} has values beyond {_LARGEST[quant]:.6g}, the largest {quant}; export as F32")
        yield name, quantize(array, quant)
