"""What a looped model is: sizes and options, read from its file once, checked once, then frozen.

A model is described by fields, never by a family name. The same flat record is written to a GGUF
file (prefix ``localdepth.``) and to our own ``config.json``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from numbers import Integral
from typing import Any

from localdepth.errors import ConfigError, DepthError

__all__ = [
    "MEASURE_DEPTH",
    "PLAIN_MODELS",
    "STAGES",
    "Activation",
    "Injection",
    "ModelConfig",
    "NormPlacement",
    "QkNorm",
    "RopeScaling",
    "RopeStyle",
    "StateInit",
    "plain_model",
]

STAGES = ("prelude", "core", "coda")
MEASURE_DEPTH = 64  # measurements (logits, states, verify, curve) may always go this deep

# No published model comes near these; a file that does is damaged or hostile.
_LIMITS = {
    "n_prelude": 4096,
    "n_core": 4096,
    "n_coda": 4096,
    "n_embd": 1 << 17,
    "n_head": 1 << 13,
    "n_head_kv": 1 << 13,
    "head_dim": 1 << 12,
    "n_ff": 1 << 20,
    "n_vocab": 1 << 20,
    "n_ctx": 1 << 24,
    "max_depth": 4096,
    "rope_scaling_original_n_ctx": 1 << 24,
}

# Fields that came after the first files: those lack them, and mean the default.
_LATER = frozenset({"v_bias"})

# Beginnings of the names that models without a loop give themselves, in GGUF and in Hugging Face configs.
PLAIN_MODELS = ("llama", "mistral", "olmo2", "qwen", "gemma", "phi")


class Injection(StrEnum):
    """How the embeds e enter each pass."""

    CONCAT_LINEAR = "concat_linear"  # s <- W [s ; e], state half first
    ADD = "add"  # s <- s + e
    NONE = "none"  # e enters once: s_0 <- s_0 + e


class NormPlacement(StrEnum):
    """Where a block normalises."""

    PRE = "pre"  # x + f(norm(x)): Llama
    POST_BRANCH = "post_branch"  # x + norm(f(x)): OLMo-2
    ON_SUM = "on_sum"  # norm(x + f(norm(x))): Huginn


class QkNorm(StrEnum):
    """RMS norm on queries and keys, before the rotation."""

    NONE = "none"
    FULL = "full"  # over the full projected width, before the head split: OLMo-2
    HEAD = "head"  # over each head by itself, one weight for all heads: Qwen3


class RopeStyle(StrEnum):
    """Which coordinates rotate together."""

    INTERLEAVED = "interleaved"  # (0,1), (2,3), ...: Huginn
    HALF = "half"  # (0, D/2), (1, D/2+1), ...: Llama


class RopeScaling(StrEnum):
    """Rule that rescales the rotation frequencies for long contexts."""

    NONE = "none"
    LLAMA3 = "llama3"


class StateInit(StrEnum):
    """What s_0 is drawn from when a state seed is given; without a seed s_0 is zero."""

    ZEROS = "zeros"
    NORMAL = "normal"


class Activation(StrEnum):
    """Gate of the feed-forward network: act(gate(x)) * up(x)."""

    SILU = "silu"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes and options of one looped model.

    Raises:
        ConfigError: when a field is out of range or two fields contradict each other.
    """

    n_prelude: int
    n_core: int
    n_coda: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    n_vocab: int
    n_ctx: int
    norm_eps: float
    injection: Injection = Injection.CONCAT_LINEAR
    norm_placement: NormPlacement = NormPlacement.PRE
    qk_norm: QkNorm = QkNorm.NONE
    qk_bias: bool = False
    v_bias: bool = False
    rope_style: RopeStyle = RopeStyle.HALF
    rope_base: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling.NONE
    rope_scaling_factor: float = 1.0
    rope_scaling_low_freq_factor: float = 1.0
    rope_scaling_high_freq_factor: float = 4.0
    rope_scaling_original_n_ctx: int = 8192
    embed_scale: float = 1.0
    state_init: StateInit = StateInit.ZEROS
    state_std: float = 0.0
    norm_after_core: bool = False
    tied_head: bool = False
    activation: Activation = Activation.SILU
    default_depth: int
    max_depth: int
    auto_min_depth: int = 1
    trained_mean_depth: float = 0.0  # 0: unknown

    def __post_init__(self) -> None:
        for item in fields(self):
            _check_type(item.name, getattr(self, item.name), item.type)
        for name in ("n_core", "n_embd", "n_head", "n_head_kv", "head_dim", "n_ff", "n_vocab", "n_ctx"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        for name, limit in _LIMITS.items():
            if not 0 <= getattr(self, name) <= limit:
                raise ConfigError(f"{name}={getattr(self, name)} is outside 0..{limit}; the file is damaged")
        if self.n_head % self.n_head_kv:
            raise ConfigError(f"n_head={self.n_head} is not a multiple of n_head_kv={self.n_head_kv}")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim} is odd; rotary positions need pairs")
        for name in ("norm_eps", "rope_base", "embed_scale", "rope_scaling_factor"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be positive")
        if self.state_std < 0 or self.trained_mean_depth < 0:
            raise ConfigError(
                f"state_std={self.state_std} and trained_mean_depth={self.trained_mean_depth} must not be negative"
            )
        if self.rope_scaling is RopeScaling.LLAMA3 and not (
            0 < self.rope_scaling_low_freq_factor < self.rope_scaling_high_freq_factor
            and self.rope_scaling_original_n_ctx >= 1
        ):
            raise ConfigError(
                f"llama3 rope scaling needs 0 < low_freq_factor < high_freq_factor and original_n_ctx >= 1, got "
                f"{self.rope_scaling_low_freq_factor}, {self.rope_scaling_high_freq_factor}, "
                f"{self.rope_scaling_original_n_ctx}"
            )
        if not 1 <= self.auto_min_depth <= self.default_depth <= self.max_depth:
            raise ConfigError(
                f"depths must satisfy 1 <= auto_min_depth <= default_depth <= max_depth, got "
                f"{self.auto_min_depth}, {self.default_depth}, {self.max_depth}"
            )

    @property
    def n_embd_q(self) -> int:
        """Width of all query heads together."""
        return self.n_head * self.head_dim

    @property
    def n_embd_kv(self) -> int:
        """Width of all key heads together (and of all value heads)."""
        return self.n_head_kv * self.head_dim

    def n_layer(self, stage: str) -> int:
        """Layers of ``stage``, one of ``STAGES``."""
        return {"prelude": self.n_prelude, "core": self.n_core, "coda": self.n_coda}[stage]

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor such a model has, by name, with its row-major shape ``[out, in]`` or ``[n]``."""
        shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (self.n_vocab, self.n_embd)}
        for stage in STAGES:
            if stage == "core" and self.injection is Injection.CONCAT_LINEAR:
                shapes["injection.state.weight"] = (self.n_embd, self.n_embd)
                shapes["injection.embeds.weight"] = (self.n_embd, self.n_embd)
            for i in range(self.n_layer(stage)):
                shapes |= {f"{stage}.{i}.{name}": shape for name, shape in self._block_tensors().items()}
        shapes["output_norm.weight"] = (self.n_embd,)
        if not self.tied_head:
            shapes["output.weight"] = (self.n_vocab, self.n_embd)
        return shapes

    def _block_tensors(self) -> dict[str, tuple[int, ...]]:
        n, q, kv, ff = self.n_embd, self.n_embd_q, self.n_embd_kv, self.n_ff
        norms = self.qk_norm is not QkNorm.NONE
        q_norm, k_norm = (q, kv) if self.qk_norm is QkNorm.FULL else (self.head_dim, self.head_dim)
        before = self.norm_placement is not NormPlacement.POST_BRANCH
        after = self.norm_placement is not NormPlacement.PRE
        return {
            **({"attn_norm.weight": (n,)} if before else {}),
            "attn_q.weight": (q, n),
            "attn_k.weight": (kv, n),
            "attn_v.weight": (kv, n),
            **({"attn_q.bias": (q,), "attn_k.bias": (kv,)} if self.qk_bias else {}),
            **({"attn_v.bias": (kv,)} if self.v_bias else {}),
            **({"attn_q_norm.weight": (q_norm,), "attn_k_norm.weight": (k_norm,)} if norms else {}),
            "attn_output.weight": (n, q),
            **({"attn_post_norm.weight": (n,)} if after else {}),
            **({"ffn_norm.weight": (n,)} if before else {}),
            "ffn_gate.weight": (ff, n),
            "ffn_up.weight": (ff, n),
            "ffn_down.weight": (n, ff),
            **({"ffn_post_norm.weight": (n,)} if after else {}),
        }

    @property
    def n_params(self) -> int:
        """Stored parameters; the core counts once."""
        return sum(math.prod(shape) for shape in self.tensors().values())

    @property
    def measure_depth(self) -> int:
        """Deepest depth of measurements such as logits, states, verify and curve."""
        return max(MEASURE_DEPTH, self.max_depth)

    def check_depth(self, depth: int, *, measure: bool = False) -> int:
        """Return ``depth`` if this model may run it.

        Args:
            depth: passes of the core, at least 1.
            measure: allow up to ``measure_depth`` instead of ``max_depth``.
        Raises:
            DepthError: for anything that is not an int inside the range.
        """
        top = self.measure_depth if measure else self.max_depth
        if isinstance(depth, bool) or not isinstance(depth, Integral):
            raise DepthError(
                f"depth={depth!r} is not a whole number in 1..{top}"
                + ("" if measure else ", auto, quick, deep or a policy")
            )
        if not 1 <= depth <= top:
            remedy = f"pass depth={max(1, min(depth, top))}" + ("" if measure else ' or "auto"')
            raise DepthError(f"depth={depth} is outside 1..{top} for this model; {remedy}")
        return int(depth)

    def rope_frequencies(self) -> list[float]:
        """Angle per position of each rotating pair, after scaling: ``[head_dim / 2]``.

        Source: Su et al. 2021; the llama3 rule as published with Llama 3.1.
        """
        plain = [self.rope_base ** (-2 * i / self.head_dim) for i in range(self.head_dim // 2)]
        if self.rope_scaling is RopeScaling.NONE:
            return plain
        low, high = self.rope_scaling_low_freq_factor, self.rope_scaling_high_freq_factor
        scaled = []
        for frequency in plain:
            turns = self.rope_scaling_original_n_ctx * frequency / (2 * math.pi)
            keep = min(1.0, max(0.0, (turns - low) / (high - low)))  # 1: fast pair, 0: slow pair
            scaled.append(frequency * (keep + (1 - keep) / self.rope_scaling_factor))
        return scaled

    def to_dict(self) -> dict[str, Any]:
        """The record as plain values, every field present, in order of declaration."""
        return {
            item.name: str(value) if isinstance(value := getattr(self, item.name), StrEnum) else value
            for item in fields(self)
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "ModelConfig":
        """Inverse of ``to_dict``.

        Raises:
            ConfigError: for a missing or unknown field, a wrong type, or values that contradict each other.
        """
        known = {item.name: item for item in fields(cls)}
        if unknown := sorted(set(record) - set(known)):
            raise ConfigError(f"unknown model fields {', '.join(unknown)}; written by a newer version of localdepth?")
        if missing := [name for name in known if name not in record and name not in _LATER]:
            raise ConfigError(f"missing model fields {', '.join(missing)}")
        return cls(**{name: _revive(name, value, known[name].type) for name, value in record.items()})


def plain_model(kind: str, where: str) -> str:
    """What to tell someone who brings a model without a loop: what it is, and how it becomes one of ours."""
    return (
        f"plain {kind:.40} model without a core to repeat; make {where} a looped one, then train it: "
        "localdepth retrofit BASE -o OUT --prelude 0-3 --core 10-17 --coda 18-21 (or whichever layers BASE has)"
    )


def _revive(name: str, value: Any, kind: Any) -> Any:
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        try:
            return kind(value)
        except ValueError:
            choices = ", ".join(kind)
            raise ConfigError(f"{name}={value!r} is not one of {choices}") from None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


def _check_type(name: str, value: Any, kind: Any) -> None:
    right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if not right:
        raise ConfigError(f"{name}={value!r} must be of type {kind.__name__}")
    if kind is float and not math.isfinite(value):
        raise ConfigError(f"{name}={value} must be finite")
