"""Counted operations are those that torch counts."""

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from torch.nn import functional  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from localdepth.config import ModelConfig  # noqa: E402
from localdepth_train.depth_sampler import Passes  # noqa: E402
from localdepth_train.flops import Flops  # noqa: E402
from localdepth_train.objective import run_passes  # noqa: E402
from localdepth_train.reference import ReferenceModel  # noqa: E402
from tests.published import EXPECTED  # noqa: E402

N_TOKENS = 6
FIRST_SHARE = 0.01  # the first state is not trained: one product less


@pytest.mark.parametrize("kind", ["retrofit_llama", "huginn"])
@pytest.mark.parametrize("passes", [Passes(0, 1), Passes(0, 4), Passes(3, 2)], ids=str)
def test_a_training_step_costs_what_torch_counts(kind: str, passes: Passes) -> None:
    config = replace(EXPECTED[kind], n_vocab=64)
    assert Flops.of(config).training([passes], N_TOKENS, N_TOKENS, recompute=False) == pytest.approx(
        products(config, passes), rel=FIRST_SHARE
    )


def products(config: ModelConfig, passes: Passes) -> int:
    """Operations in the matrix products of a step, as torch counts them."""
    torch.manual_seed(0)
    model = ReferenceModel(config)
    ids = torch.randint(0, config.n_vocab, (1, N_TOKENS))
    with FlopCounterMode(display=False) as counter:
        _, state = run_passes(model, ids, [passes])
        functional.cross_entropy(model.logits(state)[0], ids[0]).backward()
    aten = torch.ops.aten
    return sum(n for op, n in counter.get_flop_counts()["Global"].items() if op in (aten.mm, aten.addmm))
