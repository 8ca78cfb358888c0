"""Makes checkpoints of every family, with weights from a seed, so that tests need no foreign files.

Families that were published come in their published layout, the others in ours.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from localdepth.config import ModelConfig, NormPlacement, QkNorm, RopeScaling, RopeStyle, StateInit
from localdepth.engine.toy import random_weights
from localdepth_train.checkpoint import save
from localdepth_train.checkpoint.published import published_parts

__all__ = ["CONFIGS", "EXPECTED", "FAMILIES", "make_checkpoint", "published_tensors", "weights_of"]

_SHARED: dict[str, Any] = {
    "architectures": ["RavenForCausalLM"],
    "model_type": "huginn_raven",
    "bias": False,
    "injection_type": "linear",
    "intermediate_size": 72,
    "mean_recurrence": 6,
    "mlp_class_name": "GatedMLP",
    "n_embd": 48,
    "n_layers_in_coda": 1,
    "n_layers_in_prelude": 2,
    "n_layers_in_recurrent_block": 2,
    "nonlin_name": "SiLU",
    "vocab_size": 90,
}
_RETROFIT = {
    **_SHARED,
    "block_size": 4096,  # leftovers of Huginn's own config, not this model's
    "rope_base": 500000.0,
    "head_dim": 12,
    "n_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "rope_theta": 10000.0,
    "norm_eps": 1e-5,
    "init_values": {"embed_scale": 1.0, "std": 0.0087},
    "tie_embeddings": False,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "huginn": {
        **_SHARED,
        "block_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "norm_eps": 1e-6,
        "qk_bias": True,
        "tie_embeddings": True,
    },
    "retrofit_llama": _RETROFIT,
    "retrofit_llama3": {
        **_RETROFIT,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "retrofit_olmo2": {**_RETROFIT, "num_key_value_heads": 4, "norm_eps": 1e-6, "head_dim": 16},
}


_SIZES = {
    "n_prelude": 2,
    "n_core": 2,
    "n_coda": 1,
    "n_embd": 48,
    "n_head": 4,
    "n_ff": 72,
    "n_vocab": 90,
    "n_ctx": 96,
    "default_depth": 6,
    "max_depth": 64,
    "trained_mean_depth": 6.0,
    "state_init": StateInit.NORMAL,
}
_LLAMA = {**_SIZES, "head_dim": 12, "n_head_kv": 2, "norm_eps": 1e-5, "state_std": 0.0087, "auto_min_depth": 2}
# What the reader must make of them.
EXPECTED: dict[str, ModelConfig] = {
    "huginn": ModelConfig(
        **_SIZES,
        head_dim=12,
        n_head_kv=4,
        norm_eps=1e-6,
        norm_placement=NormPlacement.ON_SUM,
        qk_bias=True,
        rope_style=RopeStyle.INTERLEAVED,
        rope_base=50000.0,
        embed_scale=math.sqrt(48),
        state_std=math.sqrt(0.4),
        norm_after_core=True,
        tied_head=True,
    ),
    "retrofit_llama": ModelConfig(**_LLAMA),
    "retrofit_llama3": ModelConfig(
        **_LLAMA,
        rope_base=500000.0,
        rope_scaling=RopeScaling.LLAMA3,
        rope_scaling_factor=8.0,
        rope_scaling_original_n_ctx=32,
    ),
    "retrofit_olmo2": ModelConfig(
        **{**_LLAMA, "head_dim": 16, "n_head_kv": 4, "norm_eps": 1e-6},
        norm_placement=NormPlacement.POST_BRANCH,
        qk_norm=QkNorm.FULL,
    ),
}
_QWEN = {**_LLAMA, "norm_eps": 1e-6, "rope_base": 1e6}
# The same, and those that only our own layout holds.
FAMILIES: dict[str, ModelConfig] = {
    **EXPECTED,
    "retrofit_qwen2": ModelConfig(**_QWEN, qk_bias=True, v_bias=True, tied_head=True),
    "retrofit_qwen3": ModelConfig(**{**_QWEN, "head_dim": 16}, qk_norm=QkNorm.HEAD),
}


def published_tensors(config: ModelConfig, weights: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Our tensors packed into the published ones."""
    packed: dict[str, list[tuple[tuple[int, ...], NDArray[Any]]]] = {}
    axis: dict[str, int] = {}
    for name, part in published_parts(config).items():
        order = (part.rows or (0,))[0] + (part.cols or (0,))[0] + (part.index or 0)
        packed.setdefault(part.name, []).append(((order,), weights[name]))
        axis[part.name] = 1 if part.cols else 0
    tensors = {}
    for name, parts in packed.items():
        ordered = [array for _, array in sorted(parts, key=lambda item: item[0])]
        if name.endswith("qk_bias"):
            tensors[name] = np.stack(ordered).reshape(2, 1, config.n_head, config.head_dim)
        else:
            tensors[name] = np.concatenate(ordered, axis[name])
    return tensors


def weights_of(kind: str, seed: int = 0) -> tuple[ModelConfig, dict[str, NDArray[np.float32]]]:
    """Config and weights of one family, the loop damped so that it settles as trained ones do."""
    config = FAMILIES[kind]
    weights = random_weights(config, seed)
    return config, {name: np.float32(0.7) * w if name == "injection.state.weight" else w for name, w in weights.items()}


def make_checkpoint(folder: Path, kind: str, seed: int = 0, dtype: Any = np.float32) -> Path:
    """A directory as a user has it on disk."""
    config, weights = weights_of(kind, seed)
    if kind not in CONFIGS:
        return save(folder, config, {name: array.astype(dtype) for name, array in weights.items()})
    folder.mkdir(parents=True, exist_ok=True)
    tensors = published_tensors(config, weights)
    tensors["freqs_cis"] = np.zeros((1, 4, 1, 2, 2), np.float32)
    if config.norm_placement is not NormPlacement.ON_SUM:
        tensors["transformer.coda.0.norm_3.weight"] = np.ones(config.n_embd, np.float32)
    save_file({name: array.astype(dtype) for name, array in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIGS[kind]))
    return folder
