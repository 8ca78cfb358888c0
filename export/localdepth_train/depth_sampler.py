"""How deep to train: a Poisson-lognormal total, of which only the last passes carry gradient.

Source: Geiping et al. 2025, arXiv:2502.05171, section 3.3; draws equal the published trainers', seeds included.
"""

import math
from typing import NamedTuple

import torch

__all__ = ["Passes", "sample_each", "sample_passes", "seeded"]

_SEED = 514229  # of the published trainers; one stream per data step


class Passes(NamedTuple):
    """Passes of one training forward: first those without gradient, then those with."""

    n_nograd: int
    k_grad: int

    @property
    def depth(self) -> int:
        """All passes."""
        return self.n_nograd + self.k_grad


def seeded(data_step: int) -> torch.Generator:
    """The generator of one micro-batch; ``data_step`` counts micro-batches from 1."""
    return torch.Generator().manual_seed(_SEED + data_step)


def sample_passes(mean_depth: int, backprop_depth: int, generator: torch.Generator, sigma: float = 0.5) -> Passes:
    """Draw tau ~ N(log mean - sigma²/2, sigma), total = Poisson(e^tau) + 1, and split it.

    The expected total is ``mean_depth + 1``. At most ``backprop_depth`` passes carry gradient; what the total has
    beyond that runs without.
    """
    tau = torch.empty(1).normal_(math.log(mean_depth) - sigma**2 / 2, sigma, generator=generator)
    total = int(torch.poisson(tau.exp(), generator=generator).item()) + 1
    return Passes(max(total - backprop_depth, 0), min(total, backprop_depth))


def sample_each(
    n: int, mean_depth: int, backprop_depth: int, generator: torch.Generator, sigma: float = 0.5
) -> list[Passes]:
    """A draw of its own for each of ``n`` sequences."""
    return [sample_passes(mean_depth, backprop_depth, generator, sigma) for _ in range(n)]
