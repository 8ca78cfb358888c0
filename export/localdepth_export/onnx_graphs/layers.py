"""The pieces of a looped model as nodes: one definition for every family that ``ModelConfig`` describes.

Shapes in comments: B batch, T tokens, P positions a cache holds, H heads, D head_dim, E n_embd, V n_vocab. A cache is
a pair of tensors [B, n_head_kv, P, kv_head_dim]. ONNX Runtime writes new rows behind those that are there; where past
and present are bound to the same buffer, of P positions or more than are needed, it does so in place.

Source: the reference model, ``localdepth_train.reference``, whose names this follows.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from localdepth.config import Injection, ModelConfig, NormPlacement, QkNorm, RopeStyle
from localdepth.onnx_folder.layout import BLOCK, scales_of
from localdepth.onnx_folder.ports import kv_head_dim
from localdepth_export.onnx_graphs.builder import FLOAT, Builder, Value

__all__ = ["Cache", "Layers", "Place"]

_ACCURACY_LEVEL = 4  # MatMulNBits multiplies in int8


class Cache(NamedTuple):
    """Keys and values of one layer."""

    key: Value
    value: Value


class Place(NamedTuple):
    """Where the new tokens stand in their sequence."""

    positions: Value  # int64: of the first new token, [1], or of each, [B,T]
    total: Value  # int32 [1]: positions, new ones included
    last: Value  # int32 [B]: position of the last new token


class _Stream(NamedTuple):
    """What runs along the layers: a value, and a branch that is still to be added to it."""

    base: Value
    branch: Value | None = None


class Layers:
    """Writes the layers of one model into one scope, for tokens that stand at ``place``."""

    def __init__(self, config: ModelConfig, scope: Builder, place: Place) -> None:
        self.config, self.scope, self.place = config, scope, place

    def inside(self, body: Builder) -> "Layers":
        """The same, writing into a body of the scope."""
        return Layers(self.config, body, self.place)

    def embed(self, ids: Value) -> Value:
        """Token vectors: ids [B,T] -> [B,T,E]."""
        config, scope = self.config, self.scope
        vectors = self._rows("token_embd.weight", ids)
        if config.embed_scale == 1:
            return vectors
        return scope.op("Mul", vectors, scope.constant(config.embed_scale, np.float32))

    def stage(self, name: str, x: Value, caches: Sequence[Cache]) -> tuple[Value, list[Cache]]:
        """All layers of a stage on x [B,T,E], and what their caches become."""
        stream, present = _Stream(x), []
        for i, cache in enumerate(caches):
            stream, cache = self._block(f"{name}.{i}", stream, cache)
            present.append(cache)
        return self._sum(stream), present

    def injected(self, embeds: Value) -> Value:
        """What of the embeds enters a pass, the same for every pass that they enter: [B,T,E]."""
        if self.config.injection is Injection.CONCAT_LINEAR:
            return self._linear(embeds, "injection.embeds")
        return embeds

    def inject(self, state: Value, injected: Value) -> Value:
        """What a pass feeds its first layer, both [B,T,E]."""
        if self.config.injection is Injection.CONCAT_LINEAR:
            state = self._linear(state, "injection.state")
        return self.scope.op("Add", state, injected)

    def enter_coda(self, state: Value) -> Value:
        """What the coda starts from."""
        return self._norm(state, "output_norm") if self.config.norm_after_core else state

    def head(self, x: Value) -> Value:
        """Logits of the coda's output: [..., E] -> [..., V]."""
        return self._linear(self._norm(x, "output_norm"), "token_embd" if self.config.tied_head else "output")

    def _block(self, prefix: str, stream: _Stream, cache: Cache) -> tuple[_Stream, Cache]:
        x, stream = self._enter(stream, f"{prefix}.attn_norm")
        mixed, cache = self._attention(prefix, x, cache)
        stream = self._join(stream, mixed, f"{prefix}.attn_post_norm")
        x, stream = self._enter(stream, f"{prefix}.ffn_norm")
        return self._join(stream, self._feed_forward(prefix, x), f"{prefix}.ffn_post_norm"), cache

    def _enter(self, stream: _Stream, norm: str) -> tuple[Value, _Stream]:
        """What a branch starts from, and the stream that it will join."""
        if self.config.norm_placement is NormPlacement.POST_BRANCH:
            return stream.base, stream
        if stream.branch is None:
            return self._norm(stream.base, norm), stream
        normed, summed = self._norm_of_sum(stream.base, stream.branch, norm, outputs=(0, 3))
        return normed, _Stream(summed)

    def _join(self, stream: _Stream, branch: Value, norm: str) -> _Stream:
        match self.config.norm_placement:
            case NormPlacement.PRE:
                return _Stream(stream.base, branch)
            case NormPlacement.POST_BRANCH:
                return _Stream(self.scope.op("Add", stream.base, self._norm(branch, norm)))
            case NormPlacement.ON_SUM:
                return _Stream(*self._norm_of_sum(stream.base, branch, norm, outputs=(0,)))

    def _sum(self, stream: _Stream) -> Value:
        return stream.base if stream.branch is None else self.scope.op("Add", stream.base, stream.branch)

    def _attention(self, prefix: str, x: Value, cache: Cache) -> tuple[Value, Cache]:
        config = self.config
        q, k, v = (self._linear(x, f"{prefix}.attn_{side}") for side in "qkv")
        if config.qk_norm is not QkNorm.NONE:
            q = self._qk_norm(q, config.n_head, f"{prefix}.attn_q_norm")
            k = self._qk_norm(k, config.n_head_kv, f"{prefix}.attn_k_norm")
        q, k = self._rotate(q, config.n_head), self._rotate(k, config.n_head_kv)
        mixed, *present = self.scope.ops(
            "GroupQueryAttention",
            self._pad_heads(q, config.n_head),
            self._pad_heads(k, config.n_head_kv),
            self._pad_heads(v, config.n_head_kv),
            *cache,
            self.place.last,
            self.place.total,
            outputs=(0, 1, 2),
            num_heads=config.n_head,
            kv_num_heads=config.n_head_kv,
            scale=1 / math.sqrt(config.head_dim),
        )
        return self._linear(self._cut_heads(mixed), f"{prefix}.attn_output"), Cache(*present)

    def _qk_norm(self, x: Value, n_head: int, name: str) -> Value:
        """Queries or keys [B,T,H*D], normed over their whole width or head by head."""
        if self.config.qk_norm is QkNorm.FULL:
            return self._norm(x, name)
        heads = self._norm(self._split(x, n_head, self.config.head_dim), name)
        return self._merge(heads, n_head, self.config.head_dim)

    def _rotate(self, x: Value, n_head: int) -> Value:
        """Queries or keys [B,T,H*D] at their positions. Outside of the attention, which could, but not any size."""
        return self.scope.op(
            "RotaryEmbedding",
            x,
            self.place.positions,
            self.scope.stored("rope.cos"),
            self.scope.stored("rope.sin"),
            num_heads=n_head,
            rotary_embedding_dim=self.config.head_dim,
            interleaved=int(self.config.rope_style is RopeStyle.INTERLEAVED),
        )

    def _pad_heads(self, x: Value, n_head: int) -> Value:
        """[B,T,H*D] -> [B,T,H*kv_head_dim]; zeros change no product."""
        scope, size, padded = self.scope, self.config.head_dim, kv_head_dim(self.config)
        if padded == size:
            return x
        ends = scope.constant([0] * 7 + [padded - size])
        return self._merge(scope.op("Pad", self._split(x, n_head, size), ends), n_head, padded)

    def _cut_heads(self, x: Value) -> Value:
        """[B,T,H*kv_head_dim] -> [B,T,H*D]."""
        n_head, size, padded = self.config.n_head, self.config.head_dim, kv_head_dim(self.config)
        if padded == size:
            return x
        return self._merge(self._first(self._split(x, n_head, padded), size), n_head, size)

    def _first(self, x: Value, n: int) -> Value:
        """The first ``n`` numbers of the last dimension."""
        return self.scope.op("Slice", x, *(self.scope.constant([i]) for i in (0, n, -1)))

    def _split(self, x: Value, n_head: int, size: int) -> Value:
        """[B,T,H*size] -> [B,T,H,size]."""
        return self.scope.op("Reshape", x, self.scope.constant([0, 0, n_head, size]))

    def _merge(self, heads: Value, n_head: int, size: int) -> Value:
        """[B,T,H,size] -> [B,T,H*size]."""
        return self.scope.op("Reshape", heads, self.scope.constant([0, 0, n_head * size]))

    def _feed_forward(self, prefix: str, x: Value) -> Value:
        scope, gate = self.scope, self._linear(x, f"{prefix}.ffn_gate")
        opened = scope.op("Mul", gate, scope.op("Sigmoid", gate))
        return self._linear(scope.op("Mul", opened, self._linear(x, f"{prefix}.ffn_up")), f"{prefix}.ffn_down")

    def _norm(self, x: Value, name: str) -> Value:
        weight = self.scope.weight(f"{name}.weight")
        return self.scope.op("SimplifiedLayerNormalization", x, weight, axis=-1, epsilon=self.config.norm_eps)

    def _norm_of_sum(self, x: Value, branch: Value, name: str, outputs: tuple[int, ...]) -> list[Value]:
        """The normed sum, output 0, and the sum itself, output 3."""
        weight = self.scope.weight(f"{name}.weight")
        return self.scope.ops(
            "SkipSimplifiedLayerNormalization", x, branch, weight, outputs=outputs, epsilon=self.config.norm_eps
        )

    def _linear(self, x: Value, name: str) -> Value:
        """x W^T + b, where the model has a bias of this name."""
        product = self._product(x, f"{name}.weight")
        if f"{name}.bias" not in self.scope.layout:
            return product
        return self.scope.op("Add", product, self.scope.weight(f"{name}.bias"))

    def _product(self, x: Value, name: str) -> Value:
        scope = self.scope
        if not scope.layout.is_blocks(name):
            return scope.op("FusedMatMul", x, scope.weight(name), transB=1)
        n_rows, n_columns = self.config.tensors()[name]
        return scope.op(
            "MatMulNBits",
            x,
            scope.stored(name),
            scope.stored(scales_of(name)),
            N=n_rows,
            K=n_columns,
            bits=scope.layout.bits[name],
            block_size=BLOCK,
            accuracy_level=_ACCURACY_LEVEL,
        )

    def _rows(self, name: str, ids: Value) -> Value:
        """Rows of a matrix, in float32."""
        scope, piece = self.scope, self.scope.layout[name]
        if not scope.layout.is_blocks(name):
            rows = scope.op("Gather", scope.stored(name), ids)
            return rows if piece.dtype == np.float32 else scope.op("Cast", rows, to=FLOAT)
        n_rows, n_columns = self.config.tensors()[name]
        rows = scope.op(
            "GatherBlockQuantized",
            scope.stored(name, (n_rows, piece.n_bytes // n_rows)),
            ids,
            scope.stored(scales_of(name)),
            bits=scope.layout.bits[name],
            block_size=BLOCK,
            gather_axis=0,
            quantize_axis=1,
        )
        return rows if n_columns % BLOCK == 0 else self._first(rows, n_columns)
