"""Weights in packed layouts, mapped files and cut rows compute what plain ones do."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from localdepth.config import ModelConfig
from localdepth.engine.base import F32, Engine, KvType, Limits
from localdepth.engine.ggml.engine import GgmlEngine
from localdepth.engine.ggml.lib import library
from localdepth.engine.ggml.weights import matrices, plan_packs
from localdepth.engine.toy import random_weights
from localdepth.gguf import read
from localdepth.loop import forward
from localdepth.quant import Quant
from tests import engines
from tests.published import FAMILIES

ROUNDING = 2e-5  # float32, another order of additions
QUANTISED = 2e-2  # the mean, with rounded activations: random weights amplify each rounding over four passes
SIZES = {"n_embd": 256, "n_head": 4, "n_head_kv": 2, "head_dim": 64, "n_ff": 512, "n_vocab": 512, "n_ctx": 128}
MANY = [Quant.Q4_0, Quant.Q4_K, Quant.Q5_K, Quant.Q6_K, Quant.Q5_0, Quant.Q8_0, Quant.F16, Quant.BF16]


def config(family: str = "retrofit_llama", **changes: object) -> ModelConfig:
    return replace(FAMILIES[family], **{**SIZES, **changes})  # type: ignore[arg-type]  # sizes are ints


def engine(path: Path, *, low_memory: bool = False) -> GgmlEngine:
    limits = Limits(n_ctx=128, kv_depth=8, kv_type=KvType.F32, low_memory=low_memory)
    with read(path) as file:
        return GgmlEngine(file, limits)


def logits(engine: Engine, steps: list[int]) -> F32:
    """Of all positions, read in spans of these lengths."""
    kv = engine.open(4)
    ids = np.random.default_rng(1).integers(0, engine.config.n_vocab, sum(steps)).astype(np.int32)
    rows = [forward(engine, kv, ids[kv.n : kv.n + n], engines.fixed(4), "all")[0] for n in steps]
    kv.close()
    return np.concatenate(rows)


@pytest.mark.parametrize("family", ["retrofit_llama", "retrofit_qwen2", "retrofit_qwen3"])
@pytest.mark.parametrize("quant", MANY)
def test_packed_and_plain_layouts_agree_for_any_number_of_rows(tmp_path: Path, quant: Quant, family: str) -> None:
    made = config(family)
    path = engines.write_model(tmp_path / "m.gguf", made, random_weights(made, 2), quant)
    packed, plain = engine(path), engine(path, low_memory=True)
    for steps in ([1] * 6, [2, 3, 4, 7, 8], [40, 1, 1], [5, 64, 1]):
        assert np.abs(logits(packed, steps) - logits(plain, steps)).mean() < QUANTISED


def test_layouts_that_crash_with_several_rows_never_get_them(tmp_path: Path) -> None:
    for quant in MANY:
        path = engines.write_model(tmp_path / "m.gguf", config(), random_weights(config(), 2), quant)
        with read(path) as file:
            assert all(plan.max_rows == 1 for plan in plan_packs(library(), file) if plan.layout == "AMX")


def test_q4_0_is_repacked_for_all_rows_and_q4_k_for_few(tmp_path: Path) -> None:
    if "CPU_REPACK" not in library().extra_buffer_types():
        pytest.skip("this CPU has no repacked layout")
    for quant, serves_all in ((Quant.Q4_0, True), (Quant.Q4_K, False)):
        path = engines.write_model(tmp_path / "m.gguf", config(), random_weights(config(), 2), quant)
        with read(path) as file:
            plans = plan_packs(library(), file)
        assert any(plan.serves_all for plan in plans) == serves_all
        assert set().union(*(plan.names for plan in plans)) == set(matrices(config()))


def test_a_matrix_whose_shape_a_layout_refuses_stays_plain(tmp_path: Path) -> None:
    odd = config(n_vocab=509)  # rows that no interleaved layout divides
    path = engines.write_model(tmp_path / "m.gguf", odd, random_weights(odd, 2), Quant.Q4_0)
    with read(path) as file:
        packed = {name for plan in plan_packs(library(), file) for name in plan.names}
    assert "output.weight" not in packed
    packed, plain = (logits(engine(path, low_memory=low), [9, 1, 1]) for low in (False, True))
    assert np.abs(packed - plain).mean() < QUANTISED


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("n_coda", [0, 1, 2])
def test_rows_cut_before_the_last_layer_leave_the_last_logits(tmp_path: Path, family: str, n_coda: int) -> None:
    shape = replace(FAMILIES[family], n_coda=n_coda, n_ctx=64)
    made = engines.make("ggml", shape, random_weights(shape, 3), tmp_path, n_batch=8)
    ids = np.arange(21, dtype=np.int32)
    kvs = [made.open(3) for _ in range(2)]
    last, whole = (
        forward(made, kv, ids, engines.fixed(3), rows)[0] for kv, rows in zip(kvs, ("last", "all"), strict=True)
    )
    np.testing.assert_allclose(last[0], whole[-1], atol=ROUNDING)
    following = [forward(made, kv, ids[:1], engines.fixed(3))[0] for kv in kvs]  # reads every key that was left
    np.testing.assert_allclose(*following, atol=ROUNDING)


def test_all_rows_can_be_asked_for_after_the_last(tmp_path: Path) -> None:
    shape = replace(FAMILIES["huginn"], n_ctx=64)
    made = engines.make("ggml", shape, random_weights(shape, 3), tmp_path)
    kv = made.open(2)
    [span] = made.prelude([(kv, np.arange(9, dtype=np.int32))], [None])
    made.core([span])
    [last] = made.coda([span])
    [whole] = made.coda([span], "all")
    [again] = made.coda([span])
    np.testing.assert_array_equal(last, again)
    np.testing.assert_allclose(last[0], whole[-1], atol=ROUNDING)
