"""Importance says which columns text excites, over all passes, and makes quantising spend its accuracy there."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from localdepth.engine.base import F32, KvType, Limits
from localdepth.engine.ggml.engine import GgmlEngine
from localdepth.engine.toy import random_weights
from localdepth.errors import ConfigError, DepthError, ModelFileError, StorageError
from localdepth.gguf import read
from localdepth.quant import Quant
from localdepth_export.convert import to_gguf
from localdepth_export.importance import Importance, collect
from localdepth_export.verification import verify
from localdepth_train.checkpoint import save
from tests import engines
from tests.conftest import tokenizer_json
from tests.published import EXPECTED

CONFIG = replace(
    EXPECTED["retrofit_llama"], n_prelude=1, n_core=1, n_embd=256, head_dim=64, n_ff=512, n_vocab=300, default_depth=4
)
TEXT = "the cat sat on the mat and the rat ate the oats " * 8


def lively_weights() -> dict[str, F32]:
    """Random weights whose norms pass some columns much louder than others, as trained ones do."""
    weights = random_weights(CONFIG, 0)
    loud = np.exp(np.random.default_rng(1).standard_normal(CONFIG.n_embd)).astype(np.float32)
    return {name: w * loud if name.endswith("_norm.weight") else w for name, w in weights.items()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = {
        "tokenizer.json": tokenizer_json(),
        "tokenizer_config.json": '{"bos_token": "<bos>", "add_bos_token": true}',
    }
    return save(tmp_path_factory.mktemp("importance") / "c", CONFIG, lively_weights(), files)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Path:
    to_gguf(checkpoint, checkpoint.parent / "m.gguf", quant="F32")
    return checkpoint.parent / "m.gguf"


@pytest.fixture(scope="module")
def importance(model: Path) -> Importance:
    return collect(model, TEXT, depths=(1, 4))


def test_every_matrix_that_multiplies_has_a_finite_positive_list(importance: Importance) -> None:
    matrices = {name: shape[1] for name, shape in CONFIG.tensors().items() if len(shape) == 2}
    del matrices["token_embd.weight"]  # it is only looked up
    assert {name: len(values) for name, values in importance.columns.items()} == matrices
    assert all(np.isfinite(values).all() and (values > 0).all() for values in importance.columns.values())


def test_the_core_is_measured_over_all_passes(model: Path) -> None:
    window = [list(range(1, 20))]
    rows = {}
    for depth in (1, 2):
        rows[depth] = collect(model, window, depths=(depth,)).columns["core.0.attn_q.weight"]
    both = collect(model, window, depths=(1, 2)).columns["core.0.attn_q.weight"]
    np.testing.assert_allclose(3 * both, rows[1] + 2 * rows[2], rtol=1e-5)  # one pass and two
    assert not np.allclose(rows[1], rows[2], rtol=0.01)


def test_the_injection_sees_states_and_embeds(model: Path) -> None:
    window = [list(range(1, 20))]
    columns = collect(model, window, depths=(2,)).columns
    with read(model) as file:
        engine = GgmlEngine(file, Limits(n_ctx=32, kv_depth=2, kv_type=KvType.F32))
    kv = engine.open(2)
    [span] = engine.prelude([(kv, np.array(window[0], np.int32))], [None])
    np.testing.assert_allclose(columns["injection.embeds.weight"], np.square(span.embeds()).mean(0), rtol=1e-5)
    engine.core([span])  # the state of the first pass was zeros, that of the second is this one
    np.testing.assert_allclose(columns["injection.state.weight"], np.square(span.state()).mean(0) / 2, rtol=1e-5)
    engine.close()


def test_a_file_gives_back_what_was_saved(importance: Importance, tmp_path: Path) -> None:
    importance.save(tmp_path / "i")
    loaded = Importance.load(tmp_path / "i")
    assert loaded.origin == importance.origin
    for name, values in importance.columns.items():
        np.testing.assert_array_equal(loaded.columns[name], values)
    with pytest.raises(StorageError):
        importance.save(tmp_path / "nowhere" / "i")


def test_files_that_cannot_be_trusted_are_refused(importance: Importance, tmp_path: Path) -> None:
    importance.save(tmp_path / "i")
    whole = (tmp_path / "i").read_bytes()
    for broken in (b"", whole[:7], whole[: len(whole) // 2], whole[:-1]):
        (tmp_path / "broken").write_bytes(broken)
        with pytest.raises(ModelFileError, match="cannot read"):
            Importance.load(tmp_path / "broken")
    with pytest.raises(ModelFileError, match="cannot read"):
        Importance.load(tmp_path / "missing")
    save_file({"a": np.ones(3, np.float32)}, tmp_path / "other")
    with pytest.raises(ModelFileError, match="holds no importance"):
        Importance.load(tmp_path / "other")


@pytest.mark.parametrize(
    "values",
    [
        np.array([1, -1], np.float32),
        np.array([1, np.nan], np.float32),
        np.array([1, np.inf], np.float32),
        np.ones((2, 2), np.float32),
        np.ones(2, np.float64),
    ],
)
def test_numbers_no_mean_square_can_be_are_refused(values: F32, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="finite mean squares"):
        Importance({"a": values}, "somewhere")
    save_file({"a": values}, tmp_path / "i", {"format": "localdepth importance 1", "origin": "somewhere"})
    with pytest.raises(ModelFileError, match="finite mean squares"):
        Importance.load(tmp_path / "i")


def test_the_importance_of_another_model_is_refused(checkpoint: Path, importance: Importance, tmp_path: Path) -> None:
    for columns in (
        {"core.0.attn_q.weight": np.ones(3, np.float32)},
        {"core.9.attn_q.weight": np.ones(256, np.float32)},
    ):
        with pytest.raises(ConfigError, match="another model's"):
            to_gguf(checkpoint, tmp_path / "m.gguf", quant="Q4_K", importance=replace(importance, columns=columns))
    assert not (tmp_path / "m.gguf").exists()


def test_samples_and_depths_that_cannot_run_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to run"):
        collect(model, "")
    with pytest.raises(ConfigError, match="nothing to run"):
        collect(model, TEXT, max_tokens=0)
    with pytest.raises(DepthError):
        collect(model, TEXT, depths=(0,))
    mute = engines.write_model(tmp_path / "m.gguf", CONFIG, lively_weights())
    with pytest.raises(ConfigError, match="no tokenizer"):
        collect(mute, TEXT)


def test_windows_begin_with_the_start_token_and_progress_is_told(model: Path) -> None:
    seen: list[tuple[int, int]] = []
    found = collect(model, TEXT * 20, depths=(1, 2), max_tokens=200, on_progress=lambda *at: seen.append(at))
    n_runs = 2 * math.ceil(200 / CONFIG.n_ctx)
    assert seen == [(i + 1, n_runs) for i in range(n_runs)]
    assert found.origin.startswith("200 positions of m.gguf at depths 1, 2, sha256 ")


@pytest.mark.parametrize("recipe", ["Q4_0", "Q4_K", "Q5_K", "Q6_K"])
def test_importance_lowers_the_error_of_what_a_matrix_puts_out(
    recipe: str, checkpoint: Path, importance: Importance, tmp_path: Path
) -> None:
    """The expected squared error on inputs like the text's: each column's importance times its squared error."""
    weights = lively_weights()
    errors = {}
    for name, given in (("plain", None), ("weighted", importance)):
        to_gguf(checkpoint, tmp_path / "m.gguf", quant=recipe, importance=given)
        with read(tmp_path / "m.gguf") as file:
            assert ("importance" in file.provenance) == (given is not None)
            errors[name] = {
                matrix: float((np.square(file.array(matrix) - weights[matrix]) * columns).sum())
                for matrix, columns in importance.columns.items()
            }
    assert all(errors["weighted"][matrix] < errors["plain"][matrix] for matrix in importance.columns)


def test_a_file_with_importance_verifies_with_it_strictly_and_without_it_loosely(
    checkpoint: Path, importance: Importance, tmp_path: Path
) -> None:
    file = tmp_path / "m.gguf"
    to_gguf(checkpoint, file, quant="Q4_K,head=Q4_0", importance=importance)
    strict = verify(file, checkpoint, depths=(1,), importance=importance)
    assert (strict.exact, strict.wrong_tensors) == (True, ())
    loose = verify(file, checkpoint, depths=(1,))
    assert (loose.exact, loose.wrong_tensors) == (False, ())
    assert "pass --importance to be sure" in loose.verdict
    with pytest.raises(ConfigError, match="pass the one it was exported with"):
        verify(file, checkpoint, importance=replace(importance, origin="elsewhere"))
    to_gguf(checkpoint, file, quant="Q4_K")
    with pytest.raises(ConfigError, match="no importance"):
        verify(file, checkpoint, importance=importance)


def test_a_wrong_tensor_is_found_without_the_importance(
    checkpoint: Path, importance: Importance, tmp_path: Path
) -> None:
    weights = lively_weights()
    weights["core.0.attn_q.weight"] = weights["core.0.attn_q.weight"][::-1].copy()
    for quant in (Quant.Q4_0, Quant.Q4_K):
        to_gguf(save(tmp_path / "wrong", CONFIG, weights), tmp_path / "m.gguf", quant=quant, importance=importance)
        report = verify(tmp_path / "m.gguf", checkpoint, depths=(1,))
        assert report.wrong_tensors == ("core.0.attn_q.weight",)
