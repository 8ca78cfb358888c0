"""The reference model: the definition of correct, in PyTorch.

One module for every family in ``ModelConfig``. Parameter names are the names of ``ModelConfig.tensors()``,
so a state dict, a GGUF file and our own safetensors layout speak the same words. Shapes in comments:
B batch, T tokens, S keys, H heads, D head_dim, E n_embd, V n_vocab.
"""

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from localdepth.config import STAGES, Injection, ModelConfig, NormPlacement, QkNorm, RopeStyle

__all__ = ["Attend", "Block", "ReferenceModel", "Rotation", "attention_within", "causal_attention"]

# (layer, q [B,H,T,D], k [B,Hkv,T,D], v [B,Hkv,T,D]) -> [B,H,T,D]; owns masking and any cache
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the norm computed in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, n: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


class Rotation:
    """Rotary positions (Su et al. 2021) for consecutive positions ``start .. start + n - 1``."""

    def __init__(self, config: ModelConfig, start: int, n: int, device: torch.device | None = None) -> None:
        frequencies = torch.tensor(config.rope_frequencies(), dtype=torch.float32, device=device)
        angles = torch.outer(torch.arange(start, start + n, dtype=torch.float32, device=device), frequencies)
        self.cos, self.sin = angles.cos(), angles.sin()  # [T, D/2]
        self.interleaved = config.rope_style is RopeStyle.INTERLEAVED

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate ``x`` [..., T, D]."""
        if self.interleaved:
            a, b = x[..., 0::2], x[..., 1::2]
        else:
            a, b = x.chunk(2, dim=-1)
        turned = a * self.cos - b * self.sin, a * self.sin + b * self.cos
        rotated = torch.stack(turned, dim=-1).flatten(-2) if self.interleaved else torch.cat(turned, dim=-1)
        return rotated.type_as(x)


def causal_attention(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of a whole sequence to itself, every position at the same pass."""
    return _attention(q, k, v, None)


def attention_within(documents: Tensor) -> Attend:
    """Attention of packed rows to themselves; none looks beyond its document, numbered in ``documents`` [B,T]."""
    same = documents[:, None, :, None] == documents[:, None, None, :]
    mask = same & torch.ones(same.shape[-2:], dtype=torch.bool, device=documents.device).tril()  # [B,1,T,T]
    return lambda _layer, q, k, v: _attention(q, k, v, mask)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """On a CPU in float32 even under autocast: the bfloat16 backward is several times slower there."""
    heads = partial(functional.scaled_dot_product_attention, attn_mask=mask, is_causal=mask is None)
    grouped = q.shape[1] != k.shape[1]
    if q.device.type != "cpu":
        return heads(q, k, v, enable_gqa=grouped)
    with torch.autocast("cpu", enabled=False):
        return heads(q.float(), k.float(), v.float(), enable_gqa=grouped).type_as(v)


class Block(nn.Module):
    """One transformer layer; which norms it has follows ``config.norm_placement``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head, self.n_head_kv, self.head_dim = config.n_head, config.n_head_kv, config.head_dim
        n, q, kv, eps = config.n_embd, config.n_embd_q, config.n_embd_kv, config.norm_eps

        def norm(present: bool, width: int) -> nn.Module:
            return RMSNorm(width, eps) if present else nn.Identity()

        before = config.norm_placement is not NormPlacement.POST_BRANCH
        after = config.norm_placement is not NormPlacement.PRE
        self.norm_heads = config.qk_norm is QkNorm.HEAD
        q_norm, k_norm = (self.head_dim, self.head_dim) if self.norm_heads else (q, kv)
        self.norm_sum = config.norm_placement is NormPlacement.ON_SUM
        self.attn_norm = norm(before, n)
        self.attn_q = nn.Linear(n, q, bias=config.qk_bias)
        self.attn_k = nn.Linear(n, kv, bias=config.qk_bias)
        self.attn_v = nn.Linear(n, kv, bias=config.v_bias)
        self.attn_q_norm = norm(config.qk_norm is not QkNorm.NONE, q_norm)
        self.attn_k_norm = norm(config.qk_norm is not QkNorm.NONE, k_norm)
        self.attn_output = nn.Linear(q, n, bias=False)
        self.attn_post_norm = norm(after, n)
        self.ffn_norm = norm(before, n)
        self.ffn_gate = nn.Linear(n, config.n_ff, bias=False)
        self.ffn_up = nn.Linear(n, config.n_ff, bias=False)
        self.ffn_down = nn.Linear(config.n_ff, n, bias=False)
        self.ffn_post_norm = norm(after, n)

    def forward(self, x: Tensor, rotation: Rotation, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """x [B,T,E] -> [B,T,E]."""
        x = self._join(x, self._attention(self.attn_norm(x), rotation, attend), self.attn_post_norm)
        return self._join(x, self._feed_forward(self.ffn_norm(x)), self.ffn_post_norm)

    def _join(self, x: Tensor, branch: Tensor, post_norm: nn.Module) -> Tensor:
        joined: Tensor = post_norm(x + branch) if self.norm_sum else x + post_norm(branch)
        return joined

    def _attention(self, x: Tensor, rotation: Rotation, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        q = self._heads(self._normed(self.attn_q(x), self.attn_q_norm), self.n_head)
        k = self._heads(self._normed(self.attn_k(x), self.attn_k_norm), self.n_head_kv)
        v = self._heads(self.attn_v(x), self.n_head_kv)
        mixed = attend(rotation(q), rotation(k), v)  # [B,H,T,D]
        out: Tensor = self.attn_output(mixed.transpose(1, 2).flatten(2))
        return out

    def _normed(self, x: Tensor, norm: nn.Module) -> Tensor:
        """Queries or keys [B,T,H*D], normed over their whole width or head by head."""
        normed: Tensor = norm(x.view(*x.shape[:2], -1, self.head_dim) if self.norm_heads else x)
        return normed.view(x.shape)

    def _heads(self, x: Tensor, n_head: int) -> Tensor:
        return x.view(*x.shape[:2], n_head, self.head_dim).transpose(1, 2)  # [B,T,H*D] -> [B,H,T,D]

    def _feed_forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.ffn_down(functional.silu(self.ffn_gate(x)) * self.ffn_up(x))
        return out


class ReferenceModel(nn.Module):
    """Prelude, core looped ``depth`` times, coda.

    Source: Geiping et al. 2025, arXiv:2502.05171, section 3; McLeish et al. 2025, arXiv:2511.07384 for retrofits.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        n = config.n_embd
        self.token_embd = nn.Embedding(config.n_vocab, n)
        for stage in STAGES:
            self.add_module(stage, nn.ModuleList(Block(config) for _ in range(config.n_layer(stage))))
        if config.injection is Injection.CONCAT_LINEAR:
            self.injection = nn.ModuleDict(
                {"state": nn.Linear(n, n, bias=False), "embeds": nn.Linear(n, n, bias=False)}
            )
        self.output_norm = RMSNorm(n, config.norm_eps)
        if not config.tied_head:
            self.output = nn.Linear(n, config.n_vocab, bias=False)

    def embed(self, ids: Tensor) -> Tensor:
        """Token vectors before the prelude: ids [B,T] -> [B,T,E]."""
        scaled: Tensor = self.token_embd(ids) * self.config.embed_scale
        return scaled

    def stage(self, name: str, x: Tensor, rotation: Rotation, attend: Attend = causal_attention) -> Tensor:
        """Run all layers of ``name`` on x [B,T,E]."""
        for i, block in enumerate(self.get_submodule(name).children()):
            x = block(x, rotation, partial(attend, i))
        return x

    def inject(self, s: Tensor, e: Tensor, r: int) -> Tensor:
        """What pass ``r`` feeds its first core layer, from state s and embeds e, both [B,T,E]."""
        match self.config.injection:
            case Injection.CONCAT_LINEAR:
                mixed: Tensor = self.injection["state"](s) + self.injection["embeds"](e)
                return mixed
            case Injection.ADD:
                return s + e
            case Injection.NONE:
                return s + e if r == 0 else s

    def enter_coda(self, s: Tensor) -> Tensor:
        """What the coda starts from: the state, normalised where the model says so."""
        out: Tensor = self.output_norm(s) if self.config.norm_after_core else s
        return out

    def head(self, x: Tensor) -> Tensor:
        """Logits from the coda's output: [B,T,E] -> [B,T,V]."""
        weight = self.token_embd.weight if self.config.tied_head else self.output.weight
        return functional.linear(self.output_norm(x), weight)

    def embeds(self, ids: Tensor, attend: Attend = causal_attention) -> Tensor:
        """Prelude output e: ids [B,T] -> [B,T,E]."""
        return self.stage("prelude", self.embed(ids), self._rotation(ids), attend)

    def core_pass(self, s: Tensor, e: Tensor, r: int, attend: Attend = causal_attention) -> Tensor:
        """One pass: s_{r+1} from s_r, both [B,T,E]."""
        return self.stage("core", self.inject(s, e, r), self._rotation(s), attend)

    def run_coda(self, s: Tensor, attend: Attend = causal_attention) -> Tensor:
        """Coda's output: state [B,T,E] -> [B,T,E]."""
        return self.stage("coda", self.enter_coda(s), self._rotation(s), attend)

    def logits(self, s: Tensor) -> Tensor:
        """Coda and head: state [B,T,E] -> [B,T,V]."""
        return self.head(self.run_coda(s))

    def states(self, ids: Tensor, depth: int, state: Tensor | None = None) -> Iterator[Tensor]:
        """Yield the raw state after each of ``depth`` passes, [B,T,E], starting from ``state`` or zeros."""
        e = self.embeds(ids)
        s = torch.zeros_like(e) if state is None else state
        for r in range(depth):
            s = self.core_pass(s, e, r)
            yield s

    def forward(self, ids: Tensor, depth: int, state: Tensor | None = None) -> Tensor:
        """Logits [B,T,V] of ids [B,T] at ``depth`` passes from initial ``state`` [B,T,E] (zeros if None)."""
        (last,) = deque(self.states(ids, depth, state), maxlen=1)
        return self.logits(last)

    def _rotation(self, x: Tensor) -> Rotation:
        return Rotation(self.config, 0, x.shape[1], x.device)
