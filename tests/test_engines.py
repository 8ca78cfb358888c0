"""The seam: every engine gives the same numbers over the whole space of models, and keeps its promises."""

import gc
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from localdepth.config import ModelConfig
from localdepth.engine.base import Engine, KvType, Limits, initial_state
from localdepth.engine.ggml.engine import GgmlEngine
from localdepth.engine.toy import random_weights
from localdepth.errors import ConfigError, ContextOverflow, DepthError, EngineError, PromptError
from localdepth.loop import forward
from localdepth.policy.base import Decision, Seen
from tests import engines
from tests.published import FAMILIES, weights_of
from tests.strategies import configs

ATOL = 1e-4  # float32, relative to logits of size one; sums run in another order
IDS = [3, 1, 4, 1, 5, 9, 2, 6]
ALL = pytest.mark.parametrize("kind", ["toy", "ggml", "onnx"])
NATIVE = pytest.mark.parametrize("kind", ["ggml", "onnx"])


def engine_of(kind: str, folder: Path, family: str = "huginn", **limits: object) -> Engine:
    config, weights = weights_of(family)
    return engines.make(kind, config, weights, folder, **limits)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(configs(), st.integers(0, 99), st.integers(1, 4), st.integers(1, 9), st.sampled_from([None, 1, 2]))
def test_all_engines_agree_on_any_model(config: ModelConfig, seed: int, depth: int, n: int, ring: int | None) -> None:
    config = replace(config, n_ctx=max(config.n_ctx, n))
    weights = random_weights(config, seed)
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, config.n_vocab, n)
    state = rng.standard_normal((n, config.n_embd)).astype(np.float32)
    with TemporaryDirectory() as folder:
        results = {}
        for kind in engines.KINDS:
            engine = engines.make(kind, config, weights, Path(folder), ring=ring, n_batch=3)
            [results[kind]] = engines.run(engine, ids, [depth], state)
            engine.close()
    scale = max(1.0, float(np.abs(results["reference"]).max()))
    for kind in ("toy", "ggml", "onnx"):
        np.testing.assert_allclose(results[kind] / scale, results["reference"] / scale, atol=ATOL, rtol=0)


@ALL
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_equals_uncached_for_a_plane_per_pass(kind: str, family: str, tmp_path: Path) -> None:
    engine = engine_of(kind, tmp_path, family)
    [whole] = engines.run(engine, IDS, [5])
    kv = engine.open(5)
    parts = [
        forward(engine, kv, np.array(ids, np.int32), engines.fixed(5), "all")[0] for ids in (IDS[:3], IDS[3:4], IDS[4:])
    ]
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=ATOL, rtol=0)
    engine.close()


@ALL
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(depths=st.lists(st.integers(1, 7), min_size=2, max_size=6), ring=st.sampled_from([None, 1, 2, 3]))
def test_mixed_depths_equal_the_reference(kind: str, depths: list[int], ring: int | None, tmp_path: Path) -> None:
    expected = engines.greedy(engine_of("reference", tmp_path, ring=ring), IDS, depths)
    engine = engine_of(kind, tmp_path, ring=ring, n_batch=3)
    tokens, logits = engines.greedy(engine, IDS, depths)
    assert tokens == expected[0]
    np.testing.assert_allclose(logits, expected[1], atol=ATOL, rtol=0)
    engine.close()


@ALL
def test_spans_of_several_sequences_do_not_disturb_each_other(kind: str, tmp_path: Path) -> None:
    engine = engine_of(kind, tmp_path)
    prompts = [np.array(ids, np.int32) for ids in ([5], [7, 8, 9], [11])]
    alone = [engines.run(engine, ids, [depth])[0] for ids, depth in zip(prompts, (2, 3, 4), strict=True)]
    kvs = [engine.open(4) for _ in prompts]
    spans = engine.prelude(list(zip(kvs, prompts, strict=True)), [None] * 3)
    logits = {}
    for r in range(4):  # each leaves at its own depth: passes differ inside one call
        engine.core(spans)
        if r >= 1:
            leaving = spans.pop(0)
            [logits[r - 1]] = engine.coda([leaving], "all")
            engine.commit([leaving])
    for i, expected in enumerate(alone):
        np.testing.assert_allclose(logits[i], expected, atol=ATOL, rtol=0)
    assert [kv.depths for kv in kvs] == [[2], [3, 3, 3], [4]]
    engine.close()


@ALL
def test_a_dropped_span_leaves_no_trace(kind: str, tmp_path: Path) -> None:
    engine = engine_of(kind, tmp_path)
    expected = engines.greedy(engine, IDS, [3, 3])
    kv = engine.open(4)
    first, _ = forward(engine, kv, np.array(IDS, np.int32), engines.fixed(3))
    [span] = engine.prelude([(kv, np.array([1, 2], np.int32))], [None])
    engine.core([span])
    engine.drop([span])
    assert kv.n == len(IDS)
    second, _ = forward(engine, kv, np.array([int(first.argmax())], np.int32), engines.fixed(3))
    np.testing.assert_array_equal(np.concatenate([first, second]), expected[1])
    engine.close()


@ALL
def test_truncate_and_fork_continue_as_if_nothing_came_after(kind: str, tmp_path: Path) -> None:
    engine = engine_of(kind, tmp_path)
    kv = engine.open(3)
    forward(engine, kv, np.array(IDS, np.int32), engines.fixed(3))
    fork = kv.fork(4)
    kv.truncate(4)
    rest = np.array([8, 8, 8], np.int32)
    [whole] = engines.run(engine, [*IDS[:4], 8, 8, 8], [3])
    for cache in (kv, fork):
        logits, _ = forward(engine, cache, rest, engines.fixed(3), "all")
        np.testing.assert_allclose(logits, whole[4:], atol=ATOL, rtol=0)
    engine.close()


@ALL
def test_logits_are_memoised_until_the_pass_moves(kind: str, tmp_path: Path) -> None:
    engine = engine_of(kind, tmp_path)
    kv = engine.open(3)
    [span] = engine.prelude([(kv, np.array(IDS, np.int32))], [None])
    rows = []
    for r in range(3):
        engine.core([span])
        [last], [every] = engine.coda([span]), engine.coda([span], "all")
        assert engine.coda([span])[0] is last
        np.testing.assert_allclose(every[-1:], last, atol=1e-6)
        np.testing.assert_allclose(every, engines.run(engine, IDS, [r + 1])[0], atol=ATOL)
        rows.append(last)
    assert not np.allclose(rows[0], rows[1], atol=1e-3)
    engine.close()


@ALL
def test_change_is_the_relative_step_of_the_state(kind: str, tmp_path: Path) -> None:
    engine = engine_of(kind, tmp_path)
    [span] = engine.prelude([(engine.open(4), np.array(IDS, np.int32))], [None])
    assert span.change == float("inf")
    before = span.state()
    for _ in range(3):
        engine.core([span])
        now = span.state()
        expected = np.mean(np.linalg.norm(now - before, axis=1) / np.linalg.norm(now, axis=1))
        assert span.change == pytest.approx(expected, rel=1e-5)
        before = now
    engine.close()


@ALL
def test_an_exit_stops_between_floor_and_ceiling(kind: str, tmp_path: Path) -> None:
    class Settled:
        needs = frozenset({"change", "logits"})

        def stop(self, r: int, seen: Seen) -> bool:
            assert seen.change is not None
            assert seen.logits is not None
            return r == 3

    engine = engine_of(kind, tmp_path)
    for floor, ceiling, expected in ((1, 8, 3), (4, 8, 8), (1, 2, 2)):
        decision = Decision(floor=floor, ceiling=ceiling, chosen_by="test", reason="", exit=Settled())
        logits, depth = forward(engine, engine.open(8), np.array(IDS, np.int32), decision, "all")
        assert depth == expected
        np.testing.assert_allclose(logits, engines.run(engine, IDS, [expected])[0], atol=ATOL)
    engine.close()


@ALL
def test_requests_beyond_the_limits_are_refused(kind: str, tmp_path: Path) -> None:
    engine = engine_of(kind, tmp_path, n_ctx=8, kv_depth=4)
    with pytest.raises(DepthError, match="kv_depth=4"):
        engine.open(5)
    kv = engine.open(2)
    for ids, error, message in (
        (list(range(9)), ContextOverflow, "n_ctx=8"),
        ([], PromptError, "at least one token"),
        ([90], PromptError, r"token id 90 is outside 0\.\.89"),
        ([-1], PromptError, "token id -1"),
    ):
        with pytest.raises(error, match=message):
            engine.prelude([(kv, np.array(ids, np.int32))], [None])
    with pytest.raises(PromptError, match=r"state has shape \[1, 3\]"):
        engine.prelude([(kv, np.array([1], np.int32))], [np.zeros((1, 3), np.float32)])
    [span] = engine.prelude([(kv, np.array(IDS, np.int32))], [None])
    engine.core([span])
    engine.core([span])
    with pytest.raises(DepthError, match="opened for"):
        engine.core([span])
    engine.commit([span])
    with pytest.raises(ContextOverflow, match="8 cached"):
        engine.prelude([(kv, np.array([1], np.int32))], [None])
    engine.close()


@pytest.mark.parametrize(
    "limits", [{"n_ctx": 0}, {"kv_depth": 0}, {"ring": 0}, {"n_threads": 0}, {"n_threads": 513}, {"n_batch": 1.5}]
)
def test_impossible_limits_are_refused(limits: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        Limits(**{"n_ctx": 8, "kv_depth": 4, **limits})  # type: ignore[arg-type]  # wrong on purpose


def test_cache_bytes_are_what_planes_take(tmp_path: Path) -> None:
    own = engine_of("ggml", tmp_path, kv_type=KvType.F16)
    ring = engine_of("ggml", tmp_path, kv_type=KvType.F16, ring=4)
    per_slot = 2 * 48 * 100 * 2  # keys and values of 100 positions, two bytes each
    assert own.kv_bytes(8, 100) == (2 + 1 + 2 * 8) * per_slot
    assert ring.kv_bytes(8, 100) == (2 + 1 + 2 * 4) * per_slot
    own.close()
    ring.close()


@NATIVE
def test_threads_and_chunks_do_not_change_the_tokens(kind: str, tmp_path: Path) -> None:
    prompt = list(np.random.default_rng(0).integers(0, 90, 50))
    results = []
    for n_threads, n_batch in ((1, 256), (2, 256), (1, 7), (2, 16)):
        engine = engine_of(kind, tmp_path, n_threads=n_threads, n_batch=n_batch)
        results.append(engines.greedy(engine, prompt, [4] * 10))
        engine.close()
    for tokens, logits in results[1:]:
        assert tokens == results[0][0]
        np.testing.assert_allclose(logits, results[0][1], atol=ATOL)


@ALL
def test_a_refused_pass_moves_no_span(kind: str, tmp_path: Path) -> None:
    engine = engine_of(kind, tmp_path)
    ids = np.array([1, 2], np.int32)
    deep, shallow = engine.prelude([(engine.open(4), ids), (engine.open(1), ids)], [None, None])
    engine.core([deep, shallow])
    with pytest.raises(DepthError):
        engine.core([deep, shallow])
    assert (deep.r, shallow.r) == (1, 1)
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.open(1)


@NATIVE
def test_a_closed_cache_is_not_reopened(kind: str, tmp_path: Path) -> None:
    engine = engine_of(kind, tmp_path)
    kv = engine.open(2)
    kv.close()
    with pytest.raises(EngineError, match="closed"):
        engine.prelude([(kv, np.array([1], np.int32))], [None])
    engine.close()


def test_an_engine_nobody_closed_frees_its_memory(tmp_path: Path) -> None:
    engine = engine_of("ggml", tmp_path)
    assert isinstance(engine, GgmlEngine)
    finalizer = engine._finalizer
    del engine
    gc.collect()
    assert not finalizer.alive


@NATIVE
def test_a_closed_engine_closes_its_caches_and_may_be_closed_again(kind: str, tmp_path: Path) -> None:
    engine = engine_of(kind, tmp_path)
    kv = engine.open(2)
    forward(engine, kv, np.array(IDS, np.int32), engines.fixed(2))
    engine.close()
    engine.close()
    kv.close()


def test_a_damaged_library_is_an_engine_error(tmp_path: Path) -> None:
    from localdepth.engine.ggml.lib import Ggml, find_libraries

    folder = find_libraries()
    assert folder is not None
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(b"not a library")
    with pytest.raises(EngineError, match="cannot open"):
        Ggml(tmp_path)


def test_initial_states_depend_on_seed_and_position_alone() -> None:
    config, _ = weights_of("huginn")
    whole, part = initial_state(config, 0, 6, 7), initial_state(config, 4, 2, 7)
    assert whole is not None
    np.testing.assert_array_equal(whole[4:], part)
    assert initial_state(config, 0, 6, None) is None
    draws = initial_state(config, 0, 400, 1)
    assert draws is not None
    assert draws.std() == pytest.approx(config.state_std, rel=0.02)


@ALL
@pytest.mark.parametrize("n", [1, 7])
@pytest.mark.parametrize("ring", [None, 2])
@pytest.mark.parametrize("family", ["huginn", "retrofit_llama", "retrofit_qwen2", "retrofit_qwen3"])
def test_passes_at_once_equal_passes_one_by_one(
    kind: str, n: int, ring: int | None, family: str, tmp_path: Path
) -> None:
    engine = engine_of(kind, tmp_path, family, ring=ring)
    ids = np.array(IDS[:n], np.int32)
    kvs = [engine.open(6) for _ in range(2)]
    [at_once], [one_by_one] = (engine.prelude([(kv, ids)], [None]) for kv in kvs)
    engine.core([at_once], 5)
    for _ in range(5):
        engine.core([one_by_one])
    assert at_once.r == one_by_one.r == 5
    np.testing.assert_allclose(at_once.state(), one_by_one.state(), atol=ATOL, rtol=0)
    assert at_once.change == pytest.approx(one_by_one.change, rel=1e-3)
    np.testing.assert_allclose(engine.coda([at_once])[0], engine.coda([one_by_one])[0], atol=ATOL, rtol=0)
    with pytest.raises(DepthError, match="pass 7 is beyond depth 6"):
        engine.core([at_once], 2)
    engine.drop([at_once, one_by_one])
    engine.close()
