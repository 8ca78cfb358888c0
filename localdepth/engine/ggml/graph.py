"""Graphs, node by node: any run of prelude, passes of the core, coda and head is one graph.

Shapes in comments are ggml's, fastest dimension first: E n_embd, T rows, H heads, D head_dim, S keys.
Graphs read and write the tensors they are given; only intermediates live in scratch memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

from localdepth.config import Injection, ModelConfig, NormPlacement, QkNorm, RopeStyle
from localdepth.engine.ggml.handles import Graph, Tensor, TensorGroup
from localdepth.engine.ggml.lib import Ggml
from localdepth.engine.ggml.parts import Parts

__all__ = ["Begins", "Chunk", "Ends", "GraphFactory", "Planes", "Work"]

_NODES_PER_LAYER, _NODES_AROUND = 128, 64  # bounds; a layer of the richest family needs 41, and 56 to add squares
_F32_BYTES, _F16_BYTES, _I32_BYTES = 4, 2, 4
Planes = Callable[[str, int], TensorGroup]  # stage and index of a plane -> its keys and values
_ROPE_MODE = {RopeStyle.INTERLEAVED: 0, RopeStyle.HALF: 2}


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows ``offset .. offset + n - 1`` of a span, which attend to the first ``n_kv`` positions."""

    offset: int
    n: int
    n_kv: int


class Begins(Enum):
    """What is made before a pass can run."""

    PRELUDE = "prelude"  # everything: io's tokens -> lane's embeds
    INJECTED = "injected"  # the embeds' share of a linear injection, for positions whose prelude ran before


class Ends(Enum):
    """What is wanted of the coda."""

    KEYS = "keys"  # the keys and values that later positions look up
    LOGITS = "logits"  # of the last row, in io
    OUTPUT = "output"  # of all rows, in the lane


@dataclass(frozen=True, slots=True)
class Work:
    """What one graph computes; two equal ones over the same chunk are the same graph.

    Attributes:
        begins: what comes before the first pass.
        passes: index of the plane of each pass.
        parity: 0 or 1, which of the lane's two states the first pass reads.
        starts: the first pass is the first of all, where that makes a difference.
        ends: the coda, and what is wanted of it.
    """

    begins: Begins | None
    passes: tuple[int, ...]
    parity: int
    starts: bool
    ends: Ends | None


class GraphFactory:
    """Builds graphs over one model's weights."""

    def __init__(self, lib: Ggml, config: ModelConfig, parts: Parts) -> None:
        self.lib, self.config, self.parts = lib, config, parts

    def span(self, chunk: Chunk, lane: TensorGroup, planes: Planes, work: Work) -> Graph:
        """What ``work`` says, on the lane's rows; even and odd states take turns in the lane."""
        nodes = _Nodes(self, self._n_layer(work), chunk)
        if work.begins is Begins.PRELUDE:
            nodes.store(nodes.stage("prelude", nodes.embed(), planes("prelude", 0)), lane["embeds"])
        if work.begins is not None and self.config.injection is Injection.CONCAT_LINEAR:
            nodes.store(nodes.linear(nodes.rows(lane["embeds"]), "injection.embeds"), lane["injected"])
        state = nodes.rows(lane[f"state{work.parity}"])
        last = len(work.passes) - 1
        for i, index in enumerate(work.passes):
            if 0 < i == last:  # what the last pass changes is measured
                nodes.store(state, lane[f"state{(work.parity + i) % 2}"])
            state = nodes.stage("core", nodes.inject(state, lane, work.starts and i == 0), planes("core", index))
        if work.passes:
            nodes.store(state, lane[f"state{(work.parity + len(work.passes)) % 2}"])
        if work.ends is not None:
            self._coda(nodes, state, lane, planes("coda", 0), work.ends)
        return nodes.graph

    def head(self, chunk: Chunk, lane: TensorGroup) -> Graph:
        """Lane's output of the coda -> io's logits."""
        nodes = _Nodes(self, 0, chunk)
        nodes.head(nodes.rows(lane["output"]), chunk.n)
        return nodes.graph

    def _n_layer(self, work: Work) -> int:
        config = self.config
        around = (config.n_prelude if work.begins else 0) + (config.n_coda if work.ends else 0)
        return around + config.n_core * len(work.passes)

    def _coda(self, nodes: "_Nodes", state: Tensor, lane: TensorGroup, kv: TensorGroup, ends: Ends) -> None:
        n_out = {Ends.KEYS: 0, Ends.LOGITS: 1, Ends.OUTPUT: nodes.chunk.n}[ends]
        x = nodes.norm(state, "output_norm") if self.config.norm_after_core else state
        x = nodes.stage("coda", x, kv, n_out)
        if ends is Ends.OUTPUT:
            nodes.store(x, lane["output"])
        elif ends is Ends.LOGITS:
            nodes.head(x, 1)


class _Nodes:
    """The nodes of one graph while it is being built."""

    def __init__(self, factory: GraphFactory, n_layer: int, chunk: Chunk) -> None:
        self.lib, self.config, self.parts = factory.lib, factory.config, factory.parts
        self.weights, self.io = factory.parts.weights, factory.parts.io
        self.chunk = chunk
        self.graph = Graph(self.lib, n_layer * _NODES_PER_LAYER + _NODES_AROUND)
        self.context = self.graph.context
        self._position_views: dict[int, Tensor] = {}
        self._mask_views: dict[int, Tensor] = {}

    @cached_property
    def kv_rows(self) -> Tensor:
        """Row of the K/V planes each new key goes to, [T]."""
        return self._first(self.io["rows"])

    def _positions(self, n: int) -> Tensor:
        """Position of each of the last n rows, [n]."""
        if n not in self._position_views:
            first = (self.chunk.n - n) * _I32_BYTES
            self._position_views[n] = self.lib.ggml_view_1d(self.context, self.io["positions"], n, first)
        return self._position_views[n]

    def _mask(self, n: int) -> Tensor:
        """0 where one of the last n rows may look, -inf ahead of it: [S, n]."""
        if n not in self._mask_views:
            row = self.chunk.n_kv * _F16_BYTES
            first = (self.chunk.n - n) * row
            view = self.lib.ggml_view_2d(self.context, self.io["mask"], self.chunk.n_kv, n, row, first)
            self._mask_views[n] = view
        return self._mask_views[n]

    def rows(self, tensor: Tensor) -> Tensor:
        """This chunk's rows of a lane tensor, [E, T]."""
        return self._view_rows(tensor, self.config.n_embd, self.chunk.offset, self.chunk.n)

    def store(self, x: Tensor, target: Tensor) -> None:
        """Copy x, [E, T], into this chunk's rows of a lane tensor."""
        self._copy(x, self.rows(target))

    def head(self, x: Tensor, n: int) -> None:
        """Logits of x, [E, n], into the first rows of io's."""
        x = self.linear(self.norm(x, "output_norm"), "token_embd" if self.config.tied_head else "output", n)
        self._copy(x, self._view_rows(self.io["logits"], self.config.n_vocab, 0, n))

    def _first(self, tensor: Tensor) -> Tensor:
        view: Tensor = self.lib.ggml_view_1d(self.context, tensor, self.chunk.n, 0)
        return view

    def _view_rows(self, tensor: Tensor, width: int, first: int, n: int) -> Tensor:
        """Rows ``first .. first + n - 1`` of a float32 tensor of this width: [width, n]."""
        row_bytes = width * _F32_BYTES
        view: Tensor = self.lib.ggml_view_2d(self.context, tensor, width, n, row_bytes, first * row_bytes)
        return view

    def _copy(self, x: Tensor, target: Tensor) -> None:
        self.lib.ggml_build_forward_expand(self.graph.handle, self.lib.ggml_cpy(self.context, x, target))

    def embed(self) -> Tensor:
        """Token vectors, scaled: [E, T]."""
        tokens = self._first(self.parts.tokens["tokens"])
        x: Tensor = self.lib.ggml_get_rows(self.context, self.parts.embedding, tokens)
        if self.config.embed_scale != 1.0:
            x = self.lib.ggml_scale(self.context, x, self.config.embed_scale)
        return x

    def inject(self, state: Tensor, lane: TensorGroup, starts: bool) -> Tensor:
        """What a pass, the first of all or another, feeds its first core layer: [E, T]."""
        match self.config.injection:
            case Injection.CONCAT_LINEAR:
                return self.add(self.linear(state, "injection.state"), self.rows(lane["injected"]))
            case Injection.ADD:
                return self.add(state, self.rows(lane["embeds"]))
            case Injection.NONE:
                return self.add(state, self.rows(lane["embeds"])) if starts else state

    def stage(self, stage: str, x: Tensor, kv: TensorGroup, n_out: int | None = None) -> Tensor:
        """All layers of a stage: [E, T] -> [E, T], or [E, n_out]: the last rows alone where no other is wanted."""
        n = self.chunk.n
        n_out = n if n_out is None else n_out
        n_layer = self.config.n_layer(stage)
        for layer in range(n_layer):
            x = self._block(
                f"{stage}.{layer}", x, kv[f"{layer}.k"], kv[f"{layer}.v"], n_out if layer == n_layer - 1 else n
            )
        return x if n_layer or n_out == n or not n_out else self._last(x, n_out)

    def _block(self, prefix: str, x: Tensor, keys: Tensor, values: Tensor, n_out: int) -> Tensor:
        """One layer; keys and values of all rows, everything else for the last ``n_out``."""
        normed = self.norm(x, f"{prefix}.attn_norm")
        self._remember_all(prefix, normed, keys, values)
        if not n_out:
            return x
        if n_out < self.chunk.n:
            x, normed = self._last(x, n_out), self._last(normed, n_out)
        branch = self._attention(prefix, normed, keys, values, n_out)
        x = self._join(x, branch, f"{prefix}.attn_post_norm")
        branch = self._feed_forward(prefix, self.norm(x, f"{prefix}.ffn_norm"), n_out)
        return self._join(x, branch, f"{prefix}.ffn_post_norm")

    def _last(self, x: Tensor, n: int) -> Tensor:
        """The last n of this chunk's rows of x: [E, n]."""
        return self._view_rows(x, self.config.n_embd, self.chunk.n - n, n)

    def linear(self, x: Tensor, name: str, n: int | None = None) -> Tensor:
        """W x, plus a bias where the model has one; x has n rows, the chunk's without a number."""
        if self.parts.sums:
            self._add_squares(x, self.parts.sums[f"{name}.weight"])
        weight = self.weights.for_rows(f"{name}.weight", self.chunk.n if n is None else n)
        out: Tensor = self.lib.ggml_mul_mat(self.context, weight, x)
        bias = self.weights.get(f"{name}.bias")
        return out if bias is None else self.add(out, bias)

    def _add_squares(self, x: Tensor, total: Tensor) -> None:
        """Add the squares of x, [n_in, T], summed over rows, to ``total``, [n_in]."""
        lib, context = self.lib, self.context
        columns = lib.ggml_cont(context, lib.ggml_transpose(context, lib.ggml_sqr(context, x)))  # [T, n_in]
        new = lib.ggml_reshape_1d(context, lib.ggml_sum_rows(context, columns), lib.ggml_nbytes(total) // _F32_BYTES)
        self._copy(self.add(total, new), total)

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

    def _remember_all(self, prefix: str, x: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write the keys and values of all rows of x, [E, T], into their planes."""
        config, n = self.config, self.chunk.n
        k = self._heads(x, f"{prefix}.attn_k", config.n_head_kv, n)
        self._remember(self.lib.ggml_reshape_2d(self.context, k, config.n_embd_kv, n), keys)
        self._remember(self.linear(x, f"{prefix}.attn_v"), values)

    def _attention(self, prefix: str, x: Tensor, keys: Tensor, values: Tensor, n: int) -> Tensor:
        """What the last n rows, x [E, n], find in the planes."""
        config, lib, context = self.config, self.lib, self.context
        q = self._heads(x, f"{prefix}.attn_q", config.n_head, n)
        mixed = lib.ggml_flash_attn_ext(
            context,
            lib.ggml_permute(context, q, 0, 2, 1, 3),  # [D, n, H]
            self._seen(keys),
            self._seen(values),
            self._mask(n),
            config.head_dim**-0.5,
            0.0,
            0.0,
        )  # [D, H, n]
        return self.linear(lib.ggml_reshape_2d(context, mixed, config.n_embd_q, n), f"{prefix}.attn_output", n)

    def _heads(self, x: Tensor, name: str, n_head: int, n: int) -> Tensor:
        """Queries or keys of the last n rows, x [E, n], normed and rotated to their positions: [D, n_head, n]."""
        x = self.linear(x, name, n)
        if self.config.qk_norm is QkNorm.FULL:
            x = self.norm(x, f"{name}_norm")
        x = self.lib.ggml_reshape_3d(self.context, x, self.config.head_dim, n_head, n)
        if self.config.qk_norm is QkNorm.HEAD:
            x = self.norm(x, f"{name}_norm")
        return self._rotate(x, n)

    def _rotate(self, x: Tensor, n: int) -> Tensor:
        """Rotate heads of the last n rows, [D, H, n], to their positions."""
        config = self.config
        mode = _ROPE_MODE[config.rope_style]
        rotated: Tensor = self.lib.ggml_rope_ext(
            self.context,
            x,
            self._positions(n),
            self.parts.rope_factors,
            config.head_dim,
            mode,
            0,
            config.rope_base,
            1,
            0,
            1,
            0,
            0,
        )
        return rotated

    def _remember(self, new: Tensor, plane: Tensor) -> None:
        """Write new keys or values, [n_embd_kv, T], at their positions; later nodes read the plane itself."""
        stored = self.lib.ggml_set_rows(self.context, plane, new, self.kv_rows)
        self.lib.ggml_build_forward_expand(self.graph.handle, stored)

    def _seen(self, plane: Tensor) -> Tensor:
        """The first n_kv positions of a plane, heads apart: [D, S, H_kv]."""
        config = self.config
        head = config.head_dim * self.parts.kv_bytes
        row = head * config.n_head_kv
        view: Tensor = self.lib.ggml_view_3d(
            self.context, plane, config.head_dim, self.chunk.n_kv, config.n_head_kv, row, head, 0
        )
        return view

    def _feed_forward(self, prefix: str, x: Tensor, n: int) -> Tensor:
        gate, up = self.linear(x, f"{prefix}.ffn_gate", n), self.linear(x, f"{prefix}.ffn_up", n)
        return self.linear(self.lib.ggml_swiglu_split(self.context, gate, up), f"{prefix}.ffn_down", n)
