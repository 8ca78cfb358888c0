"""Published models at their full size, with random weights: what they take of this machine's memory and time.

    python -m tests.bench.published [tinyllama huginn] [--threads 1]

Each file is written tensor by tensor into a temporary folder and run in a process of its own; that process says the
most memory it ever held (``VmHWM``, mapped weights included; Linux only). The cache is laid out for 2,048 positions, of
which only written pages count; one line gives the plan, which fills them all. Times are CPU time with one thread, wall
time with more.
"""

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

from localdepth.config import ModelConfig, NormPlacement, RopeStyle, StateInit
from localdepth.loading import load
from localdepth.memory import MemoryPlan
from localdepth.quant import Quant
from localdepth_export.gguf_writer import write
from tests.bench.random_weights import quants_of, stored_weights

N_CTX, LIMIT_GB = 2048, 8
DEPTHS = (1, 2, 4, 8, 16, 32)
PROMPT, TOKENS = 16, 5


@dataclass(frozen=True)
class Published:
    """A published shape, how it is stored, and the depth that memory is stated for."""

    config: ModelConfig
    quant: Quant
    ring: int | None
    depth: int


MODELS = {
    "tinyllama": Published(  # TinyLlama-1.1B retrofitted: Geiping et al. 2025, arXiv:2511.07384
        ModelConfig(
            n_prelude=4,
            n_core=8,
            n_coda=4,
            n_embd=2048,
            n_head=32,
            n_head_kv=4,
            head_dim=64,
            n_ff=5632,
            n_vocab=32000,
            n_ctx=2048,
            norm_eps=1e-5,
            default_depth=8,
            max_depth=64,
        ),
        Quant.Q4_K,
        ring=None,
        depth=8,
    ),
    "huginn": Published(  # Huginn-0125, 3.5 billion parameters: arXiv:2502.05171
        ModelConfig(
            n_prelude=2,
            n_core=4,
            n_coda=2,
            n_embd=5280,
            n_head=55,
            n_head_kv=55,
            head_dim=96,
            n_ff=17920,
            n_vocab=65536,
            n_ctx=4096,
            norm_eps=1e-6,
            norm_placement=NormPlacement.ON_SUM,
            qk_bias=True,
            rope_style=RopeStyle.INTERLEAVED,
            rope_base=50000.0,
            embed_scale=5280**0.5,
            state_init=StateInit.NORMAL,
            state_std=0.6325,
            norm_after_core=True,
            tied_head=True,
            default_depth=32,
            max_depth=64,
        ),
        Quant.Q4_0,
        ring=4,
        depth=32,
    ),
}


def measure(name: str, path: Path, n_threads: int) -> None:
    """Run one file at every depth in this process and print what it took."""
    published = MODELS[name]
    clock = time.process_time if n_threads == 1 else time.perf_counter
    began = time.perf_counter()
    with load(path, n_ctx=N_CTX, ring=published.ring, kv_depth=max(DEPTHS), n_threads=n_threads) as model:
        print(f"  loaded in {time.perf_counter() - began:.1f} s")
        for depth in DEPTHS:
            prompt = list(range(depth, depth + PROMPT))  # begins with another token each time: nothing to reuse
            stream = model.stream(prompt, depth=depth, max_tokens=TOKENS)
            moments = [clock(), *(clock() for _ in stream)]
            first, *gaps = (later - earlier for earlier, later in pairwise(moments))
            print(
                f"  depth {depth:2d}: {1 / min(gaps):7.2f} tokens/s, first token of a prompt of {PROMPT} after "
                f"{first:6.2f} s, resident at most {_peak_gb():.2f} GB",
                flush=True,
            )
            if depth == published.depth:
                _judge(model.memory(depth))


def _judge(planned: MemoryPlan) -> None:
    verdict = "met" if planned.total <= LIMIT_GB * 1e9 else "MISSED"
    print(f"  planned with all positions filled: {planned} (limit {LIMIT_GB} GB: {verdict})")


def _peak_gb() -> float:
    """The most memory this process ever held."""
    status = Path("/proc/self/status").read_text()
    [kilobytes] = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    return int(kilobytes) / 1e6


def _describe(name: str) -> str:
    config, sharing = MODELS[name].config, "OWN" if MODELS[name].ring is None else f"RING {MODELS[name].ring}"
    layers = f"{config.n_prelude}/{config.n_core}/{config.n_coda}"
    return f"{name} {layers}, {config.n_params / 1e9:.2f} billion parameters, {MODELS[name].quant}, {sharing}"


def main() -> None:
    """Write and run each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", default=list(MODELS), help=", ".join(MODELS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)  # the process that runs a written file
    arguments = parser.parse_args()
    if arguments.file:
        measure(arguments.names[0], arguments.file, arguments.threads)
        return
    for name in arguments.names:
        config = MODELS[name].config
        quants = quants_of(config, MODELS[name].quant)
        with TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            write(path, config, quants, stored_weights(config, quants))
            print(f"{_describe(name)}: file of {path.stat().st_size / 1e9:.2f} GB", flush=True)
            again = [sys.executable, "-m", "tests.bench.published", name]
            subprocess.run([*again, "--threads", str(arguments.threads), "--file", str(path)], check=True)


if __name__ == "__main__":
    main()
