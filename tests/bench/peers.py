"""The ggml engine against stock llama.cpp on the same weights: times of one run, as ratios.

    python -m tests.bench.peers [--threads 1 2] [--quants Q8_0 Q4_0 Q4_K] [--only decode] [--rounds 10] [--cache-mb 64]

Stock runs the same model unrolled (``llama``: every layer has its own weights) and, where there is neither prelude nor
coda, as its own looped architecture (``nanbeige``), from the same llama-cpp-python, flash attention on, F16 K/V; of its
layouts (see ``llama_cpp``) the best counts for each number. All models of a case are loaded at once and take turns; a
number is the best of all turns: CPU time of the thread with one thread, wall time with more. A ratio above 1 means that
we are faster.

A loop wins where the core fits the cache and the unrolled layers do not: there decoding must reach 1.25 x (1 thread)
and 1.6 x (more), elsewhere 0.97 x, and prefill 1.0 x. What fits is a property of the machine: the first lines show how
fast one thread reads memory, and ``--cache-mb`` says where it slows down. Stock's last feed-forward computes one row of
a prompt; ours does so in the coda, so a model without a coda lacks that saving: any of its passes may be the last.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt

from localdepth.config import ModelConfig
from localdepth.engine.base import F32, Limits
from localdepth.engine.ggml.engine import GgmlEngine
from localdepth.gguf import read
from localdepth.loop import forward
from localdepth.policy.base import Decision
from localdepth.quant import Quant
from tests.bench.llama_cpp import Stock, layouts, survives_batches
from tests.bench.peer_files import model, write_nanbeige, write_ours, write_unrolled
from tests.bench.random_weights import quants_of, stored_weights

N_CTX, N_VOCAB = 1024, 2048
PROMPT, STEPS = 16, 8  # decode: positions before, tokens timed in one turn


@dataclass(frozen=True)
class Case:
    """One comparison: a model, the depth it runs at, and how many tokens to prefill; None decodes."""

    config: ModelConfig
    depth: int
    prefill: int | None = None
    quants: tuple[Quant, ...] = (Quant.Q8_0, Quant.Q4_0, Quant.Q4_K)

    @property
    def name(self) -> str:
        c = self.config
        what = "decode" if self.prefill is None else f"prefill {self.prefill}"
        return f"{what}, {c.n_embd} wide, {c.n_prelude}/{c.n_core}/{c.n_coda}, depth {self.depth}"

    def layer_bytes(self, quant: Quant) -> tuple[int, int, int]:
        """Weights of the core, of all layers with the core once, and of all layers unrolled."""
        quants = quants_of(self.config, quant)
        sizes = {name: quants[name].n_bytes(shape) for name, shape in self.config.tensors().items()}
        core = sum(size for name, size in sizes.items() if name.startswith("core"))
        rest = sum(size for name, size in sizes.items() if name.startswith(("prelude", "coda")))
        return core, rest + core, rest + core * self.depth

    def target(self, quant: Quant, n_threads: int, cache_bytes: int) -> float:
        """The ratio to reach."""
        if self.prefill is not None:
            return 1.0
        core, _, unrolled = self.layer_bytes(quant)
        if core <= cache_bytes < unrolled and self.depth > 1:
            return 1.25 if n_threads == 1 else 1.6
        return 0.97


def _sized(n_embd: int, n_ff: int, *n_layers: int) -> ModelConfig:
    prelude, core, coda = n_layers
    return model(n_embd, n_ff, (prelude, core, coda), N_VOCAB, N_CTX)


CASES = (
    Case(_sized(512, 1536, 0, 2, 0), 8),
    Case(_sized(1024, 2816, 0, 2, 0), 8),
    Case(_sized(2048, 5632, 0, 1, 0), 8),
    Case(_sized(2048, 5632, 0, 6, 0), 2, quants=(Quant.Q8_0,)),
    Case(_sized(512, 1536, 2, 2, 2), 1),
    Case(_sized(1024, 2816, 2, 2, 2), 1),
    Case(_sized(512, 1536, 0, 2, 0), 8, prefill=64),
    Case(_sized(512, 1536, 0, 2, 0), 8, prefill=512),
    Case(_sized(512, 1536, 2, 2, 2), 8, prefill=64),
    Case(_sized(512, 1536, 2, 2, 2), 8, prefill=512),
    Case(_sized(1024, 2816, 2, 2, 2), 2, prefill=64),
)


class Ours:
    """The ggml engine behind the same three calls as ``Stock``."""

    def __init__(self, path: Path, depth: int, n_threads: int) -> None:
        self._stack = ExitStack()
        file = self._stack.enter_context(read(path))
        self._engine = GgmlEngine(file, Limits(n_ctx=N_CTX, kv_depth=depth, n_threads=n_threads))
        self._stack.callback(self._engine.close)
        self._kv = self._engine.open(depth)
        self._decision = Decision(floor=depth, ceiling=depth, chosen_by="bench", reason="fixed")

    def decode(self, tokens: list[int]) -> F32:
        logits, _ = forward(self._engine, self._kv, np.array(tokens, np.int32), self._decision)
        last: F32 = logits[0]
        return last

    def truncate(self, n: int) -> None:
        self._kv.truncate(n)

    def close(self) -> None:
        self._stack.close()


@contextmanager
def _contenders(case: Case, quant: Quant, n_threads: int) -> Iterator[dict[str, Ours | Stock]]:
    """Ours, and stock by 'file layout'; a layout that dies on batches is left out of prefill."""
    quants = quants_of(case.config, quant)
    weights = dict(stored_weights(case.config, quants))
    loaded: dict[str, Ours | Stock] = {}
    with TemporaryDirectory() as folder, ExitStack() as stack:
        ours = write_ours(Path(folder) / "ours.gguf", case.config, quants, weights)
        files = {"llama": write_unrolled(Path(folder) / "llama.gguf", case.config, quants, weights, case.depth)}
        if case.config.n_prelude == case.config.n_coda == 0:
            path = Path(folder) / "nanbeige.gguf"
            files["nanbeige"] = write_nanbeige(path, case.config, quants, weights, case.depth)
        loaded["ours"] = stack.enter_context(closing(Ours(ours, case.depth, n_threads)))
        for name, path in files.items():
            for layout in layouts(quant):
                if case.prefill is None or layout != "default" or survives_batches(path):
                    stock = stack.enter_context(closing(Stock(path, layout, n_threads, N_CTX)))
                    loaded[f"{name} {layout}"] = stock
        yield loaded


def measure(case: Case, quant: Quant, n_threads: int, rounds: int) -> tuple[dict[str, float], float]:
    """Best milliseconds of each contender for a token or a prompt; largest difference of logits to stock's plain."""
    clock = time.thread_time if n_threads == 1 else time.perf_counter
    with _contenders(case, quant, n_threads) as loaded:
        best = dict.fromkeys(loaded, float("inf"))
        for _ in range(rounds):
            for name, one in loaded.items():
                best[name] = min(best[name], _turn(one, case.prefill, clock))
        [ours, stock] = (_logits(loaded[name]) for name in ("ours", "llama plain"))
    return {name: 1000 * seconds for name, seconds in best.items()}, float(np.abs(ours - stock).max())


def _turn(one: Ours | Stock, prefill: int | None, clock: Callable[[], float]) -> float:
    """Seconds of one prompt, or of the fastest of a few single tokens after others that warmed the caches."""
    one.truncate(0)
    if prefill is not None:
        return _timed(one, list(range(prefill)), clock)
    for token in range(PROMPT):
        one.decode([token])
    return min(_timed(one, [token], clock) for token in range(STEPS))


def _timed(one: Ours | Stock, tokens: list[int], clock: Callable[[], float]) -> float:
    began = clock()
    one.decode(tokens)
    return clock() - began


def _logits(one: Ours | Stock) -> F32:
    one.truncate(0)
    return np.stack([one.decode([token]) for token in range(4)])


def _report(case: Case, quant: Quant, n_threads: int, times: dict[str, float], target: float) -> str:
    columns = [f"{case.name:40s} {quant:5s} {n_threads}T  ours {times['ours']:9.3f} ms"]
    for peer in ("llama", "nanbeige"):
        if found := {name: ms for name, ms in times.items() if name.startswith(peer)}:
            name = min(found, key=found.__getitem__)
            columns.append(f"{name:17s} {found[name]:9.3f} ms = {found[name] / times['ours']:5.2f}x")
    ratio = min(ms for name, ms in times.items() if name.startswith("llama")) / times["ours"]
    columns.append(f"target {target:.2f}x: {'met' if ratio >= target else 'MISSED'}")
    return "  ".join(columns)


def _bandwidth() -> None:
    memory = np.ones(1 << 26)  # 512 MB
    for megabytes in (1, 2, 4, 16, 64, 128, 256, 512):
        part = memory[: megabytes << 17]
        seconds = min(_read_seconds(part) for _ in range(5))
        print(f"one thread reads {megabytes:4d} MB again and again at {part.nbytes / seconds / 1e9:5.1f} GB/s")


def _read_seconds(part: npt.NDArray[np.float64]) -> float:
    began = time.thread_time()
    part.max()
    return time.thread_time() - began


def main() -> None:
    """Print one line per case, quant and number of threads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--quants", type=Quant, nargs="+", default=[Quant.Q8_0, Quant.Q4_0, Quant.Q4_K])
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--cache-mb", type=int, default=64)
    parser.add_argument("--all", action="store_true", help="every layout of stock, not only its best")
    arguments = parser.parse_args()
    _bandwidth()
    for case in CASES:
        if arguments.only not in case.name:
            continue
        for quant in (q for q in case.quants if q in arguments.quants):
            for n_threads in arguments.threads:
                times, difference = measure(case, quant, n_threads, arguments.rounds)
                target = case.target(quant, n_threads, arguments.cache_mb * 1_000_000)
                print(_report(case, quant, n_threads, times, target), flush=True)
                if arguments.all:
                    print("  " + ", ".join(f"{name} {ms:.3f} ms" for name, ms in times.items()))
            _, shared, unrolled = case.layer_bytes(quant)
            print(
                f"  layers' weights {shared / 1e6:.1f} MB, unrolled {unrolled / 1e6:.1f} MB = {unrolled / shared:.1f}x;"
                f" logits differ from stock's plain layout by at most {difference:.1g}"
            )


if __name__ == "__main__":
    main()
