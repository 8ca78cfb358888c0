"""Floating-point operations of matrix products: two for each weight and token forward, twice that backward.

Attention scores, norms and embedding look-ups are left out, as the published accounts do; unlike those, injection
and head are counted.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from localdepth.config import ModelConfig

if TYPE_CHECKING:  # it draws with torch, which surgery counts without
    from localdepth_train.depth_sampler import Passes

__all__ = ["Flops"]


@dataclass(frozen=True, slots=True)
class Flops:
    """Weights that a token meets in each part of a model.

    ``injection`` is what multiplies the embeds, which stay the same in all passes: engines do it once, training in
    every pass.
    """

    prelude: int
    injection: int
    core: int
    coda: int
    head: int

    @classmethod
    def of(cls, config: ModelConfig) -> "Flops":
        """Count the matrices of a model."""
        sizes = {name: math.prod(shape) for name, shape in config.tensors().items() if len(shape) == 2}

        def total(*prefixes: str) -> int:
            return sum(size for name, size in sizes.items() if name.startswith(prefixes))

        return cls(
            prelude=total("prelude."),
            injection=total("injection.embeds."),
            core=total("core.", "injection.state."),
            coda=total("coda."),
            head=config.n_embd * config.n_vocab,
        )

    def forward(self, depth: int) -> int:
        """For one token, logits included, at ``depth`` passes."""
        return 2 * (self.prelude + self.injection + self.core * depth + self.coda + self.head)

    def training(self, passes: "Sequence[Passes]", n_tokens: int, n_labels: int, recompute: bool) -> float:
        """For one step over ``n_tokens``, of which ``n_labels`` are decoded, without teacher and consistency.

        Passes that some sequences wait through count for all of them.
        """
        first, last = min(p.n_nograd for p in passes), max(p.depth for p in passes)
        with_gradient = 6 * (last - first) + (2 * (last - first) if recompute else 0)
        looped = self.core + self.injection
        per_token = 6 * (self.prelude + self.coda) + looped * (2 * first + with_gradient)
        return float(per_token * n_tokens + 6 * self.head * n_labels)
