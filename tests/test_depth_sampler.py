"""The depth sampler draws what the published trainers draw, and its statistics are those of the distribution."""

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from localdepth_train.depth_sampler import (  # noqa: E402
    Passes,
    expected_depth,
    numbered,
    sample_passes,
    sample_rows,
    seeded,
)
from localdepth_train.recipe import DepthRecipe, DrawPer  # noqa: E402


def test_draws_equal_the_published_trainer(fixtures: Path) -> None:
    record = json.loads((fixtures / "parity/training_refs/training_refs.json").read_text())
    for name, reference in record["depth_sampler"].items():
        mean, backprop = (int(part.lstrip("meanbp")) for part in name.split("_"))
        first = reference["first_data_step"]
        drawn = [list(sample_passes(mean, backprop, seeded(first + i))) for i in range(len(reference["n_k"]))]
        assert drawn == reference["n_k"], name


@pytest.mark.parametrize("mean", [1, 4, 32])
def test_expected_depth_is_one_more_than_the_mean(mean: int) -> None:
    generator = torch.Generator().manual_seed(0)
    depths = np.array([sample_passes(mean, 8, generator).depth for _ in range(4000)])
    assert depths.min() >= 1
    assert depths.mean() == pytest.approx(mean + 1, rel=0.05)


def test_spread_is_that_of_a_poisson_over_a_lognormal() -> None:
    generator = torch.Generator().manual_seed(0)
    depths = np.array([sample_passes(16, 8, generator).depth for _ in range(8000)])
    variance = 16 + 16**2 * (np.exp(0.25) - 1)  # of Poisson(exp(tau)), sigma = 0.5
    assert depths.std() == pytest.approx(np.sqrt(variance), rel=0.05)


@pytest.mark.parametrize("backprop", [1, 2, 8])
def test_only_the_last_passes_carry_gradient(backprop: int) -> None:
    for data_step in range(1, 200):
        passes = sample_passes(6, backprop, seeded(data_step))
        assert 1 <= passes.k_grad <= backprop
        assert passes.n_nograd == 0 or passes.k_grad == backprop


def test_a_data_step_always_draws_the_same() -> None:
    assert sample_passes(32, 8, seeded(5)) == sample_passes(32, 8, seeded(5)) == Passes(32, 8)


def test_seeds_share_no_stream() -> None:
    """Torch looks at 32 bits of a seed: what differs above them is the same stream."""
    streams = {numbered(step, seed).initial_seed() for seed in (0, 1, 2, 3, 1 << 31) for step in range(1000)}
    assert len(streams) == 5000
    assert max(streams) < 1 << 32
    draws = {tuple(torch.rand(2, generator=seeded(1, seed)).tolist()) for seed in (0, 1, 2, (1 << 32) - 1)}
    assert len(draws) == 4


@pytest.mark.parametrize("fixed", [False, True])
def test_a_micro_batch_is_drawn_as_planned(fixed: bool) -> None:
    shared, own = (DepthRecipe(mean=6, backprop=2, fixed=fixed, per=per) for per in DrawPer)
    assert len(set(sample_rows(shared, 50, 6, 2, seeded(1)))) == 1
    rows = sample_rows(own, 2000, 6, 2, seeded(1))
    assert len(set(rows)) == 1 if fixed else len(set(rows)) > 5
    assert np.mean([row.depth for row in rows]) == pytest.approx(expected_depth(own, 6), rel=0.05)
