"""Every engine against numbers kept here, on checkpoints of every family, written and read."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from localdepth_train.checkpoint import Checkpoint
from localdepth_train.objective import loss
from tests import engines
from tests.golden.make import DEPTHS, FILE, MIXED, PROMPT, RINGS
from tests.published import FAMILIES, make_checkpoint

ATOL = 1e-4  # float32; sums run in another order on another machine


@pytest.fixture(scope="module")
def expected() -> dict[str, NDArray[np.float32]]:
    return dict(np.load(FILE))


def weights_in(folder: Path, kind: str) -> dict[str, NDArray[np.float32]]:
    checkpoint = Checkpoint(make_checkpoint(folder, kind))
    return {name: checkpoint.read(name) for name in checkpoint.config.tensors()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", engines.KINDS)
def test_logits_and_mixed_depths(
    kind: str, family: str, expected: dict[str, NDArray[np.float32]], tmp_path: Path
) -> None:
    weights = weights_in(tmp_path / "checkpoint", family)
    for ring in RINGS:
        engine = engines.make(kind, FAMILIES[family], weights, tmp_path, ring=ring, n_batch=4)
        tokens, logits = engines.greedy(engine, PROMPT, MIXED)
        assert tokens == list(expected[f"{family}/mixed_ids_{ring}"].astype(int))
        np.testing.assert_allclose(logits, expected[f"{family}/mixed_logits_{ring}"], atol=ATOL, rtol=0)
        engine.close()
    engine = engines.make(kind, FAMILIES[family], weights, tmp_path)
    for tag, state in (("zero", None), ("given", expected[f"{family}/state"])):
        for depth, ours in zip(DEPTHS, engines.run(engine, PROMPT, DEPTHS, state), strict=True):
            np.testing.assert_allclose(ours, expected[f"{family}/logits_{tag}_{depth}"], atol=ATOL, rtol=0)
    engine.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradient(family: str, expected: dict[str, NDArray[np.float32]], tmp_path: Path) -> None:
    model = engines.reference_of(FAMILIES[family], weights_in(tmp_path, family))
    ids = torch.tensor([PROMPT])
    value = loss(model, ids, ids.roll(-1, 1), 2, 3, torch.from_numpy(expected[f"{family}/state"])[None])
    value.backward()
    norm = torch.sqrt(sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None))
    assert value.item() == pytest.approx(float(expected[f"{family}/loss"]), abs=ATOL)
    assert norm.item() == pytest.approx(float(expected[f"{family}/gradnorm"]), rel=1e-3)
