"""The toy engine: the whole model in a page of numpy. Slow, exact, no compiler, for tests and users' tests.

engine = ToyEngine(config, random_weights(config, seed=0), Limits(n_ctx=64, kv_depth=8))
"""

from collections.abc import Mapping

import numpy as np

from localdepth.config import Injection, ModelConfig, NormPlacement, QkNorm, RopeStyle
from localdepth.engine.base import F32, Ids, Limits
from localdepth.engine.eager import Attend, EagerEngine

__all__ = ["ToyEngine", "random_weights"]


def random_weights(config: ModelConfig, seed: int) -> dict[str, F32]:
    """Weights of a model that was never trained: norms near one, matrices N(0, 1 / columns)."""
    rng = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> F32:
        noise = rng.standard_normal(shape, np.float32)
        if name.endswith("norm.weight"):
            return 1 + np.float32(0.1) * noise
        return noise / np.float32(np.sqrt(shape[-1]))

    return {name: draw(name, shape) for name, shape in config.tensors().items()}


class ToyEngine(EagerEngine):
    """Numpy arithmetic for every model ``ModelConfig`` can describe.

    Args:
        config: what the model is.
        weights: float32 arrays by canonical name, shapes as in ``config.tensors()``.
        limits: machine settings; ``n_batch`` and ``n_threads`` do not matter here.
    """

    def __init__(self, config: ModelConfig, weights: Mapping[str, F32], limits: Limits) -> None:
        super().__init__(config, limits)
        self._weights = weights
        self._frequencies = np.array(config.rope_frequencies())

    def embed(self, ids: Ids) -> F32:
        return np.asarray(self._weights["token_embd.weight"][ids] * np.float32(self.config.embed_scale))

    def block(self, stage: str, layer: int, x: F32, start: int, attend: Attend) -> F32:
        prefix = f"{stage}.{layer}"
        x = self._join(
            x, self._attention(prefix, self._norm(x, f"{prefix}.attn_norm"), start, attend), f"{prefix}.attn"
        )
        return self._join(x, self._feed_forward(prefix, self._norm(x, f"{prefix}.ffn_norm")), f"{prefix}.ffn")

    def inject(self, s: F32, e: F32, r: int) -> F32:
        if self.config.injection is Injection.CONCAT_LINEAR:
            return self._linear(s, "injection.state") + self._linear(e, "injection.embeds")
        return s if self.config.injection is Injection.NONE and r > 0 else s + e

    def enter_coda(self, s: F32) -> F32:
        return self._norm(s, "output_norm") if self.config.norm_after_core else s

    def head(self, x: F32) -> F32:
        return self._linear(self._norm(x, "output_norm"), "token_embd" if self.config.tied_head else "output")

    def _join(self, x: F32, branch: F32, name: str) -> F32:
        if self.config.norm_placement is NormPlacement.ON_SUM:
            return self._norm(x + branch, f"{name}_post_norm")
        return x + self._norm(branch, f"{name}_post_norm")

    def _attention(self, prefix: str, x: F32, start: int, attend: Attend) -> F32:
        config = self.config
        q, k, v = (self._heads(x, f"{prefix}.attn_{side}") for side in "qkv")
        keys, values = attend(self._rotate(k, start), v)
        shared = config.n_head // config.n_head_kv
        keys, values = np.repeat(keys, shared, axis=1), np.repeat(values, shared, axis=1)
        scores = np.einsum("thd,shd->hts", self._rotate(q, start), keys) / np.sqrt(np.float32(config.head_dim))
        ahead = np.arange(len(keys))[None] > np.arange(start, start + len(x))[:, None]
        scores[:, ahead] = -np.inf
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        mixed = np.einsum("hts,shd->thd", weights, values).reshape(len(x), -1)
        return self._linear(mixed, f"{prefix}.attn_output")

    def _heads(self, x: F32, name: str) -> F32:
        """Queries, keys or values, normed over their whole width or head by head: [n, heads, head_dim]."""
        by_head = len(x), -1, self.config.head_dim
        out = self._linear(x, name)
        if self.config.qk_norm is QkNorm.HEAD:
            out = out.reshape(by_head)
        return self._norm(out, f"{name}_norm").reshape(by_head)

    def _feed_forward(self, prefix: str, x: F32) -> F32:
        gate = self._linear(x, f"{prefix}.ffn_gate")
        gated = gate / (1 + np.exp(-np.clip(gate, -80, None))) * self._linear(x, f"{prefix}.ffn_up")
        return self._linear(gated, f"{prefix}.ffn_down")

    def _rotate(self, x: F32, start: int) -> F32:
        angles = np.arange(start, start + len(x))[:, None, None] * self._frequencies
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        pairs = (slice(0, None, 2), slice(1, None, 2))
        if self.config.rope_style is RopeStyle.HALF:
            pairs = (slice(0, self.config.head_dim // 2), slice(self.config.head_dim // 2, None))
        a, b = x[..., pairs[0]], x[..., pairs[1]]
        out = np.empty_like(x)
        out[..., pairs[0]], out[..., pairs[1]] = a * cos - b * sin, a * sin + b * cos
        return out

    def _linear(self, x: F32, name: str) -> F32:
        out: F32 = x @ self._weights[f"{name}.weight"].T
        bias = self._weights.get(f"{name}.bias")
        return out if bias is None else out + bias

    def _norm(self, x: F32, name: str) -> F32:
        """RMS norm where the model has one of this name, else x itself."""
        weight = self._weights.get(f"{name}.weight")
        if weight is None:
            return x
        rms = np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + np.float32(self.config.norm_eps))
        return np.asarray(x / rms * weight)
