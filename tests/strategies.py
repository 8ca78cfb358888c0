"""Hypothesis strategies for the objects many tests need: small valid models over the whole option space."""

from typing import Any

import gguf
import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from localdepth.config import (
    Activation,
    Injection,
    ModelConfig,
    NormPlacement,
    QkNorm,
    RopeScaling,
    RopeStyle,
    StateInit,
)
from localdepth.quant import Quant

__all__ = ["configs", "json_values", "quants", "stored"]


def _floats(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False, allow_subnormal=False)


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    """Models of at most six layers and some hundred thousand numbers; every option takes every value."""
    n_head_kv = draw(st.integers(1, 2))
    auto_min_depth, default_depth, max_depth = sorted(draw(st.tuples(*[st.integers(1, 70)] * 3)))
    state_init = draw(st.sampled_from(StateInit))
    low_freq_factor = draw(_floats(0.5, 2.0))
    return ModelConfig(
        n_prelude=draw(st.integers(0, 2)),
        n_core=draw(st.integers(1, 2)),
        n_coda=draw(st.integers(0, 2)),
        n_embd=draw(st.sampled_from([6, 32, 48, 256])),
        n_head=n_head_kv * draw(st.integers(1, 2)),
        n_head_kv=n_head_kv,
        head_dim=draw(st.sampled_from([2, 6, 16])),
        n_ff=draw(st.sampled_from([5, 32, 96, 256])),
        n_vocab=draw(st.integers(3, 40)),
        n_ctx=draw(st.integers(1, 4096)),
        norm_eps=draw(_floats(1e-8, 1e-3)),
        injection=draw(st.sampled_from(Injection)),
        norm_placement=draw(st.sampled_from(NormPlacement)),
        qk_norm=draw(st.sampled_from(QkNorm)),
        qk_bias=draw(st.booleans()),
        v_bias=draw(st.booleans()),
        rope_style=draw(st.sampled_from(RopeStyle)),
        rope_base=draw(_floats(10.0, 1e6)),
        rope_scaling=draw(st.sampled_from(RopeScaling)),
        rope_scaling_factor=draw(_floats(1.0, 32.0)),
        rope_scaling_low_freq_factor=low_freq_factor,
        rope_scaling_high_freq_factor=low_freq_factor + draw(_floats(0.5, 4.0)),
        rope_scaling_original_n_ctx=draw(st.integers(1, 8192)),
        embed_scale=draw(_floats(0.1, 80.0)),
        state_init=state_init,
        state_std=draw(_floats(0.01, 2.0)) if state_init is StateInit.NORMAL else 0.0,
        norm_after_core=draw(st.booleans()),
        tied_head=draw(st.booleans()),
        activation=draw(st.sampled_from(Activation)),
        default_depth=default_depth,
        max_depth=max_depth,
        auto_min_depth=auto_min_depth,
        trained_mean_depth=draw(_floats(0.0, 64.0)),
    )


def json_values(*keys: str) -> st.SearchStrategy[Any]:
    """Whatever a JSON file may hold, numbers that no float can among them; records have some of ``keys``, too."""
    numbers = st.integers() | st.floats() | st.sampled_from([10**400, -(10**400)])
    names = st.text(max_size=3) | st.sampled_from(keys) if keys else st.text(max_size=3)
    return st.recursive(
        st.none() | st.booleans() | numbers | names,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4),
        max_leaves=8,
    )


def quants(config: ModelConfig) -> st.SearchStrategy[dict[str, Quant]]:
    """A quant for every tensor of ``config``, one that its shape can hold."""
    return st.fixed_dictionaries(
        {name: st.sampled_from([q for q in Quant if q.fits(shape)]) for name, shape in config.tensors().items()}
    )


def stored(config: ModelConfig, kinds: dict[str, Quant], seed: int = 0) -> dict[str, NDArray[np.uint8]]:
    """Random weights as the bytes a file holds."""
    rng = np.random.default_rng(seed)
    return {name: _stored(rng, shape, kinds[name]) for name, shape in config.tensors().items()}


def _stored(rng: np.random.Generator, shape: tuple[int, ...], quant: Quant) -> NDArray[np.uint8]:
    if quant in (Quant.Q4_K, Quant.Q5_K, Quant.Q6_K):  # the gguf package cannot make these
        return rng.integers(0, 0x3C, quant.n_bytes(shape), dtype=np.uint8)  # no byte pair is a huge float16
    values = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.1)
    return gguf.quants.quantize(values, quant.ggml_type).view(np.uint8).reshape(-1)
