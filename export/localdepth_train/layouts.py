"""Which layouts exist on disk: tensor names and configuration keys, one row each, mapped to ours.

``huginn_raven`` is shared by three different models; they are told apart by their tensors. The names here
are the foreign ones; nothing outside ``checkpoint`` sees them.

Source of names and semantics: seal-rg/recurrent-pretraining and mcleish7/retrofitting-recurrence (Apache-2.0).
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localdepth.config import (
    MEASURE_DEPTH,
    PLAIN_MODELS,
    Injection,
    ModelConfig,
    NormPlacement,
    QkNorm,
    RopeScaling,
    RopeStyle,
    StateInit,
    plain_model,
)
from localdepth.errors import CheckpointError, ConfigError

__all__ = ["FORMAT_VERSION", "Layout", "Part", "published_parts", "recognise", "some"]

FORMAT_VERSION = 1  # of our own layout
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
_NO_JUNK = re.compile(r"(?!)")


@dataclass(frozen=True, slots=True)
class Part:
    """Where one of our tensors lies inside a stored one."""

    name: str  # stored tensor
    rows: tuple[int, int] | None = None  # first and one past the last; None: all
    cols: tuple[int, int] | None = None
    index: int | None = None  # qk_bias packs [q, k] in its first axis; the rest is flattened


@dataclass(frozen=True, slots=True)
class Layout:
    """A recognised checkpoint: what it is, and where each of our tensors lies in it."""

    kind: str  # for people: "Huginn", "retrofit OLMo-2", ...
    config: ModelConfig
    parts: dict[str, Part]

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape each stored tensor must have to hold its parts; packed biases are given as one row each."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in self.config.tensors().items():
            part = self.parts[name]
            whole = (2, *shape) if part.index is not None else shape
            rows = part.rows[1] if part.rows else whole[0]
            cols = (part.cols[1],) if part.cols else whole[1:]
            known = shapes.get(part.name, ())
            shapes[part.name] = max(known, (rows, *cols))
        return shapes


def published_parts(config: ModelConfig) -> dict[str, Part]:
    """Our tensor names -> the published tensors that hold them, for the ``huginn_raven`` layouts."""
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


def recognise(record: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], path: Path) -> Layout:
    """Tell which layout a directory has from its config ``record`` and its tensors' ``shapes``.

    Raises:
        CheckpointError: for another model type, a combination of tensors that is no known model, or bad fields.
    """
    kind = record.get("model_type")
    if kind == "localdepth":
        config = _own_config(record, path)
        parts = {name: Part(name) for name in config.tensors()}
        junk = _NO_JUNK
        label = "localdepth"
    elif kind == "huginn_raven":
        label, config = _published_config(record, shapes, path)
        parts = published_parts(config)
        junk = _HUGINN_JUNK if config.norm_placement is NormPlacement.ON_SUM else _RETROFIT_JUNK
    else:
        raise CheckpointError(_foreign(kind, path))
    wanted = {part.name for part in parts.values()}
    missing = sorted(wanted - set(shapes))
    extra = sorted(name for name in set(shapes) - wanted if not junk.search(name))
    if missing or extra:
        raise CheckpointError(
            f"the tensors in {path} are not those of a {label} model: missing {some(missing)}; unknown {some(extra)}"
        )
    return Layout(label, config, parts)


def _own_config(record: Mapping[str, Any], path: Path) -> ModelConfig:
    if record.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path / 'config.json'} has format_version {record.get('format_version')!r}; this version reads "
            f"{FORMAT_VERSION}, update localdepth"
        )
    fields = {key: value for key, value in record.items() if key not in ("model_type", "format_version")}
    try:
        return ModelConfig.from_dict(fields)
    except ConfigError as error:
        raise CheckpointError(f"{path / 'config.json'}: {error}") from error


def _published_config(
    record: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], path: Path
) -> tuple[str, ModelConfig]:
    """Tell the three published block types apart by their tensors: they share one ``model_type``."""
    has = {
        suffix: any(name.endswith(f".{suffix}") for name in shapes)
        for suffix in ("attn.q_norm.weight", "norm_3.weight")
    }
    try:
        if has["attn.q_norm.weight"]:
            return "retrofit OLMo-2", _retrofit(record, shapes, NormPlacement.POST_BRANCH, QkNorm.FULL)
        if has["norm_3.weight"] and "rope_theta" not in record:
            return "Huginn", _huginn(record)
        return "retrofit Llama", _retrofit(record, shapes, NormPlacement.PRE, QkNorm.NONE)
    except KeyError as error:
        raise CheckpointError(f"{path / 'config.json'} lacks {error}; is the download complete?") from error
    except (ConfigError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{path / 'config.json'}: {error}") from error


def _huginn(record: Mapping[str, Any]) -> ModelConfig:
    n_embd = _int(record, "n_embd")
    return ModelConfig(
        **_common(record),
        norm_placement=NormPlacement.ON_SUM,
        qk_bias=bool(record.get("qk_bias", False)),
        rope_style=RopeStyle.INTERLEAVED,
        rope_base=float(record.get("rope_base", 50000)),  # absent in the published file; default of its class
        n_ctx=_int(record, "block_size"),
        embed_scale=math.sqrt(n_embd),
        state_init=StateInit.NORMAL,
        state_std=math.sqrt(2 / 5),  # sqrt(2 / (5 n_embd)) * sqrt(n_embd)
        norm_after_core=True,
        tied_head=bool(record.get("tie_embeddings", record.get("tie_word_embeddings", True))),
    )


def _retrofit(
    record: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], placement: NormPlacement, qk_norm: QkNorm
) -> ModelConfig:
    return ModelConfig(
        **_common(record),
        **_rope_scaling(record.get("rope_scaling")),
        norm_placement=placement,
        qk_norm=qk_norm,
        rope_style=RopeStyle.HALF,
        rope_base=float(record["rope_theta"]),  # their rope_base is a leftover of Huginn's config
        n_ctx=_int(record, "max_position_embeddings"),  # and so is block_size
        embed_scale=float(record.get("init_values", {}).get("embed_scale", 1.0)),
        state_init=StateInit.NORMAL,
        state_std=float(record.get("init_values", {}).get("std", math.sqrt(2 / (5 * 5280)))),
        auto_min_depth=2,  # at depth 1 the published retrofits are worse than the model they came from
        tied_head="lm_head.weight" not in shapes,
    )


def _common(record: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that all published layouts share; two spellings of the head count are in circulation."""
    for key, expected in (("bias", False), ("nonlin_name", "SiLU"), ("mlp_class_name", "GatedMLP")):
        if record.get(key, expected) != expected:
            raise ConfigError(f"{key}={record[key]!r} is not supported; published models have {expected!r}")
    injection = record.get("injection_type", "linear")
    if injection not in _INJECTIONS:
        raise ConfigError(f"injection_type={injection!r} is not one of {', '.join(_INJECTIONS)}")
    n_embd = _int(record, "n_embd")
    n_head = _int(record, "n_heads" if "n_heads" in record else "num_attention_heads")
    mean = _int(record, "mean_recurrence")
    return {
        "n_prelude": _int(record, "n_layers_in_prelude"),
        "n_core": _int(record, "n_layers_in_recurrent_block"),
        "n_coda": _int(record, "n_layers_in_coda"),
        "n_embd": n_embd,
        "n_head": n_head,
        "n_head_kv": _int(record, "num_key_value_heads") if "num_key_value_heads" in record else n_head,
        "head_dim": _int(record, "head_dim") if record.get("head_dim") else n_embd // n_head,
        "n_ff": _int(record, "intermediate_size"),
        "n_vocab": _int(record, "padded_vocab_size" if "padded_vocab_size" in record else "vocab_size"),
        "norm_eps": float(record["norm_eps"]),
        "injection": _INJECTIONS[injection],
        "default_depth": mean,
        "max_depth": max(MEASURE_DEPTH, 2 * mean),
        "trained_mean_depth": float(mean),
    }


def _rope_scaling(record: Mapping[str, Any] | None) -> dict[str, Any]:
    kind = None if record is None else record.get("rope_type", record.get("type"))
    if record is None or kind in (None, "default"):
        return {}
    if kind != "llama3":
        raise ConfigError(f"rope_scaling of type {kind!r} is not supported; only llama3 is")
    return {
        "rope_scaling": RopeScaling.LLAMA3,
        "rope_scaling_factor": float(record["factor"]),
        "rope_scaling_low_freq_factor": float(record["low_freq_factor"]),
        "rope_scaling_high_freq_factor": float(record["high_freq_factor"]),
        "rope_scaling_original_n_ctx": _int(record, "original_max_position_embeddings"),
    }


def _int(record: Mapping[str, Any], key: str) -> int:
    value = record[key]
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{key}={value!r} must be a whole number")
    return value


def _foreign(kind: Any, path: Path) -> str:
    if isinstance(kind, str) and kind.startswith(PLAIN_MODELS):
        return f"{path} holds a {plain_model(kind, 'it')}"
    return f'{path} has model_type {kind!r}; we read "huginn_raven" (Huginn, retrofits) and "localdepth"'


def some(names: Iterable[str]) -> str:
    """The first few of ``names`` for an error message."""
    names = list(names)
    return (", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")) or "none"
