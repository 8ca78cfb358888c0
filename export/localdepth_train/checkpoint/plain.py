"""Plain models, the bases of retrofits: tensor names and configuration keys of Hugging Face files, mapped to ours.

A plain model is described as a looped one: all its layers are the core, nothing is injected after the start, and the
state starts from zeros. At depth 1 that is the plain model, bit for bit. A model of our own layout may be such a one.

Within its window sliding attention is full attention, so a model that slides has the window as its context.

Source of names and semantics: the configuration and modelling files of transformers (Apache-2.0).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from localdepth.config import Injection, ModelConfig, NormPlacement, QkNorm
from localdepth.errors import CheckpointError, ConfigError
from localdepth_train.checkpoint.layouts import LayoutName, recognise
from localdepth_train.checkpoint.parts import Layout, Part
from localdepth_train.checkpoint.records import flag, items, number, reading, rope_scaling, table, whole

__all__ = ["is_plain", "recognise_plain"]


@dataclass(frozen=True, slots=True)
class _Family:
    label: str
    fields: dict[str, Any] = field(default_factory=dict)  # of ModelConfig, where they differ from Llama's
    head_dim: int | None = None  # where config.json has none; None: the width shared out between the heads
    slides: bool = False  # whether a sliding_window counts without use_sliding_window


_FAMILIES = {
    "llama": _Family("Llama"),
    "mistral": _Family("Mistral", slides=True),
    "olmo2": _Family("OLMo-2", {"norm_placement": NormPlacement.POST_BRANCH, "qk_norm": QkNorm.FULL}),
    "qwen2": _Family("Qwen2", {"qk_bias": True, "v_bias": True}),
    "qwen3": _Family("Qwen3", {"qk_norm": QkNorm.HEAD}, head_dim=128),
}
_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.bias": "self_attn.v_proj.bias",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_post_norm.weight": "post_attention_layernorm.weight",  # the same name in two places, by norm_placement
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "ffn_post_norm.weight": "post_feedforward_layernorm.weight",
}
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_JUNK = re.compile(r"\.rotary_emb\.inv_freq$|^lm_head\.weight$")  # a tied head may be stored again
# Options of these families that nothing here computes, and what they must be.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),  # it would put a bias on the output projection too
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
}
_ATTENTION = ("full_attention", "sliding_attention")


def is_plain(config: ModelConfig) -> bool:
    """Whether a model has no loop: all layers are the core, which runs once, from the embeddings alone."""
    return config.n_prelude == config.n_coda == 0 and config.injection is Injection.NONE and config.default_depth == 1


def recognise_plain(record: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], path: Path) -> Layout:
    """Tell which plain model a directory holds from its config ``record`` and its tensors' ``shapes``.

    Raises:
        CheckpointError: another model type, one that loops already, or options that cannot be represented.
    """
    kind = record.get("model_type")
    if kind in [name.model_type for name in LayoutName]:
        layout = recognise(record, shapes, path)
        if not is_plain(layout.config):
            raise CheckpointError(f"{path} holds a looped model ({layout.kind}); a base is a plain one, without a core")
        return layout
    if not isinstance(kind, str) or kind not in _FAMILIES:
        raise CheckpointError(f"{path} has model_type {kind!r}; bases can be {', '.join(_FAMILIES)}, or our own")
    family = _FAMILIES[kind]
    with reading(path):
        config = _config(record, family)
    layout = Layout(family.label, config, {name: Part(_stored_name(name)) for name in config.tensors()})
    layout.check_names(shapes, _JUNK, path)
    return layout


def _stored_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    _, i, rest = name.split(".", 2)
    return f"model.layers.{i}.{_LAYER[rest]}"


def _config(record: Mapping[str, Any], family: _Family) -> ModelConfig:
    rope = _rope(record)
    options = {**record, **rope}
    for key, allowed in _FIXED.items():
        if key in options and options[key] not in allowed:
            raise ConfigError(f"{key}={options[key]!r:.80} is not supported, only {allowed[0]!r}; take another base")
    n_embd, n_head = whole(record, "hidden_size"), whole(record, "num_attention_heads")
    return ModelConfig(
        n_prelude=0,
        n_core=whole(record, "num_hidden_layers"),
        n_coda=0,
        n_embd=n_embd,
        n_head=n_head,
        n_head_kv=whole(record, "num_key_value_heads", n_head),
        head_dim=whole(record, "head_dim", family.head_dim or n_embd // n_head),
        n_ff=whole(record, "intermediate_size"),
        n_vocab=whole(record, "vocab_size"),
        n_ctx=_n_ctx(record, family),
        norm_eps=number(record, "rms_norm_eps"),
        injection=Injection.NONE,
        rope_base=number(rope, "rope_theta", 10000),
        **rope_scaling(rope),
        tied_head=flag(record, "tie_word_embeddings", False),
        default_depth=1,
        max_depth=1,
        **family.fields,
    )


def _rope(record: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the rotation, which lie in one entry, in another, or beside them, by age of the file."""
    places = {"rope_theta": record.get("rope_theta")}, table(record, "rope_scaling"), table(record, "rope_parameters")
    settings = {key: value for place in places for key, value in place.items() if value is not None}
    if nested := [key for key, value in settings.items() if isinstance(value, dict)]:
        raise ConfigError(f"rope settings by kind of layer ({', '.join(nested)}) are not supported; take another base")
    return settings


def _n_ctx(record: Mapping[str, Any], family: _Family) -> int:
    n_ctx, kinds = whole(record, "max_position_embeddings"), items(record, "layer_types")
    if unknown := [kind for kind in kinds if kind not in _ATTENTION]:
        raise ConfigError(
            f"layer_types has {unknown[0]!r:.40}, only {' and '.join(_ATTENTION)} are supported; take another base"
        )
    slides = "sliding_attention" in kinds or (not kinds and flag(record, "use_sliding_window", family.slides))
    return min(n_ctx, whole(record, "sliding_window", n_ctx)) if slides else n_ctx
