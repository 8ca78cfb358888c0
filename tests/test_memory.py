"""Memory is planned before it is taken: plans come true, and what cannot fit is refused with what would."""

import subprocess
import sys
from pathlib import Path

import pytest

from localdepth.config import ModelConfig
from localdepth.engine.ggml.lib import library
from localdepth.engine.toy import random_weights
from localdepth.errors import ConfigError, DepthError, OutOfMemory
from localdepth.loading import load, plan
from localdepth.memory import as_size, available_bytes
from localdepth.quant import Quant
from tests import engines

SLACK = 0.10  # share of the plan that may be missed either way
CONFIG = ModelConfig(
    n_prelude=1,
    n_core=4,
    n_coda=1,
    n_embd=512,
    n_head=8,
    n_head_kv=4,
    head_dim=64,
    n_ff=1536,
    n_vocab=8192,
    n_ctx=1536,
    norm_eps=1e-5,
    default_depth=6,
    max_depth=64,
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("memory") / "model.gguf"
    return engines.write_model(path, CONFIG, random_weights(CONFIG, 0), Quant.Q4_K)


# Fills the context and prints what the model took, in bytes: most it ever held, less what the process held before.
PROGRAM = """
import sys
import numpy as np
from localdepth.loading import load
from localdepth.sampling import GREEDY

def status(name):
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

load(None).close()
before = status("VmRSS")
model = load(sys.argv[1], low_memory=sys.argv[2] == "True", kv_depth=6)
ids = list(np.random.default_rng(0).integers(0, model.config.n_vocab, model.limits.n_ctx - 2))
model.generate(ids, depth=6, max_tokens=2)
print(model.memory(6).total, status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("low_memory", [False, True])
def test_the_most_a_model_ever_holds_is_what_was_planned(file: Path, low_memory: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(file), str(low_memory)], capture_output=True, text=True, check=True
    )
    planned, held = map(int, done.stdout.split())
    assert abs(held - planned) < SLACK * planned, f"{as_size(planned)} planned, {as_size(held)} held"


def test_a_plan_needs_no_loading_and_is_the_one_of_the_loaded_model(file: Path) -> None:
    planned = plan(file, depth=8, ring=3)
    with load(file, ring=3, n_threads=1) as model:
        assert model.memory(8) == planned
    assert planned.total == planned.weights + planned.sequence + planned.scratch
    slots = 1 + 4 * 3 + 1
    assert planned.kv == slots * 2 * CONFIG.n_ctx * CONFIG.n_embd_kv * 2


def test_kv_grows_with_depth_until_the_ring_is_full(file: Path) -> None:
    own = [plan(file, depth=depth).kv for depth in (1, 2, 8)]
    ring = [plan(file, depth=depth, ring=2).kv for depth in (1, 2, 8)]
    assert own[2] - own[1] == 6 * (own[1] - own[0]) > 0
    assert ring[:2] == own[:2]
    assert ring[2] == ring[1]


def test_float32_keys_take_twice_the_bytes(file: Path) -> None:
    assert plan(file, kv_type="f32").kv == 2 * plan(file, kv_type="f16").kv


def test_packed_copies_are_left_out_on_request_and_where_they_do_not_fit(file: Path) -> None:
    if not library().extra_buffer_types():
        pytest.skip("this CPU has no packed layouts")
    full, lean = plan(file), plan(file, low_memory=True)
    assert full.packed
    assert not lean.packed
    with load(file, memory_limit=full.total) as model:
        assert model.memory() == full
    with load(file, memory_limit=full.total - 1) as model:
        assert model.memory() == lean


def test_a_model_that_cannot_fit_is_refused_with_what_would(file: Path) -> None:
    lean = plan(file, low_memory=True)
    with pytest.raises(OutOfMemory) as refused:
        load(file, memory_limit=lean.total - 1)
    message = str(refused.value)
    remedies = ("ring=4 (--ring 4)", "n_ctx=768 (--n-ctx 768)", "kv_depth=5 (--kv-depth 5)")
    for part in (as_size(lean.total), "depth 6 x 1536 positions", *remedies):
        assert part in message
    with load(file, memory_limit=lean.total - 1, kv_depth=5) as model:
        assert model.generate([1, 2], depth=5, max_tokens=1).depth == 5
    shared = plan(file, low_memory=True, ring=4)
    with load(file, memory_limit=lean.total - 1, ring=4) as model:
        assert model.memory() == shared
    with pytest.raises(OutOfMemory, match="use a coarser quant"):
        load(file, memory_limit=1_000_000)


@pytest.fixture
def tight(file: Path) -> tuple[Path, int]:
    """The file, and a limit that lets one sequence of depth 8 in."""
    return file, plan(file, depth=8, low_memory=True).total


def test_a_request_beyond_the_memory_is_refused_and_the_model_stays_usable(tight: tuple[Path, int]) -> None:
    path, limit = tight
    with load(path, memory_limit=limit) as model:
        with pytest.raises(OutOfMemory, match=r"depth 32 x 1536 positions.*depth=8 "):
            model.generate([1, 2, 3], depth=32, max_tokens=1)
        assert model.generate([1, 2, 3], depth=8, max_tokens=1).depth == 8


def test_going_deeper_from_a_kept_prefix_is_refused_too(tight: tuple[Path, int]) -> None:
    path, limit = tight
    with load(path, memory_limit=limit) as model:
        model.generate([1, 2, 3], depth=8, max_tokens=1)
        with pytest.raises(OutOfMemory):
            model.generate([1, 2, 3], depth=9, max_tokens=1)
        assert model.generate([1, 2, 3], depth=8, max_tokens=1).depth == 8


def test_what_is_kept_makes_room(tight: tuple[Path, int]) -> None:
    path, limit = tight
    with load(path, memory_limit=limit) as model:
        model.generate([1, 2, 3], depth=8, max_tokens=1)
        assert model.logits([4, 5], depth=8).shape == (2, CONFIG.n_vocab)
        model.generate([1, 2, 3], depth=8, max_tokens=1)
        assert model.generate([1, 2, 3], depth=8, warm_start=True, max_tokens=1).depth == 8


def test_a_second_sequence_at_the_same_time_needs_its_own_room(tight: tuple[Path, int]) -> None:
    path, limit = tight
    with load(path, memory_limit=limit) as model:
        stream = model.stream([1, 2, 3], depth=8)
        next(stream)
        with pytest.raises(OutOfMemory):
            model.generate([1, 2, 3], depth=8, max_tokens=1)
        stream.close()
        assert model.generate([4, 5], depth=8, max_tokens=1).depth == 8


def test_plans_refuse_what_loading_refuses(file: Path) -> None:
    with pytest.raises(DepthError, match=r"outside 1\.\.64"):
        plan(file, depth=65)
    with pytest.raises(ConfigError, match="n_ctx=0"):
        plan(file, n_ctx=0)
    with pytest.raises(ConfigError, match="memory_limit=0"):
        load(file, memory_limit=0)


def test_the_machine_says_what_it_has() -> None:
    assert 1 << 20 < available_bytes() < 1 << 50


@pytest.mark.parametrize(
    ("n_bytes", "shown"),
    [(1_500_000_000, "1.5 GB"), (20_400_000, "20.4 MB"), (999_999, "1 MB"), (999_000, "999 kB"), (12, "12 bytes")],
)
def test_sizes_read_well(n_bytes: int, shown: str) -> None:
    assert as_size(n_bytes) == shown
