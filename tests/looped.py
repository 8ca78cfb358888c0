"""A small real Llama made into a looped model by surgery, so that quality can be measured without training.

The first layer becomes the prelude, the last one the coda, those between the core. The injection adds a quarter of
the state to the embeds: at depth 1, from a state of zeros, the model is exactly the Llama it was.
"""

import json
from pathlib import Path

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy
import numpy as np
from safetensors.numpy import load_file

from localdepth.config import ModelConfig
from localdepth.engine.base import F32
from localdepth_train.checkpoint import save

__all__ = ["loop_llama"]

# Share of the state that enters the next pass. babyllama-105 then loses little by looping without any training: 0.73,
# 0.87 and 0.90 nats a character at depths 1, 3 and 16; half the state would cost it 1.74 at depth 16.
_CARRIED = np.float32(0.25)
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def loop_llama(source: Path, out: Path) -> Path:
    """Write the looped model of a Hugging Face Llama directory as a checkpoint of our own layout."""
    record = json.loads((source / "config.json").read_text())
    n_layer, n_embd = record["num_hidden_layers"], record["hidden_size"]
    config = ModelConfig(
        n_prelude=1,
        n_core=n_layer - 2,
        n_coda=1,
        n_embd=n_embd,
        n_head=record["num_attention_heads"],
        n_head_kv=record["num_key_value_heads"],
        head_dim=n_embd // record["num_attention_heads"],
        n_ff=record["intermediate_size"],
        n_vocab=record["vocab_size"],
        n_ctx=record["max_position_embeddings"],
        norm_eps=record["rms_norm_eps"],
        rope_base=record["rope_theta"],
        tied_head=record["tie_word_embeddings"],
        default_depth=4,
        max_depth=16,
    )
    given = {name: array.astype(np.float32) for name, array in load_file(source / "model.safetensors").items()}
    stages = ["prelude.0", *(f"core.{i}" for i in range(config.n_core)), "coda.0"]
    weights: dict[str, F32] = {
        "token_embd.weight": given["model.embed_tokens.weight"],
        "injection.state.weight": _CARRIED * np.eye(n_embd, dtype=np.float32),
        "injection.embeds.weight": np.eye(n_embd, dtype=np.float32),
        "output_norm.weight": given["model.norm.weight"],
    }
    for i, stage in enumerate(stages):
        for ours, theirs in _LAYER.items():
            weights[f"{stage}.{ours}.weight"] = given[f"model.layers.{i}.{theirs}.weight"]
    if not config.tied_head:
        weights["output.weight"] = given["lm_head.weight"]
    texts = {name: (source / name).read_text() for name in ("tokenizer.json", "tokenizer_config.json")}
    return save(out, config, weights, texts)
