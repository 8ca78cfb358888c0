"""Writes ``expected.npz``: what the reference gave for models of every family when it equalled the published code.

python -m tests.golden.make
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from localdepth.engine.base import KvType, Limits
from localdepth_train.objective import loss
from localdepth_train.reference_engine import ReferenceEngine
from tests import engines
from tests.published import FAMILIES, weights_of

DEPTHS = (1, 2, 4, 8, 16)
PROMPT = (7, 45, 3, 88, 21, 21, 60, 2, 34)
MIXED = (6, 3, 8, 1, 5, 2)  # depth of the prompt, then of each generated token
RINGS = (None, 1, 4)
FILE = Path(__file__).parent / "expected.npz"


def compute(kind: str) -> dict[str, NDArray[np.float32]]:
    """All expected arrays of one family."""
    config, weights = weights_of(kind)
    model = engines.reference_of(config, weights)
    state = np.random.default_rng(1).standard_normal((len(PROMPT), config.n_embd)).astype(np.float32)
    results = {"state": state}
    for ring in RINGS:
        engine = ReferenceEngine(model, Limits(n_ctx=64, kv_depth=64, ring=ring, kv_type=KvType.F32))
        tokens, logits = engines.greedy(engine, PROMPT, MIXED)
        results |= {f"mixed_ids_{ring}": np.array(tokens), f"mixed_logits_{ring}": logits}
    engine = ReferenceEngine(model, Limits(n_ctx=64, kv_depth=64, kv_type=KvType.F32))
    for tag, start in (("zero", None), ("given", state)):
        for depth, logits in zip(DEPTHS, engines.run(engine, PROMPT, DEPTHS, start), strict=True):
            results[f"logits_{tag}_{depth}"] = logits
    ids = torch.tensor([PROMPT])
    value = loss(model, ids, ids.roll(-1, 1), 2, 3, torch.from_numpy(state)[None])
    value.backward()
    results["loss"] = np.float32(value.item())
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    results["gradnorm"] = np.float32(torch.sqrt(sum(g.square().sum() for g in gradients)).item())
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    arrays = {f"{kind}/{name}": array for kind in FAMILIES for name, array in compute(kind).items()}
    np.savez_compressed(FILE, **{name: np.asarray(array, np.float32) for name, array in arrays.items()})
