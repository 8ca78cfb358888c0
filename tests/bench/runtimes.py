"""One looped model in every form that runs it, weight for weight: ggml, our ONNX sessions, Scan, Loop and torch.

    python -m tests.bench.runtimes [PART ...] [--n-embd 512] [--bits 32 8 4] [--rounds 5] [--threads 1]

Parts, all of them where none is named:

*decode*: milliseconds of a further token, by depth after 64 positions, and at depth 4 by positions.
*prefill*: milliseconds of a prompt at depth 4, in the chunks of the seam.
*start*: a fresh process from nothing to the first token of the default model, and what it holds in memory then.
*size*: bytes that the packages of each runtime take on the disk.

Equal bits means F32, Q8_0 or Q4_0 beside 32, 8 or 4 bits, caches in float32; torch computes in float32 throughout.
The forms are loaded at once and take turns; a number is the best of all turns, CPU time of the process with one thread,
wall time with more. Ratios are to ggml: above 1 is slower. Caches have room for what a case needs and no more. Weights
are random, sizes are arguments.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Protocol

import numpy as np
import torch
from onnxruntime import InferenceSession, IOBinding, OrtValue, SessionOptions

from localdepth.config import STAGES, ModelConfig
from localdepth.engine.base import Engine, Ids, KvType, Limits
from localdepth.engine.ggml.engine import GgmlEngine
from localdepth.engine.onnx.engine import OnnxEngine
from localdepth.engine.toy import random_weights
from localdepth.gguf import read
from localdepth.loop import forward
from localdepth.onnx_folder.folder import read as read_folder
from localdepth_export import to_gguf, to_onnx
from localdepth_train.checkpoint import Checkpoint, save
from localdepth_train.reference_engine import ReferenceEngine
from tests.bench.peer_files import model
from tests.engines import fixed

DEPTHS, POSITIONS = (1, 2, 4, 8, 16), (16, 256, 1024, 4080)
BEFORE, AT_DEPTH, PROMPT, CHUNK = 64, 4, 256, 256
TOKENS = 8  # decoded in one turn
N_VOCAB, N_CTX = 8192, 4096
QUANTS = {32: "F32", 8: "Q8_0", 4: "Q4_0"}
PACKAGES = {
    "ggml": ("llama-cpp-python", "numpy", "diskcache", "jinja2", "typing-extensions"),
    "ONNX Runtime": ("onnxruntime", "numpy", "flatbuffers", "protobuf", "packaging"),
    "torch": ("torch", "numpy", "sympy", "mpmath", "networkx", "fsspec", "setuptools"),
}
_FIRST_TOKEN = """
import time
began = time.perf_counter()
import psutil, localdepth
with localdepth.load(engine={engine!r}) as model:
    next(iter(model.stream("Turn left.")))
print(time.perf_counter() - began, psutil.Process().memory_info().rss)
"""


class Form(Protocol):
    """A loaded model at one depth with one sequence."""

    def feed(self, ids: Ids) -> None:
        """Read ids, and compute the logits of the last."""

    def truncate(self, n: int) -> None:
        """Forget all but the first n positions."""

    def close(self) -> None: ...


class Seam:
    """An engine of ours."""

    def __init__(self, engine: Engine, depth: int) -> None:
        self._engine, self._kv, self._decision = engine, engine.open(depth), fixed(depth)

    def feed(self, ids: Ids) -> None:
        forward(self._engine, self._kv, ids, self._decision)

    def truncate(self, n: int) -> None:
        self._kv.truncate(n)

    def close(self) -> None:
        self._kv.close()
        self._engine.close()


class WholeGraph:
    """A graph that holds the whole model, driven as its documentation says: the caches of prelude and coda in place."""

    def __init__(self, folder: Path, name: str, depth: int, n_ctx: int, n_threads: int) -> None:
        options = SessionOptions()
        options.intra_op_num_threads = n_threads
        self._session = InferenceSession(folder / name, options, providers=["CPUExecutionProvider"])
        shapes = {given.name: (given.shape, given.type) for given in self._session.get_inputs()}
        sizes = {"n_past": n_ctx, "n_passes": depth, "n_planes": depth}
        self._caches = {
            given: np.zeros([sizes.get(size, size) for size in shape], np.float32)
            for given, (shape, _) in shapes.items()
            if given.startswith("past.")
        }
        self._values = {name: OrtValue.ortvalue_from_numpy(array) for name, array in self._caches.items()}
        n_embd = shapes["state"][0][-1]
        self._depth, self._n = depth, 0
        self._constant = {"state": np.zeros((1, 1, n_embd), np.float32), "rows": np.array([-1], np.int64)}
        if "threshold" in shapes:
            self._constant |= {"threshold": np.array(0, np.float32), "max_passes": np.array(depth, np.int64)}

    def feed(self, ids: Ids) -> None:
        self._n += len(ids)
        binding = self._session.io_binding()
        given = {"ids": ids[None].astype(np.int64), "n_total": np.array([self._n], np.int32), **self._constant}
        for name, array in given.items():
            binding.bind_cpu_input(name, array)
        for name, value in self._values.items():
            binding.bind_ortvalue_input(name, value)
        for output in self._session.get_outputs():
            if output.name.startswith("present."):
                binding.bind_ortvalue_output(output.name, self._values["past" + output.name.removeprefix("present")])
            else:
                binding.bind_output(output.name)
        self._session.run_with_iobinding(binding)
        self._keep(binding, len(ids))

    def _keep(self, binding: IOBinding, n_new: int) -> None:
        """Put what came out as new rows (of ``looped_exit``) in its place; without them nothing is to do."""
        for output, value in zip(self._session.get_outputs(), binding.get_outputs(), strict=True):
            if output.name.startswith("new."):
                cache = self._caches["past" + output.name.removeprefix("new")]
                cache[..., self._n - n_new : self._n, :] = value.numpy()

    def truncate(self, n: int) -> None:
        self._n = n

    def close(self) -> None:
        del self._session


@contextmanager
def forms(checkpoint: Path, bits: int, depth: int, n_ctx: int, n_threads: int) -> Iterator[dict[str, Form]]:
    """All of them, by name, at one depth, with room for ``n_ctx`` positions."""
    limits = Limits(n_ctx=n_ctx, kv_depth=depth, kv_type=KvType.F32, n_threads=n_threads, n_batch=CHUNK)
    torch.set_num_threads(n_threads)
    folder, file = checkpoint.parent / f"onnx-{bits}", checkpoint.parent / f"{bits}.gguf"
    if not file.exists():
        to_gguf(checkpoint, file, quant=QUANTS[bits])
        to_onnx(checkpoint, folder, bits=bits)
    with ExitStack() as stack:
        ggml = GgmlEngine(stack.enter_context(read(file)), limits)
        sessions = OnnxEngine(stack.enter_context(read_folder(folder)), limits)
        loaded: dict[str, Form] = {
            "ggml": Seam(ggml, depth),
            "sessions": Seam(sessions, depth),
            "Scan": WholeGraph(folder, "looped.onnx", depth, n_ctx, n_threads),
            "Loop": WholeGraph(folder, "looped_exit.onnx", depth, n_ctx, n_threads),
            "torch": Seam(ReferenceEngine.from_checkpoint(Checkpoint(checkpoint), n_ctx=n_ctx), depth),
        }
        for form in loaded.values():
            stack.enter_context(closing(form))
        yield loaded


def race(loaded: Mapping[str, Form], before: int, ids: Ids, rounds: int, n_threads: int) -> dict[str, float]:
    """Best milliseconds of each form for a call that reads a row of ``ids``, after ``before`` positions."""
    clock = time.process_time if n_threads == 1 else time.perf_counter
    rng = np.random.default_rng(0)
    for form in loaded.values():
        form.truncate(0)
        for start in range(0, before, CHUNK):
            form.feed(rng.integers(0, N_VOCAB, min(CHUNK, before - start)).astype(np.int32))
    best = dict.fromkeys(loaded, float("inf"))
    for _ in range(rounds):
        for name, form in loaded.items():
            form.truncate(before)
            form.feed(ids[0])  # brings its weights back into the caches
            form.truncate(before)
            began = clock()
            for row in ids:
                form.feed(row)
            best[name] = min(best[name], 1000 * (clock() - began) / len(ids))
    return best


def _line(case: str, times: Mapping[str, float]) -> str:
    columns = (f"{name} {ms:8.3f} ({ms / times['ggml']:5.2f})" for name, ms in times.items())
    return f"{case:28s} {'  '.join(columns)}"


def decode(checkpoint: Path, arguments: argparse.Namespace) -> None:
    """Print a line for each number of bits, depth and number of positions."""
    print("\nA further token, ms (times ggml)")
    ids = np.arange(TOKENS, dtype=np.int32)[:, None]
    cases = [(depth, BEFORE) for depth in DEPTHS] + [(AT_DEPTH, n) for n in POSITIONS]
    for bits in arguments.bits:
        for depth, before in cases:
            with forms(checkpoint, bits, depth, before + TOKENS, arguments.threads) as loaded:
                times = race(loaded, before, ids, arguments.rounds, arguments.threads)
            print(_line(f"{bits} bits, depth {depth:2}, after {before}", times), flush=True)


def prefill(checkpoint: Path, arguments: argparse.Namespace) -> None:
    """Print a line for each number of bits."""
    print("\nA prompt, ms (times ggml)")
    ids = np.random.default_rng(1).integers(0, N_VOCAB, (1, PROMPT)).astype(np.int32)
    for bits in arguments.bits:
        with forms(checkpoint, bits, AT_DEPTH, PROMPT, arguments.threads) as loaded:
            times = race(loaded, 0, ids, arguments.rounds, arguments.threads)
        print(_line(f"{bits} bits, prompt of {PROMPT}", times), flush=True)


def start(checkpoint: Path, arguments: argparse.Namespace) -> None:
    """Print seconds and memory of a process that answers with the default model."""
    print("\nA fresh process with the default model")
    for engine in ("ggml", "onnx"):
        program = _FIRST_TOKEN.format(engine=engine)
        runs = [_floats([sys.executable, "-c", program]) for _ in range(arguments.rounds)]
        seconds, memory = (median(column) for column in zip(*runs, strict=True))
        print(f"{engine}: first token {seconds:.2f} s after the start, {memory / 1e6:.0f} MB")


def size(checkpoint: Path, arguments: argparse.Namespace) -> None:
    """Print what the packages of each runtime take."""
    print("\nInstalled size")
    for runtime, names in PACKAGES.items():
        print(f"{runtime}: {sum(map(_package_bytes, names)) / 1e6:.0f} MB")


def _floats(command: Sequence[str]) -> list[float]:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.split()]


def _package_bytes(name: str) -> int:
    """Bytes of an installed package; 0 where it is not."""
    try:
        files = distribution(name).files or []
    except PackageNotFoundError:
        return 0
    paths = (Path(str(file.locate())) for file in files)
    return sum(path.stat().st_size for path in paths if path.exists())


PARTS: Mapping[str, Callable[[Path, argparse.Namespace], None]] = {
    "decode": decode,
    "prefill": prefill,
    "start": start,
    "size": size,
}


def write_checkpoint(folder: Path, n_embd: int) -> Path:
    """Two layers in every stage, random weights."""
    config: ModelConfig = model(n_embd, 11 * n_embd // 4, (2, 2, 2), N_VOCAB, N_CTX)
    assert all(config.n_layer(stage) == 2 for stage in STAGES)
    return save(folder / "checkpoint", config, random_weights(config, 0))


def main() -> None:
    """Print the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="PART")
    parser.add_argument("--n-embd", type=int, default=512)
    parser.add_argument("--bits", type=int, nargs="+", default=list(QUANTS), choices=QUANTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(Path(folder), arguments.n_embd)
        for part in arguments.parts or PARTS:
            PARTS[part](checkpoint, arguments)


if __name__ == "__main__":
    main()
