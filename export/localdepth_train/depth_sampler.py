"""How deep to train: a Poisson-lognormal total, of which only the last passes carry gradient.

Source: Geiping et al. 2025, arXiv:2502.05171, section 3.3; draws of seed 0 equal the published trainers'.
"""

import math
from typing import NamedTuple

import torch

from localdepth_train.recipe import DepthRecipe, DrawPer

__all__ = ["Passes", "expected_depth", "numbered", "sample_passes", "sample_rows", "seeded"]

_SEED = 514229  # of the published trainers; one stream per data step
_GOLDEN = 0x9E3779B1  # 2**32 / golden ratio: multiples lie far apart, modulo 2**32


class Passes(NamedTuple):
    """Passes of one training forward: first those without gradient, then those with."""

    n_nograd: int
    k_grad: int

    @property
    def depth(self) -> int:
        """All passes."""
        return self.n_nograd + self.k_grad


def numbered(number: int, seed: int) -> torch.Generator:
    """Stream ``number`` of a run with ``seed``; torch looks at 32 bits, where seeds must not share streams."""
    return torch.Generator().manual_seed((number + seed * _GOLDEN) % (1 << 32))


def seeded(data_step: int, seed: int = 0) -> torch.Generator:
    """The generator of one micro-batch's depths; ``data_step`` counts micro-batches from 1."""
    return numbered(_SEED + data_step, seed)


def sample_passes(mean_depth: int, backprop_depth: int, generator: torch.Generator, sigma: float = 0.5) -> Passes:
    """Draw tau ~ N(log mean - sigma²/2, sigma), total = Poisson(e^tau) + 1, and split it.

    The expected total is ``mean_depth + 1``. At most ``backprop_depth`` passes carry gradient; what the total has
    beyond that runs without.
    """
    tau = torch.empty(1).normal_(math.log(mean_depth) - sigma**2 / 2, sigma, generator=generator)
    total = int(torch.poisson(tau.exp(), generator=generator).item()) + 1
    return Passes(max(total - backprop_depth, 0), min(total, backprop_depth))


def sample_rows(
    plan: DepthRecipe, n: int, mean_depth: int, backprop_depth: int, generator: torch.Generator
) -> list[Passes]:
    """The passes of the ``n`` sequences of a micro-batch, as ``plan`` wants them drawn."""
    if plan.fixed:
        return [Passes(max(mean_depth - backprop_depth, 0), min(mean_depth, backprop_depth))] * n
    if plan.per is DrawPer.BATCH:
        return [sample_passes(mean_depth, backprop_depth, generator, plan.sigma)] * n
    return [sample_passes(mean_depth, backprop_depth, generator, plan.sigma) for _ in range(n)]


def expected_depth(plan: DepthRecipe, mean_depth: int) -> int:
    """What the depths that ``sample_rows`` gives are on average."""
    return mean_depth if plan.fixed else mean_depth + 1
