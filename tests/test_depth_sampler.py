"""The depth sampler draws what the published trainers draw, and its statistics are those of the distribution."""

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from localdepth_train.depth_sampler import Passes, sample_passes, seeded  # noqa: E402


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
