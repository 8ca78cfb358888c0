"""The published looped checkpoints (``model_type`` "huginn_raven"): tensor names and configuration keys, one row each.

Three different models share the ``model_type``; they are told apart by their tensors. Retrofits can be written too, as
the published surgery writes them. The names here are the foreign ones; nothing outside ``checkpoint`` sees them.

Source of names and semantics: seal-rg/recurrent-pretraining and mcleish7/retrofitting-recurrence (Apache-2.0).
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from localdepth.config import (
    MEASURE_DEPTH,
    Injection,
    ModelConfig,
    NormPlacement,
    QkNorm,
    RopeScaling,
    RopeStyle,
    StateInit,
)
from localdepth.errors import ConfigError
from localdepth_train.checkpoint.parts import Layout, Part
from localdepth_train.checkpoint.records import flag, number, one_of, reading, rope_scaling, table, whole

__all__ = ["PUBLISHED_STD", "published_layout", "published_parts", "published_record"]

PUBLISHED_STD = 0.008703882797784892  # of the initial state of retrofits: sqrt(2 / (5 * 5280)), Huginn's width
_STAGE_NAMES = {"prelude": "prelude", "core": "core_block", "coda": "coda"}

# Norms are numbered in order of use, so their meaning depends on where a block normalises.
_NORMS = {
    NormPlacement.PRE: ("attn_norm", "ffn_norm"),
    NormPlacement.POST_BRANCH: ("attn_post_norm", "ffn_post_norm"),
    NormPlacement.ON_SUM: ("attn_norm", "attn_post_norm", "ffn_norm", "ffn_post_norm"),
}
_INJECTIONS = {"linear": Injection.CONCAT_LINEAR, "add": Injection.ADD}
# Tensors that published files carry along and never use; a tied head may be stored again.
_HUGINN_JUNK = re.compile(r"^freqs_cis$|^lm_head\.weight$")
_RETROFIT_JUNK = re.compile(r"^freqs_cis$|\.norm_[34]\.weight$|\.attn\.Wqkv\.bias$")

# What the published surgery takes over from Huginn's own configuration; its code asks for the keys, not for the values.
_INHERITED: dict[str, Any] = {
    "activation_checkpoint_impl": "per-iteration",
    "architecture_class_name": "RecurrentGPT",
    "architectures": ["RavenForCausalLM"],
    "auto_map": {
        "AutoConfig": "raven_config_minimal.RavenConfig",
        "AutoModelForCausalLM": "raven_modeling_minimal.RavenForCausalLM",
    },
    "bias": False,
    "block_class_name": "SandwichBlock",
    "block_size": 4096,
    "effective_expected_depth": 132,
    "hf_config": {"name": "nebel-raven-3.5b", "org": "tomg-group-umd"},
    "init_orthogonal": False,
    "init_strategy": "takase",
    "mean_backprop_depth": 8,
    "mlp_class_name": "GatedMLP",
    "model_type": "huginn_raven",
    "name": "nebel-raven-3.5b",
    "nonlin_name": "SiLU",
    "norm_class_name": "RMSNorm_llama",
    "padding_multiple": 4096,
    "qk_bias": False,
    "rope_base": 500000.0,
    "sampling_scheme": "poisson-lognormal-filling",
    "state_init": "like-init",
    "test_time_noise": 0,
    "test_time_noise_type": "fixed",
    "transformers_version": "4.51.0",
}
_INHERITED_INIT = {"embedding": PUBLISHED_STD, "out_proj": 0.0005356869554443541}
# Fields that the published record has no place for, or one place for several of them.
_NOT_RECORDED = {"default_depth", "max_depth", "auto_min_depth", "trained_mean_depth", "state_init", "tied_head"}


def published_parts(config: ModelConfig) -> dict[str, Part]:
    """Our tensor names -> the published tensors that hold them."""
    q, kv, n = config.n_embd_q, config.n_embd_kv, config.n_embd
    block = {
        "attn_q.weight": Part("attn.Wqkv.weight", (0, q)),
        "attn_k.weight": Part("attn.Wqkv.weight", (q, q + kv)),
        "attn_v.weight": Part("attn.Wqkv.weight", (q + kv, q + 2 * kv)),
        "attn_q.bias": Part("attn.qk_bias", index=0),
        "attn_k.bias": Part("attn.qk_bias", index=1),
        "attn_q_norm.weight": Part("attn.q_norm.weight"),
        "attn_k_norm.weight": Part("attn.k_norm.weight"),
        "attn_output.weight": Part("attn.proj.weight"),
        "ffn_gate.weight": Part("mlp.fc.weight", (0, config.n_ff)),
        "ffn_up.weight": Part("mlp.fc.weight", (config.n_ff, 2 * config.n_ff)),
        "ffn_down.weight": Part("mlp.proj.weight"),
        **{f"{ours}.weight": Part(f"norm_{i}.weight") for i, ours in enumerate(_NORMS[config.norm_placement], start=1)},
    }
    top = {
        "token_embd.weight": Part("transformer.wte.weight"),
        "injection.state.weight": Part("transformer.adapter.weight", cols=(0, n)),
        "injection.embeds.weight": Part("transformer.adapter.weight", cols=(n, 2 * n)),
        "output_norm.weight": Part("transformer.ln_f.weight"),
        "output.weight": Part("lm_head.weight"),
    }

    def locate(name: str) -> Part:
        if name in top:
            return top[name]
        stage, i, rest = name.split(".", 2)
        part = block[rest]
        return Part(f"transformer.{_STAGE_NAMES[stage]}.{i}.{part.name}", part.rows, part.cols, part.index)

    return {name: locate(name) for name in config.tensors()}


def published_layout(record: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], path: Path) -> Layout:
    """Tell the three published block types apart by their tensors.

    Raises:
        CheckpointError: bad fields, or tensors that belong to none of them.
    """
    with reading(path):
        label, config = _config(record, shapes)
    layout = Layout(label, config, published_parts(config))
    layout.check_names(shapes, _HUGINN_JUNK if config.norm_placement is NormPlacement.ON_SUM else _RETROFIT_JUNK, path)
    return layout


def published_record(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The ``config.json`` of a retrofit, with the keys that the published code asks for.

    ``mean_recurrence``, which that code both trains and runs at, is the default depth.

    Args:
        dtype: of the weights, in torch's words: "float32", "float16", "bfloat16".
    Raises:
        ConfigError: the published code has no such model; the message names the fields that it cannot hold.
    """
    record = {
        **_INHERITED,
        "head_dim": config.head_dim,
        "init_values": {**_INHERITED_INIT, "embed_scale": config.embed_scale, "std": config.state_std},
        "injection_type": {ours: theirs for theirs, ours in _INJECTIONS.items()}.get(config.injection),
        "intermediate_size": config.n_ff,
        "max_position_embeddings": config.n_ctx,
        "mean_recurrence": config.default_depth,
        "n_embd": config.n_embd,
        "n_heads": config.n_head,
        "n_layers": config.n_prelude + config.n_core + config.n_coda,
        "n_layers_in_coda": config.n_coda,
        "n_layers_in_prelude": config.n_prelude,
        "n_layers_in_recurrent_block": config.n_core,
        "norm_eps": config.norm_eps,
        "num_key_value_heads": config.n_head_kv,
        "padded_vocab_size": config.n_vocab,
        "rope_theta": config.rope_base,
        "tie_embeddings": False,
        "torch_dtype": dtype,
        "vocab_size": config.n_vocab,
    }
    if config.rope_scaling is RopeScaling.LLAMA3:
        record["rope_scaling"] = {
            "factor": config.rope_scaling_factor,
            "high_freq_factor": config.rope_scaling_high_freq_factor,
            "low_freq_factor": config.rope_scaling_low_freq_factor,
            "original_max_position_embeddings": config.rope_scaling_original_n_ctx,
            "rope_type": "llama3",
        }
    _check_recorded(config, record)
    return dict(sorted(record.items()))


def _check_recorded(config: ModelConfig, record: Mapping[str, Any]) -> None:
    """Read the record back: what does not survive is what the published code cannot hold."""
    one_of("injection", str(config.injection), _INJECTIONS.values())
    olmo = config.norm_placement is NormPlacement.POST_BRANCH
    wanted = config.to_dict()
    got = _retrofit(record, NormPlacement.POST_BRANCH if olmo else NormPlacement.PRE, is_tied=False).to_dict()
    if lost := [key for key in wanted if wanted[key] != got[key] and key not in _NOT_RECORDED]:
        values = ", ".join(f"{key}={wanted[key]}" for key in lost)
        raise ConfigError(f"the published layout has no place for {values}; write our own layout")


def _config(record: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ModelConfig]:
    has = {
        suffix: any(name.endswith(f".{suffix}") for name in shapes)
        for suffix in ("attn.q_norm.weight", "norm_3.weight")
    }
    is_tied = "lm_head.weight" not in shapes
    if has["attn.q_norm.weight"]:
        return "retrofit OLMo-2", _retrofit(record, NormPlacement.POST_BRANCH, is_tied)
    if has["norm_3.weight"] and "rope_theta" not in record:
        return "Huginn", _huginn(record)
    return "retrofit Llama", _retrofit(record, NormPlacement.PRE, is_tied)


def _huginn(record: Mapping[str, Any]) -> ModelConfig:
    common, qk_bias = _common(record), flag(record, "qk_bias", False)
    if qk_bias and common["n_head"] != common["n_head_kv"]:
        raise ConfigError(
            f"qk_bias is stored with as many key heads as query heads, got n_head={common['n_head']}, "
            f"n_head_kv={common['n_head_kv']}"
        )
    return ModelConfig(
        **common,
        norm_placement=NormPlacement.ON_SUM,
        qk_bias=qk_bias,
        rope_style=RopeStyle.INTERLEAVED,
        rope_base=number(record, "rope_base", 50000),  # absent in the published file; default of its class
        n_ctx=whole(record, "block_size"),
        embed_scale=math.sqrt(common["n_embd"]),
        state_init=StateInit.NORMAL,
        state_std=math.sqrt(2 / 5),  # sqrt(2 / (5 n_embd)) * sqrt(n_embd)
        norm_after_core=True,
        tied_head=flag(record, "tie_embeddings", flag(record, "tie_word_embeddings", True)),
    )


def _retrofit(record: Mapping[str, Any], placement: NormPlacement, is_tied: bool) -> ModelConfig:
    common, init = _common(record), table(record, "init_values")
    std = number(init, "std", PUBLISHED_STD)
    return ModelConfig(
        **common,
        **rope_scaling(table(record, "rope_scaling")),
        norm_placement=placement,
        qk_norm=QkNorm.FULL if placement is NormPlacement.POST_BRANCH else QkNorm.NONE,
        rope_style=RopeStyle.HALF,
        rope_base=number(record, "rope_theta"),  # their rope_base is a leftover of Huginn's config
        n_ctx=whole(record, "max_position_embeddings"),  # and so is block_size
        embed_scale=number(init, "embed_scale", 1.0),
        state_init=StateInit.NORMAL if std else StateInit.ZEROS,
        state_std=std,
        # at depth 1 the published retrofits are worse than the model they came from
        auto_min_depth=min(2, common["default_depth"]),
        tied_head=is_tied,
    )


def _common(record: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that all published layouts share; two spellings of the head count are in circulation."""
    for key, expected in (("bias", False), ("nonlin_name", "SiLU"), ("mlp_class_name", "GatedMLP")):
        if record.get(key, expected) != expected:
            raise ConfigError(f"{key}={record[key]!r} is not supported; published models have {expected!r}")
    injection = one_of("injection_type", record.get("injection_type", "linear"), _INJECTIONS)
    n_embd = whole(record, "n_embd")
    n_head = whole(record, "n_heads" if "n_heads" in record else "num_attention_heads")
    mean = whole(record, "mean_recurrence")
    return {
        "n_prelude": whole(record, "n_layers_in_prelude", least=0),
        "n_core": whole(record, "n_layers_in_recurrent_block"),
        "n_coda": whole(record, "n_layers_in_coda", least=0),
        "n_embd": n_embd,
        "n_head": n_head,
        "n_head_kv": whole(record, "num_key_value_heads", n_head),
        "head_dim": whole(record, "head_dim", n_embd // n_head),
        "n_ff": whole(record, "intermediate_size"),
        "n_vocab": whole(record, "padded_vocab_size" if "padded_vocab_size" in record else "vocab_size"),
        "norm_eps": number(record, "norm_eps"),
        "injection": _INJECTIONS[injection],
        "default_depth": mean,
        "max_depth": max(MEASURE_DEPTH, 2 * mean),
        "trained_mean_depth": float(mean),
    }
