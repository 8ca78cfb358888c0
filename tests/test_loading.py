"""Which file, which engine: a GGUF file and a folder of ONNX graphs are the same model to every command."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from localdepth.engine.base import KvType
from localdepth.engine.ggml.engine import GgmlEngine
from localdepth.engine.onnx.engine import OnnxEngine
from localdepth.engine.toy import ToyEngine, random_weights
from localdepth.errors import ConfigError, ModelFileError
from localdepth.gguf import read as read_gguf
from localdepth.loading import DEFAULT_FOLDER, DEFAULT_MODEL, inspect, load, locate, plan
from localdepth.onnx_folder.folder import read as read_folder
from tests import engines
from tests.conftest import ROOT
from tests.published import FAMILIES, weights_of

MODELS = ROOT / "localdepth" / "models"
QUESTION = "The lift is on floor 4. Go up 3. Go down 1. Which floor is the lift on?"
WITHOUT = "import sys; sys.modules[sys.argv.pop(1)] = None; from localdepth.cli import main; main()"
INT8_STEP = 1 / 127  # of the largest number of a block, which is what either kind of rounding moves a number by


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One model as a file and as a folder."""
    folder = tmp_path_factory.mktemp("pair")
    config, weights = weights_of("huginn")
    file = engines.write_model(folder / "model.gguf", config, weights)
    return file, engines.write_folder(folder / "model", config, weights)


def without(package: str, *arguments: object, text: str = "") -> "subprocess.CompletedProcess[str]":
    """Run the command line as if ``package`` were not installed."""
    command = [sys.executable, "-c", WITHOUT, package, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, input=text)


def test_the_kind_of_file_chooses_the_engine_and_all_say_the_same(pair: tuple[Path, Path]) -> None:
    file, folder = pair
    assert inspect(file) == inspect(folder)
    kinds = {(file, "auto"): GgmlEngine, (folder, "auto"): OnnxEngine, (folder, "onnx"): OnnxEngine}
    kinds |= {(file, "toy"): ToyEngine, (folder, "toy"): ToyEngine}
    logits = []
    for (path, engine), kind in kinds.items():
        with load(path, engine=engine, kv_type="f32") as model:
            assert type(model._engine) is kind
            logits.append(model.logits([1, 2, 3], depth=3))
    for other in logits[1:]:
        np.testing.assert_allclose(other, logits[0], rtol=0, atol=1e-4)


def test_each_engine_keeps_the_smallest_cache_it_can(pair: tuple[Path, Path]) -> None:
    assert [plan(path).kv_type for path in pair] == [KvType.F16, KvType.F32]


def test_an_engine_for_the_other_kind_is_refused_with_what_to_do(pair: tuple[Path, Path]) -> None:
    file, folder = pair
    for path, engine, remedy in (
        (file, "onnx", f"localdepth export onnx {file} -o FOLDER"),
        (folder, "ggml", f"localdepth export gguf {folder} -o model.gguf"),
        (folder, "torch", "not one of auto, ggml, onnx, toy"),
    ):
        with pytest.raises(ConfigError) as refused:
            load(path, engine=engine)
        assert remedy in str(refused.value)
    with pytest.raises(ConfigError, match="the ONNX engine runs on the CPU alone"):
        load(folder, device="gpu")


def test_a_spoiled_folder_is_called_so_and_not_a_checkpoint(pair: tuple[Path, Path], tmp_path: Path) -> None:
    spoiled = Path(shutil.copytree(pair[1], tmp_path / "model"))
    (spoiled / "config.json").write_text("{")
    with pytest.raises(ModelFileError, match=r"config.json is not JSON, it is damaged"):
        load(spoiled)


def test_the_default_model_is_the_same_in_both_kinds() -> None:
    with read_gguf(MODELS / DEFAULT_MODEL) as file, read_folder(MODELS / DEFAULT_FOLDER) as folder:
        assert folder.config == file.config
        assert folder.tokenizer == file.tokenizer
        assert folder.is_intact()
        for name in file.tensors:
            ours, theirs = file.array(name), folder.array(name)
            assert np.abs(ours - theirs).max() <= 2 * INT8_STEP * np.abs(ours).max()


def test_the_default_model_answers_the_same_in_both_kinds() -> None:
    assert locate(None).name == DEFAULT_MODEL
    answers = []
    for engine in ("ggml", "onnx"):
        with load(engine=engine) as model:
            answers.append([model.generate(QUESTION, depth=depth).text for depth in (4, 16)])
    assert answers == [["It is floor 6."] * 2] * 2


@pytest.mark.parametrize(
    "arguments",
    [
        ("ask", QUESTION, "--json"),
        ("ask", QUESTION, "--engine", "onnx", "--json"),
        ("ask", QUESTION, "-m", MODELS / DEFAULT_FOLDER, "--ring", 4, "--json"),
        ("inspect", "default", "--check", "--json"),
        ("inspect", MODELS / DEFAULT_FOLDER, "--check", "--json"),
        pytest.param(("curve", "--seed", 1, "--depths", "1", "--json"), marks=pytest.mark.slow),
        ("bench", "--depths", "1", "--json"),
        ("models", "list", "--json"),
        ("models", "show", "default", "--json"),
        ("doctor", "--json"),
    ],
)
def test_commands_need_no_ggml(arguments: tuple[object, ...]) -> None:
    done = without("llama_cpp", *arguments)
    assert done.returncode == 0, done.stderr
    [line] = done.stdout.splitlines()
    record = json.loads(line)
    if arguments[0] == "ask":
        assert record["text"] == "It is floor 6."
    if arguments[0] == "inspect":
        assert record["intact"]
        assert record["memory"]


def test_a_chat_needs_no_ggml() -> None:
    done = without("llama_cpp", "chat", text=f"{QUESTION}\n")
    assert done.returncode == 0, done.stderr
    assert "It is floor 6." in done.stdout


def test_without_any_engine_the_line_to_type_is_said() -> None:
    program = "import sys; sys.modules['onnxruntime'] = None; " + WITHOUT
    command = [sys.executable, "-c", program, "llama_cpp", "ask", QUESTION]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "pip install onnxruntime" in done.stderr


def test_neither_ggml_nor_onnxruntime_is_imported_before_it_is_needed() -> None:
    program = "import sys, localdepth.loading; print(*(m for m in ('onnxruntime', 'llama_cpp') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_rounded_weights_compute_as_what_they_stand_for(tmp_path: Path) -> None:
    config = replace(FAMILIES["huginn"], n_embd=64, n_ff=96)
    weights = random_weights(config, 2)
    for bits in (16, 8, 4):
        path = engines.write_folder(tmp_path / str(bits), config, weights, bits)
        with load(path) as fast, load(path, engine="toy") as exact:
            ids, share = [1, 2, 3], {16: 1e-3, 8: 0.1, 4: 0.1}[bits]
            gap = np.abs(fast.logits(ids, depth=2) - exact.logits(ids, depth=2)).max()
            assert gap <= share * np.abs(exact.logits(ids, depth=2)).max()
