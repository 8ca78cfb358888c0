"""Weights of models that were never trained, already quantised, cheap enough for models of any size."""

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from localdepth.config import ModelConfig
from localdepth.engine.ggml.quantize import quantize
from localdepth.quant import Quant

__all__ = ["quants_of", "stored_weights"]

_ROWS = 64  # drawn and quantised; further rows repeat them, so that K-quants of a billion numbers take seconds


def quants_of(config: ModelConfig, quant: Quant) -> dict[str, Quant]:
    """How each tensor is stored: ``quant`` where its shape can hold it, else the nearest simple one."""
    return {
        name: next(q for q in (quant, Quant.Q5_0, Quant.F32) if q.fits(shape))
        for name, shape in config.tensors().items()
    }


def stored_weights(
    config: ModelConfig, quants: Mapping[str, Quant], seed: int = 0
) -> Iterator[tuple[str, npt.NDArray[np.uint8]]]:
    """Name and stored bytes of each tensor, in order; norms near one, matrices N(0, 1 / columns)."""
    rng = np.random.default_rng(seed)
    for name, shape in config.tensors().items():
        if len(shape) == 1:
            yield name, quantize(1 + np.float32(0.1) * rng.standard_normal(shape, np.float32), quants[name])
            continue
        drawn = rng.standard_normal((min(_ROWS, shape[0]), shape[1]), np.float32) / np.float32(np.sqrt(shape[1]))
        yield name, np.resize(quantize(drawn, quants[name]), quants[name].n_bytes(shape))
