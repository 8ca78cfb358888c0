"""Decode speed of the ggml engine by depth, against the torch reference model on the same weights.

    python -m tests.bench.decode [--n-embd 512] [--threads 1]

Both extend a cache one token at a time. Times are the best of several interleaved rounds, because machines are
shared; read the ratios.
"""

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from localdepth.config import ModelConfig
from localdepth.engine.base import Engine, KvType, Limits
from localdepth.engine.ggml.engine import GgmlEngine
from localdepth.engine.toy import random_weights
from localdepth.gguf import read
from localdepth.loop import forward
from localdepth.quant import Quant
from localdepth_train.reference_engine import ReferenceEngine
from tests import engines

DEPTHS = (1, 4, 8, 16)
ROUNDS, TOKENS = 5, 8


def ms_per_token(engine: Engine, depth: int) -> float:
    """Time of one more token after a short prompt."""
    kv = engine.open(depth)
    forward(engine, kv, np.arange(16, dtype=np.int32), engines.fixed(depth))
    began = time.perf_counter()
    for token in range(TOKENS):
        forward(engine, kv, np.array([token], np.int32), engines.fixed(depth))
    elapsed = time.perf_counter() - began
    kv.close()
    return 1000 * elapsed / TOKENS


def main() -> None:
    """Print one line per depth and quant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n-embd", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    n = arguments.n_embd
    config = ModelConfig(
        n_prelude=2,
        n_core=2,
        n_coda=2,
        n_embd=n,
        n_head=n // 64,
        n_head_kv=n // 128,
        head_dim=64,
        n_ff=3 * n,
        n_vocab=4096,
        n_ctx=256,
        norm_eps=1e-5,
        default_depth=8,
        max_depth=64,
    )
    torch.set_num_threads(arguments.threads)
    limits = Limits(n_ctx=256, kv_depth=16, kv_type=KvType.F16, n_threads=arguments.threads)
    weights = random_weights(config, 0)
    peer = ReferenceEngine(engines.reference_of(config, weights), limits)
    made: dict[str, Engine] = {}
    with TemporaryDirectory() as folder:
        for quant in (Quant.F32, Quant.F16, Quant.Q8_0):
            with read(engines.write_model(Path(folder) / "m.gguf", config, weights, quant)) as file:
                made[quant] = GgmlEngine(file, limits)
    print(f"{config.n_params:,} parameters, {arguments.threads} threads; ms per token, times faster than torch")
    for depth in DEPTHS:
        best = dict.fromkeys(("torch", *made), float("inf"))
        for _ in range(ROUNDS):
            for name, engine in (("torch", peer), *made.items()):
                best[name] = min(best[name], ms_per_token(engine, depth))
        shown = "  ".join(f"{name} {best[name]:6.2f} ({best['torch'] / best[name]:.1f}x)" for name in made)
        print(f"depth {depth:2d}  torch F32 {best['torch']:6.2f}  {shown}")


if __name__ == "__main__":
    main()
