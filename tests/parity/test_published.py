"""Every engine against numbers made by running the published code."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from localdepth.engine.base import F32, KvType
from localdepth_train.checkpoint import Checkpoint
from localdepth_train.checkpoint.published import published_parts
from localdepth_train.objective import loss
from tests import engines

ATOL = 1e-4  # float32; the fixtures' own noise is 2e-5
MODELS = ("huginn_tiny", "huginn_tiny_242", "retrofit_tinyllama_tiny", "retrofit_llama32_tiny", "retrofit_olmo2_tiny")
# Keys and values rounded to float16. The random retrofits amplify the rounding itself; see CONTRIBUTING.
HALF_CACHE_ATOL = {
    "huginn_tiny": 5e-3,
    "huginn_tiny_242": 5e-3,
    "retrofit_tinyllama_tiny": 6e-2,
    "retrofit_llama32_tiny": 2e-2,
    "retrofit_olmo2_tiny": 1.6e-2,
}
DEPTHS = (1, 2, 4, 8, 16)
RINGS = {"full": None, "latest-m4-compress-s4": 1, "latest-m4-compress-s8": 2, "latest-m4-compress-s16": 4}
MIXED = {"latest-m4": None, "latest-m4-compress-s4": 1, "latest-m4-compress-s16": 4}

Weights = dict[str, F32]


def load(fixtures: Path, name: str) -> tuple[Checkpoint, Weights, dict[str, NDArray[np.float32]]]:
    folder = fixtures / "parity" / name
    checkpoint = Checkpoint(folder)
    weights = {tensor: checkpoint.read(tensor) for tensor in checkpoint.config.tensors()}
    return checkpoint, weights, dict(np.load(folder / "expected.npz"))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", engines.KINDS)
def test_logits_equal_the_published_code(kind: str, name: str, fixtures: Path, tmp_path: Path) -> None:
    checkpoint, weights, expected = load(fixtures, name)
    for n_batch in chunks(kind, 5):
        engine = engines.make(kind, checkpoint.config, weights, tmp_path, n_batch=n_batch)
        for row in (0, 1):
            ids = expected["input_ids"][row]
            given = engines.run(engine, ids, DEPTHS, expected["init_state"][row])
            zero = engines.run(engine, ids, DEPTHS)
            [big] = engines.run(engine, ids, [4], expected["init_state_big"][row])
            for depth, ours, ours_zero in zip(DEPTHS, given, zero, strict=True):
                np.testing.assert_allclose(ours, expected[f"logits_r{depth}"][row], atol=ATOL, rtol=0)
                np.testing.assert_allclose(ours_zero, expected[f"logits_zero_r{depth}"][row], atol=ATOL, rtol=0)
            np.testing.assert_allclose(big, expected["logits_big_r4"][row], atol=ATOL, rtol=0)
        engine.close()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", engines.KINDS)
def test_embeds_and_raw_states_equal_the_published_code(kind: str, name: str, fixtures: Path, tmp_path: Path) -> None:
    checkpoint, weights, expected = load(fixtures, name)
    engine = engines.make(kind, checkpoint.config, weights, tmp_path)
    for row in (0, 1):
        kv = engine.open(8)
        ids = expected["input_ids"][row].astype(np.int32)
        [span] = engine.prelude([(kv, ids)], [expected["init_state"][row]])
        np.testing.assert_allclose(span.embeds(), expected["prelude_out"][row], atol=ATOL, rtol=0)
        for r in range(8):
            engine.core([span])
            np.testing.assert_allclose(span.state(), expected["states_r8"][r, row], atol=ATOL, rtol=0)
        engine.drop([span])
    engine.close()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", engines.KINDS)
def test_cached_greedy_decoding_equals_the_published_code(kind: str, name: str, fixtures: Path, tmp_path: Path) -> None:
    checkpoint, weights, expected = load(fixtures, name)
    engine = engines.make(kind, checkpoint.config, weights, tmp_path)
    prompt = expected["prompt_ids"][0]
    bank = expected["state_bank"][0]
    states = [bank[: len(prompt)], *bank[len(prompt) :, None]][:16]
    for tag, start in (("zero", None), ("bank", states)):
        tokens, logits = engines.greedy(engine, prompt, [4] * 16, start)
        assert tokens == list(expected[f"gen_{tag}_ids"][0, len(prompt) :])
        np.testing.assert_allclose(logits, expected[f"gen_{tag}_logits"], atol=ATOL, rtol=0)
    engine.close()


@pytest.mark.parametrize("strategy", RINGS)
@pytest.mark.parametrize("kind", engines.KINDS)
def test_shared_planes_equal_the_published_strategies(kind: str, strategy: str, fixtures: Path, tmp_path: Path) -> None:
    compare_extra(fixtures, tmp_path, kind, f"share/{strategy}", RINGS[strategy], [12] * 12)


@pytest.mark.parametrize("strategy", MIXED)
@pytest.mark.parametrize("kind", engines.KINDS)
def test_positions_of_different_depth_see_each_other_as_published(
    kind: str, strategy: str, fixtures: Path, tmp_path: Path
) -> None:
    depths = extra_meta(fixtures)[f"mixed/{strategy}"]["depths"]
    compare_extra(fixtures, tmp_path, kind, f"mixed/{strategy}", MIXED[strategy], depths)


def chunks(kind: str, small: int) -> tuple[int, ...]:
    """Prompt sizes to compute at a time: the whole, and for the engine that has chunks, a few tokens."""
    return (256, small) if kind == "ggml" else (256,)


def extra_meta(fixtures: Path) -> dict[str, Any]:
    meta: dict[str, Any] = json.loads((fixtures / "parity" / "huginn_tiny_242" / "extra_meta.json").read_text())
    return meta


def compare_extra(fixtures: Path, folder: Path, kind: str, case: str, ring: int | None, depths: list[int]) -> None:
    checkpoint, weights, _ = load(fixtures, "huginn_tiny_242")
    extra = np.load(fixtures / "parity" / "huginn_tiny_242" / "extra_expected.npz")
    for n_batch in chunks(kind, 2):
        engine = engines.make(kind, checkpoint.config, weights, folder, ring=ring, n_batch=n_batch)
        tokens, logits = engines.greedy(engine, extra_meta(fixtures)["prompt"], depths)
        assert tokens == list(extra[f"{case}/ids"].ravel()[-len(depths) :])
        np.testing.assert_allclose(logits, extra[f"{case}/logits"], atol=ATOL, rtol=0)
        engine.close()


@pytest.mark.parametrize("name", MODELS)
def test_a_half_cache_costs_no_more_than_measured(name: str, fixtures: Path, tmp_path: Path) -> None:
    checkpoint, weights, expected = load(fixtures, name)
    engine = engines.make("ggml", checkpoint.config, weights, tmp_path, kv_type=KvType.F16)
    for row in (0, 1):
        for depth, ours in zip(DEPTHS, engines.run(engine, expected["input_ids"][row], DEPTHS), strict=True):
            np.testing.assert_allclose(ours, expected[f"logits_zero_r{depth}"][row], atol=HALF_CACHE_ATOL[name], rtol=0)
    engine.close()


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_equal_the_published_code(name: str, fixtures: Path) -> None:
    checkpoint, weights, _ = load(fixtures, name)
    expected = np.load(fixtures / "parity" / name / "train_expected.npz")
    ids, labels = (torch.from_numpy(expected[f"train_{key}"]).long() for key in ("input_ids", "labels"))
    state = torch.from_numpy(expected["train_init_state"])
    for n, k in ((0, 1), (0, 3), (3, 2)):
        model = engines.reference_of(checkpoint.config, weights).train()
        value = loss(model, ids, labels, n, k, state)
        value.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        tag = f"n{n}_k{k}"
        assert abs(value.item() - expected[f"loss_{tag}"]) < ATOL
        total = torch.sqrt(sum(g.square().sum() for g in gradients.values() if g is not None))
        assert abs(total.item() / expected[f"gradnorm_{tag}"] - 1) < ATOL
        published = pack(checkpoint, gradients)
        for key in (key for key in expected if key.startswith(f"grad_{tag}/")):
            np.testing.assert_allclose(published[key.split("/", 1)[1]], expected[key], atol=ATOL, rtol=1e-3)


def pack(checkpoint: Checkpoint, gradients: dict[str, torch.Tensor | None]) -> dict[str, NDArray[np.float32]]:
    """Gradients of the published, fused parameters; a published tensor is filled where one of its parts lies."""
    packed: dict[str, NDArray[np.float32]] = {}
    for name, part in published_parts(checkpoint.config).items():
        gradient = gradients[name]
        assert gradient is not None
        packed.setdefault(part.name, np.zeros(checkpoint.shape(part.name), np.float32))
        rows = slice(*part.rows) if part.rows else slice(None)
        if part.index is not None:
            packed[part.name][part.index] = gradient.numpy().reshape(packed[part.name][part.index].shape)
        elif part.cols:
            packed[part.name][:, slice(*part.cols)] = gradient.numpy()
        else:
            packed[part.name][rows] = gradient.numpy()
    return packed
