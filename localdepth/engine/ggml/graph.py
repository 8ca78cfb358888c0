"""The four kinds of graph, node by node: prelude, one pass of the core, coda, head.

Shapes in comments are ggml's, fastest dimension first: E n_embd, T rows, H heads, D head_dim, S keys.
Graphs read and write the tensors they are given; only intermediates live in scratch memory.
"""

from dataclasses import dataclass
from functools import cached_property

from localdepth.config import Injection, ModelConfig, NormPlacement, QkNorm, RopeStyle
from localdepth.engine.ggml.handles import Graph, TensorGroup
from localdepth.engine.ggml.lib import Ggml
from localdepth.engine.ggml.weights import ROPE_FACTORS

__all__ = ["Chunk", "GraphFactory"]

Tensor = int
_NODES_PER_LAYER, _NODES_AROUND = 64, 64  # bounds; a layer of the richest family needs 41
_F32_BYTES, _F16_BYTES = 4, 2
_ROPE_MODE = {RopeStyle.INTERLEAVED: 0, RopeStyle.HALF: 2}


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows ``offset .. offset + n - 1`` of a span, which attend to the first ``n_kv`` positions."""

    offset: int
    n: int
    n_kv: int


class GraphFactory:
    """Builds graphs over one model's weights.

    Args:
        weights: tensors by canonical name.
        io: tensors ``tokens``, ``positions``, ``rows``, ``mask`` and ``logits``, written or read between graphs.
        kv_bytes: size of one element of the K/V planes.
    """

    def __init__(self, lib: Ggml, config: ModelConfig, weights: TensorGroup, io: TensorGroup, kv_bytes: int) -> None:
        self.lib, self.config, self.weights, self.io, self.kv_bytes = lib, config, weights, io, kv_bytes

    def prelude(self, chunk: Chunk, lane: TensorGroup, kv: TensorGroup) -> Graph:
        """tokens -> lane's embeds, and their share of the injection where it is linear."""
        nodes = _Nodes(self, self.config.n_prelude, chunk)
        x = nodes.embed()
        x = nodes.stage("prelude", x, kv)
        nodes.store(x, lane["embeds"])
        if self.config.injection is Injection.CONCAT_LINEAR:
            nodes.store(nodes.linear(x, "injection.embeds"), lane["injected"])
        return nodes.graph

    def core(self, chunk: Chunk, lane: TensorGroup, kv: TensorGroup, r: int) -> Graph:
        """One pass: state r -> state r + 1; the two take turns in the lane."""
        nodes = _Nodes(self, self.config.n_core, chunk)
        x = nodes.inject(lane, r)
        x = nodes.stage("core", x, kv)
        nodes.store(x, lane[f"state{(r + 1) % 2}"])
        return nodes.graph

    def coda(self, chunk: Chunk, lane: TensorGroup, kv: TensorGroup, r: int) -> Graph:
        """State r -> lane's output of the coda."""
        nodes = _Nodes(self, self.config.n_coda, chunk)
        x = nodes.rows(lane[f"state{r % 2}"])
        if self.config.norm_after_core:
            x = nodes.norm(x, "output_norm")
        nodes.store(nodes.stage("coda", x, kv), lane["output"])
        return nodes.graph

    def head(self, chunk: Chunk, lane: TensorGroup) -> Graph:
        """Lane's output of the coda -> io's logits."""
        nodes = _Nodes(self, 0, chunk)
        x = nodes.norm(nodes.rows(lane["output"]), "output_norm")
        x = nodes.linear(x, "token_embd" if self.config.tied_head else "output")
        nodes.publish(x)
        return nodes.graph


class _Nodes:
    """The nodes of one graph while it is being built."""

    def __init__(self, factory: GraphFactory, n_layer: int, chunk: Chunk) -> None:
        self.lib, self.config, self.weights, self.io = factory.lib, factory.config, factory.weights, factory.io
        self.kv_bytes = factory.kv_bytes
        self.chunk = chunk
        self.graph = Graph(self.lib, n_layer * _NODES_PER_LAYER + _NODES_AROUND)
        self.context = self.graph.context

    @cached_property
    def positions(self) -> Tensor:
        """Position of each row, [T]."""
        return self._first(self.io["positions"])

    @cached_property
    def kv_rows(self) -> Tensor:
        """Row of the K/V planes each new key goes to, [T]."""
        return self._first(self.io["rows"])

    @cached_property
    def mask(self) -> Tensor:
        """0 where a row may look, -inf ahead of it: [S, T]."""
        n, n_kv = self.chunk.n, self.chunk.n_kv
        view: Tensor = self.lib.ggml_view_2d(self.context, self.io["mask"], n_kv, n, n_kv * _F16_BYTES, 0)
        return view

    def rows(self, tensor: Tensor) -> Tensor:
        """This chunk's rows of a lane tensor, [E, T]."""
        return self._rows(tensor, self.config.n_embd, self.chunk.offset)

    def store(self, x: Tensor, target: Tensor) -> None:
        """Copy x, [E, T], into this chunk's rows of a lane tensor."""
        self._copy(x, self.rows(target))

    def publish(self, x: Tensor) -> None:
        """Copy x, [V, T], into the first rows of io's logits."""
        self._copy(x, self._rows(self.io["logits"], self.config.n_vocab, 0))

    def _first(self, tensor: Tensor) -> Tensor:
        view: Tensor = self.lib.ggml_view_1d(self.context, tensor, self.chunk.n, 0)
        return view

    def _rows(self, tensor: Tensor, n: int, first: int) -> Tensor:
        row_bytes = n * _F32_BYTES
        view: Tensor = self.lib.ggml_view_2d(self.context, tensor, n, self.chunk.n, row_bytes, first * row_bytes)
        return view

    def _copy(self, x: Tensor, target: Tensor) -> None:
        self.lib.ggml_build_forward_expand(self.graph.handle, self.lib.ggml_cpy(self.context, x, target))

    def embed(self) -> Tensor:
        """Token vectors, scaled: [E, T]."""
        tokens = self._first(self.io["tokens"])
        x: Tensor = self.lib.ggml_get_rows(self.context, self.weights["token_embd.weight"], tokens)
        if self.config.embed_scale != 1.0:
            x = self.lib.ggml_scale(self.context, x, self.config.embed_scale)
        return x

    def inject(self, lane: TensorGroup, r: int) -> Tensor:
        """What pass r feeds its first core layer: [E, T]."""
        state = self.rows(lane[f"state{r % 2}"])
        match self.config.injection:
            case Injection.CONCAT_LINEAR:
                return self.add(self.linear(state, "injection.state"), self.rows(lane["injected"]))
            case Injection.ADD:
                return self.add(state, self.rows(lane["embeds"]))
            case Injection.NONE:
                return self.add(state, self.rows(lane["embeds"])) if r == 0 else state

    def stage(self, stage: str, x: Tensor, kv: TensorGroup) -> Tensor:
        """All layers of a stage: [E, T] -> [E, T]."""
        for layer in range(self.config.n_layer(stage)):
            prefix = f"{stage}.{layer}"
            branch = self._attention(prefix, self.norm(x, f"{prefix}.attn_norm"), kv[f"{layer}.k"], kv[f"{layer}.v"])
            x = self._join(x, branch, f"{prefix}.attn_post_norm")
            branch = self._feed_forward(prefix, self.norm(x, f"{prefix}.ffn_norm"))
            x = self._join(x, branch, f"{prefix}.ffn_post_norm")
        return x

    def linear(self, x: Tensor, name: str) -> Tensor:
        """W x, plus a bias where the model has one."""
        out: Tensor = self.lib.ggml_mul_mat(self.context, self.weights[f"{name}.weight"], x)
        bias = self.weights.get(f"{name}.bias")
        return out if bias is None else self.add(out, bias)

    def norm(self, x: Tensor, name: str) -> Tensor:
        """RMS norm where the model has one of this name, else x itself."""
        weight = self.weights.get(f"{name}.weight")
        if weight is None:
            return x
        scaled = self.lib.ggml_rms_norm(self.context, x, self.config.norm_eps)
        out: Tensor = self.lib.ggml_mul(self.context, scaled, weight)
        return out

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """a + b, b broadcast over rows."""
        out: Tensor = self.lib.ggml_add(self.context, a, b)
        return out

    def _join(self, x: Tensor, branch: Tensor, post_norm: str) -> Tensor:
        if self.config.norm_placement is NormPlacement.ON_SUM:
            return self.norm(self.add(x, branch), post_norm)
        return self.add(x, self.norm(branch, post_norm))

    def _attention(self, prefix: str, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        config, lib, context = self.config, self.lib, self.context
        q, k, v = (self.linear(x, f"{prefix}.attn_{side}") for side in "qkv")
        if config.qk_norm is QkNorm.FULL:
            q, k = self.norm(q, f"{prefix}.attn_q_norm"), self.norm(k, f"{prefix}.attn_k_norm")
        q = self._rotate(lib.ggml_reshape_3d(context, q, config.head_dim, config.n_head, self.chunk.n))
        k = self._rotate(lib.ggml_reshape_3d(context, k, config.head_dim, config.n_head_kv, self.chunk.n))
        self._remember(lib.ggml_reshape_2d(context, k, config.n_embd_kv, self.chunk.n), keys)
        self._remember(v, values)
        mixed = lib.ggml_flash_attn_ext(
            context,
            lib.ggml_permute(context, q, 0, 2, 1, 3),  # [D, T, H]
            self._seen(keys),
            self._seen(values),
            self.mask,
            config.head_dim**-0.5,
            0.0,
            0.0,
        )  # [D, H, T]
        return self.linear(lib.ggml_reshape_2d(context, mixed, config.n_embd_q, self.chunk.n), f"{prefix}.attn_output")

    def _rotate(self, x: Tensor) -> Tensor:
        config = self.config
        factors = self.weights.get(ROPE_FACTORS)
        mode = _ROPE_MODE[config.rope_style]
        rotated: Tensor = self.lib.ggml_rope_ext(
            self.context, x, self.positions, factors, config.head_dim, mode, 0, config.rope_base, 1, 0, 1, 0, 0
        )
        return rotated

    def _remember(self, new: Tensor, plane: Tensor) -> None:
        """Write new keys or values, [n_embd_kv, T], at their positions; later nodes read the plane itself."""
        stored = self.lib.ggml_set_rows(self.context, plane, new, self.kv_rows)
        self.lib.ggml_build_forward_expand(self.graph.handle, stored)

    def _seen(self, plane: Tensor) -> Tensor:
        """The first n_kv positions of a plane, heads apart: [D, S, H_kv]."""
        config = self.config
        head = config.head_dim * self.kv_bytes
        row = head * config.n_head_kv
        view: Tensor = self.lib.ggml_view_3d(
            self.context, plane, config.head_dim, self.chunk.n_kv, config.n_head_kv, row, head, 0
        )
        return view

    def _feed_forward(self, prefix: str, x: Tensor) -> Tensor:
        gate, up = self.linear(x, f"{prefix}.ffn_gate"), self.linear(x, f"{prefix}.ffn_up")
        return self.linear(self.lib.ggml_swiglu_split(self.context, gate, up), f"{prefix}.ffn_down")
