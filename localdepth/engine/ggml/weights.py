"""The model's weights as ggml tensors, copied once out of the file."""

from dataclasses import replace

import numpy as np

from localdepth.config import ModelConfig, RopeScaling
from localdepth.engine.base import F32
from localdepth.engine.ggml import lib as ggml
from localdepth.engine.ggml.handles import Backend, TensorGroup, write
from localdepth.gguf import GgufFile

__all__ = ["ROPE_FACTORS", "load_weights"]

ROPE_FACTORS = "rope_factors"  # [head_dim / 2]: what ggml divides each rotation frequency by


def load_weights(backend: Backend, file: GgufFile) -> TensorGroup:
    """Copy every tensor of ``file`` into one buffer, under its name in the file."""
    shapes: dict[str, tuple[int, tuple[int, ...]]] = {
        name: (info.quant.ggml_type, tuple(reversed(info.shape))) for name, info in file.tensors.items()
    }
    scaled = file.config.rope_scaling is not RopeScaling.NONE
    if scaled:
        shapes[ROPE_FACTORS] = (ggml.F32, (file.config.head_dim // 2,))
    group = TensorGroup(backend, shapes)
    for name in file.tensors:
        write(backend.lib, group[name], file.data(name))
    if scaled:
        write(backend.lib, group[ROPE_FACTORS], _rope_factors(file.config))
    return group


def _rope_factors(config: ModelConfig) -> F32:
    plain = replace(config, rope_scaling=RopeScaling.NONE).rope_frequencies()
    return np.asarray(np.array(plain) / np.array(config.rope_frequencies()), np.float32)
