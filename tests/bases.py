"""Small plain models as Hugging Face directories, and what they compute, written down a second time.

Names, keys and arithmetic are those of transformers; nothing here uses our tables of them.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

__all__ = ["BASES", "in_shards", "make_base", "plain_logits", "random_base", "write_weights"]

F64 = NDArray[np.float64]

_SHARED: dict[str, Any] = {
    "hidden_act": "silu",
    "hidden_size": 24,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 50,
}
_LLAMA3 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 16,
    "rope_type": "llama3",
}
BASES: dict[str, dict[str, Any]] = {
    "llama": {**_SHARED, "model_type": "llama", "attention_bias": False, "mlp_bias": False},
    "llama3": {**_SHARED, "model_type": "llama", "rope_scaling": _LLAMA3, "tie_word_embeddings": True},
    "mistral": {**_SHARED, "model_type": "mistral", "head_dim": 8, "sliding_window": None},
    "olmo2": {**_SHARED, "model_type": "olmo2", "num_key_value_heads": 4, "attention_bias": False},
    "qwen2": {**_SHARED, "model_type": "qwen2", "use_sliding_window": False, "sliding_window": 16},
    "qwen3": {**_SHARED, "model_type": "qwen3", "head_dim": 8, "attention_bias": False, "tie_word_embeddings": True},
}


def random_base(record: dict[str, Any], seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Random tensors of the model that ``record`` describes, under their names."""
    rng, kind = np.random.default_rng(seed), record["model_type"]
    n, ff, vocab = (record[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    head = record.get("head_dim") or n // record["num_attention_heads"]
    q, kv = record["num_attention_heads"] * head, record["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, n), "model.norm.weight": (n,)}
    if not record["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, n)
    for i in range(record["num_hidden_layers"]):
        layer: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj.weight": (q, n),
            "self_attn.k_proj.weight": (kv, n),
            "self_attn.v_proj.weight": (kv, n),
            "self_attn.o_proj.weight": (n, q),
            "mlp.gate_proj.weight": (ff, n),
            "mlp.up_proj.weight": (ff, n),
            "mlp.down_proj.weight": (n, ff),
            "post_attention_layernorm.weight": (n,),
        }
        if kind == "olmo2":
            layer |= {"self_attn.q_norm.weight": (q,), "self_attn.k_norm.weight": (kv,)}
            layer["post_feedforward_layernorm.weight"] = (n,)
        else:
            layer["input_layernorm.weight"] = (n,)
        if kind == "qwen2":
            layer |= {"self_attn.q_proj.bias": (q,), "self_attn.k_proj.bias": (kv,), "self_attn.v_proj.bias": (kv,)}
        if kind == "qwen3":
            layer |= {"self_attn.q_norm.weight": (head,), "self_attn.k_norm.weight": (head,)}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return {
        name: (rng.normal(1, 0.1, shape) if "norm" in name else rng.normal(0, 0.2, shape)).astype(np.float32)
        for name, shape in shapes.items()
    }


def make_base(folder: Path, name: str, dtype: Any = np.float32, **changes: Any) -> Path:
    """A directory of one of ``BASES``, with fields of ``config.json`` changed; the weights are its own."""
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder, BASES[name], dtype)
    (folder / "config.json").write_text(json.dumps({**BASES[name], **changes}))
    return folder


def write_weights(folder: Path, record: dict[str, Any], dtype: Any) -> None:
    """Random weights of the model that ``record`` describes."""
    tensors = random_base(record)
    save_file({name: array.astype(dtype) for name, array in tensors.items()}, folder / "model.safetensors")


def in_shards(folder: Path) -> Path:
    """The same checkpoint with its weights in two files and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def plain_logits(record: dict[str, Any], tensors: dict[str, NDArray[Any]], ids: list[int], layers: list[int]) -> F64:
    """Logits [T, V] of a whole sequence run through these layers, each once."""
    wide = {name: array.astype(np.float64) for name, array in tensors.items()}
    x = wide["model.embed_tokens.weight"][ids]
    for i in layers:
        prefix = f"model.layers.{i}."
        layer = {name.removeprefix(prefix): array for name, array in wide.items() if name.startswith(prefix)}
        x = _layer(record, layer, x)
    head = wide["model.embed_tokens.weight" if record["tie_word_embeddings"] else "lm_head.weight"]
    out: F64 = _norm(x, wide["model.norm.weight"], record) @ head.T
    return out


def _layer(record: dict[str, Any], layer: dict[str, F64], x: F64) -> F64:
    after = record["model_type"] == "olmo2"  # norms behind the branches
    normed = x if after else _norm(x, layer["input_layernorm.weight"], record)
    branch = _attention(record, layer, normed)
    x = x + (_norm(branch, layer["post_attention_layernorm.weight"], record) if after else branch)
    normed = x if after else _norm(x, layer["post_attention_layernorm.weight"], record)
    gate, up = (normed @ layer[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    branch = (gate / (1 + np.exp(-gate)) * up) @ layer["mlp.down_proj.weight"].T
    return x + (_norm(branch, layer["post_feedforward_layernorm.weight"], record) if after else branch)


def _attention(record: dict[str, Any], layer: dict[str, F64], x: F64) -> F64:
    n_head, n_head_kv = record["num_attention_heads"], record["num_key_value_heads"]
    parts: dict[str, F64] = {}
    for part, heads in (("q", n_head), ("k", n_head_kv), ("v", n_head_kv)):
        y = x @ layer[f"self_attn.{part}_proj.weight"].T + layer.get(f"self_attn.{part}_proj.bias", np.zeros(1))
        weight = layer.get(f"self_attn.{part}_norm.weight")
        if weight is not None and weight.size == y.shape[1]:
            y = _norm(y, weight, record)
        y = y.reshape(len(x), heads, -1)
        if weight is not None and weight.size == y.shape[2]:
            y = _norm(y, weight, record)
        parts[part] = y.transpose(1, 0, 2)  # [H, T, D]
    q, k = (_rotated(parts[part], record) for part in "qk")
    k, v = (np.repeat(part, n_head // n_head_kv, axis=0) for part in (k, parts["v"]))
    scores = np.where(np.tri(len(x), dtype=bool), q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[2]), -np.inf)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = (shares / shares.sum(-1, keepdims=True)) @ v
    out: F64 = mixed.transpose(1, 0, 2).reshape(len(x), -1) @ layer["self_attn.o_proj.weight"].T
    return out


def _norm(x: F64, weight: F64, record: dict[str, Any]) -> F64:
    out: F64 = x / np.sqrt((x**2).mean(-1, keepdims=True) + record["rms_norm_eps"]) * weight
    return out


def _rotated(x: F64, record: dict[str, Any]) -> F64:
    half, scaling = x.shape[2] // 2, record.get("rope_scaling")
    frequencies = record["rope_theta"] ** (-np.arange(half) / half)
    if scaling:
        length = 2 * math.pi / frequencies
        low = scaling["original_max_position_embeddings"] / scaling["low_freq_factor"]
        high = scaling["original_max_position_embeddings"] / scaling["high_freq_factor"]
        smooth = (scaling["original_max_position_embeddings"] / length - scaling["low_freq_factor"]) / (
            scaling["high_freq_factor"] - scaling["low_freq_factor"]
        )
        between = (1 - smooth) * frequencies / scaling["factor"] + smooth * frequencies
        frequencies = np.where(
            length < high, frequencies, np.where(length > low, frequencies / scaling["factor"], between)
        )
    angles = np.outer(np.arange(x.shape[1]), frequencies)
    angles = np.concatenate([angles, angles], axis=1)
    turned: F64 = np.concatenate([-x[..., half:], x[..., :half]], axis=2)
    out: F64 = x * np.cos(angles) + turned * np.sin(angles)
    return out
