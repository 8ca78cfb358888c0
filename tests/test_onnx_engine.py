"""The ONNX engine: the reference's numbers for every family, exact deepening, caches in place or apart, memory."""

import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from localdepth.config import Injection, ModelConfig
from localdepth.engine.base import F32, KvType, Limits
from localdepth.engine.onnx.engine import OnnxEngine
from localdepth.engine.toy import random_weights
from localdepth.errors import ConfigError, OutOfMemory
from localdepth.gguf import read as read_gguf
from localdepth.loading import DEFAULT_MODEL, load, plan
from localdepth.loop import forward, resume
from localdepth.memory import as_size
from localdepth.onnx_folder.folder import read
from localdepth.prompt import PromptReader
from localdepth_train.tasks.questions import evaluation
from tests import engines
from tests.conftest import ROOT
from tests.published import FAMILIES, weights_of
from tests.test_memory import CONFIG, PROGRAM

CLOSE = 1e-4  # of logits in float32, whose sums run in another order
DEPTHS = (1, 2, 4, 8, 16)
IDS = [3, 1, 4, 1, 5, 9, 2, 6]
SLACK = 0.10  # share of the memory plan that may be missed either way
WIDE = replace(CONFIG, n_core=1, n_head_kv=1, n_ff=4096, n_vocab=1024, n_ctx=2048)  # working memory above all
PLACES = pytest.mark.parametrize("in_place", [True, False])


def engine_of(folder: Path, config: ModelConfig, in_place: bool | None = None, **limits: int | None) -> OnnxEngine:
    path = folder / "model"
    if not path.exists():
        engines.write_folder(path, config, random_weights(config, 1))
    settings = {"n_ctx": min(config.n_ctx, 64), "kv_depth": 64, **limits}
    with read(path) as opened:
        return OnnxEngine(opened, Limits(kv_type=KvType.F32, **settings), in_place)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_references_logits_at_every_depth(family: str, tmp_path: Path) -> None:
    config, weights = weights_of(family)
    reference, engine = (engines.make(kind, config, weights, tmp_path) for kind in ("reference", "onnx"))
    for depth, wanted in zip(DEPTHS, engines.run(reference, IDS, DEPTHS), strict=True):
        np.testing.assert_allclose(engines.run(engine, IDS, [depth])[0], wanted, rtol=0, atol=CLOSE)
        kv = engine.open(depth)
        single = [forward(engine, kv, np.array([token], np.int32), engines.fixed(depth))[0] for token in IDS]
        np.testing.assert_allclose(np.concatenate(single), wanted, rtol=0, atol=CLOSE)
    engine.close()


@cache
def default_weights() -> tuple[ModelConfig, dict[str, F32], list[list[int]]]:
    """The default model in float32, and questions for it."""
    with read_gguf(ROOT / "localdepth" / "models" / DEFAULT_MODEL) as file:
        reader = PromptReader(file.tokenizer, file.config.n_vocab)
        prompts = [[*reader.read(question.text).ids] for question in evaluation(5, 2, steps=[4])]
        return file.config, {name: file.array(name) for name in file.tensors}, prompts


@pytest.mark.parametrize("depth", [1, 4, 16])
def test_ggml_onnx_and_torch_say_the_same_with_the_default_model(depth: int, tmp_path: Path) -> None:
    config, weights, prompts = default_weights()
    said = {}
    for kind in ("reference", "ggml", "onnx"):
        engine = engines.make(kind, config, weights, tmp_path, n_ctx=256)
        said[kind] = [engines.greedy(engine, prompt, [depth] * 12)[0] for prompt in prompts]
        engine.close()
    assert said["ggml"] == said["reference"]
    assert said["onnx"] == said["reference"]


@PLACES
@pytest.mark.parametrize("injection", Injection)
@pytest.mark.parametrize("ring", [None, 2])
def test_going_deeper_equals_having_started_there_bit_for_bit(
    in_place: bool, injection: Injection, ring: int | None, tmp_path: Path
) -> None:
    config = replace(FAMILIES["huginn"], injection=injection)
    engine = engine_of(tmp_path, config, in_place, ring=ring, n_batch=3)
    ids = np.array(IDS, np.int32)
    kv, straight = engine.open(6), engine.open(6)
    forward(engine, kv, ids, engines.fixed(4))
    deeper, depth = resume(engine, kv, engines.fixed(6))
    wanted, _ = forward(engine, straight, ids, engines.fixed(6))
    assert depth == 6
    np.testing.assert_array_equal(deeper, wanted)
    after = [forward(engine, cache, np.array([7], np.int32), engines.fixed(6))[0] for cache in (kv, straight)]
    np.testing.assert_array_equal(*after)
    engine.close()


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(depths=st.lists(st.integers(1, 6), min_size=2, max_size=5), ring=st.sampled_from([None, 1, 2, 3]))
def test_caches_apart_give_the_same_bits_as_caches_in_place(
    depths: list[int], ring: int | None, tmp_path: Path
) -> None:
    results = []
    for in_place in (True, False):
        engine = engine_of(tmp_path, FAMILIES["retrofit_olmo2"], in_place, ring=ring, n_batch=3)
        results.append(engines.greedy(engine, IDS, depths)[1])
        engine.close()
    np.testing.assert_array_equal(*results)


def test_caches_are_written_in_place_here(tmp_path: Path) -> None:
    tried, told = engine_of(tmp_path, FAMILIES["huginn"]), engine_of(tmp_path, FAMILIES["huginn"], in_place=False)
    assert not tried._apart
    assert set(told._apart) == {"prelude", "core", "coda"}


def test_a_fork_lives_on_when_its_origin_is_closed_and_ends_with_the_engine(tmp_path: Path) -> None:
    engine = engine_of(tmp_path, FAMILIES["huginn"])
    kv = engine.open(3)
    forward(engine, kv, np.array(IDS, np.int32), engines.fixed(3))
    fork = kv.fork(4)
    kv.close()
    logits, _ = forward(engine, fork, np.array(IDS[4:], np.int32), engines.fixed(3), "all")
    np.testing.assert_allclose(logits, engines.run(engine, IDS, [3])[0][4:], rtol=0, atol=CLOSE)
    engine.close()
    assert fork.closed


def test_half_a_cache_is_refused_with_what_to_pass(tmp_path: Path) -> None:
    path = engines.write_folder(tmp_path / "model", *weights_of("huginn"))
    with pytest.raises(ConfigError, match="float32; pass f32 or leave it out"):
        load(path, kv_type="f16")
    with load(path) as model:
        assert model.limits.kv_type is KvType.F32


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return engines.write_folder(tmp_path_factory.mktemp("memory") / "m", CONFIG, random_weights(CONFIG, 0), bits=8)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("config", [CONFIG, WIDE], ids=["large", "wide"])
def test_the_most_a_folder_ever_holds_is_what_was_planned(config: ModelConfig, tmp_path: Path) -> None:
    folder = engines.write_folder(tmp_path / "model", config, random_weights(config, 0), bits=8)
    program = PROGRAM.replace("load(None)", 'load(None, engine="onnx")')
    done = subprocess.run([sys.executable, "-c", program, folder, "False"], capture_output=True, text=True, check=True)
    planned, held = map(int, done.stdout.split())
    assert abs(held - planned) < SLACK * planned, f"{as_size(planned)} planned, {as_size(held)} held"


def test_a_folder_that_cannot_fit_is_refused_with_what_would(large: Path) -> None:
    needed = plan(large)
    with pytest.raises(OutOfMemory) as refused:
        load(large, memory_limit=needed.total - 1)
    for part in (as_size(needed.total), "ring=4 (--ring 4)", "n_ctx=768 (--n-ctx 768)", "kv_depth=5 (--kv-depth 5)"):
        assert part in str(refused.value)
    with load(large, memory_limit=needed.total) as model:
        assert model.memory() == needed
        with pytest.raises(OutOfMemory, match=r"depth 32 x 1536 positions.*depth=6 "):
            model.generate([1, 2, 3], depth=32, max_tokens=1)
        assert model.generate([1, 2, 3], depth=6, max_tokens=1).depth == 6


def test_float_weights_are_copied_only_where_memory_is_not_low(tmp_path: Path) -> None:
    path = engines.write_folder(tmp_path / "model", CONFIG, random_weights(CONFIG, 0))
    full, lean = plan(path), plan(path, low_memory=True)
    assert full.packed
    assert not lean.packed
    assert full.weights == lean.weights  # what is copied need not stay
    ids = [1, 2, 3]
    with load(path) as usual, load(path, low_memory=True) as frugal:
        np.testing.assert_allclose(usual.logits(ids, depth=2), frugal.logits(ids, depth=2), rtol=0, atol=1e-3)
