"""What a machine without an optional package is told."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from localdepth.engine.toy import random_weights
from localdepth_train.checkpoint import save
from tests.conftest import ROOT, tokenizer_json
from tests.published import EXPECTED, make_checkpoint

WITHOUT = "import sys; sys.modules[sys.argv.pop(1)] = None; from localdepth.cli import main; main()"
RECIPE = ROOT / "export" / "localdepth_train" / "recipes" / "default.toml"


def without(package: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """Run the command line as if ``package`` were not installed."""
    return subprocess.run(
        [sys.executable, "-c", WITHOUT, package, *map(str, arguments)], capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("package", "extra", "arguments"),
    [
        ("llama_cpp", "gguf", ("ask", "hi", "--model", "FILE")),
        ("llama_cpp", "gguf", ("export", "gguf", "CHECKPOINT", "-o", "OUT")),
        ("safetensors", "export", ("export", "gguf", "CHECKPOINT", "-o", "OUT")),
        ("onnx", "onnx", ("export", "onnx", "CHECKPOINT", "-o", "OUT")),
        ("torch", "train", ("verify", "FILE", "CHECKPOINT")),
        ("torch", "train", ("train", "run", RECIPE, "-o", "OUT")),
    ],
)
def test_a_missing_package_is_named_with_the_line_that_installs_it(
    package: str, extra: str, arguments: tuple[object, ...], model_file: Path, tmp_path: Path
) -> None:
    places = {"FILE": model_file, "CHECKPOINT": make_checkpoint(tmp_path / "c", "huginn"), "OUT": tmp_path / "out"}
    done = without(package, *(places.get(str(word), word) for word in arguments))
    assert done.returncode == 2, done.stderr
    assert f'pip install "localdepth[{extra}]"' in done.stderr
    assert "Traceback" not in done.stderr


def test_the_toy_engine_runs_without_any_extra(model_file: Path) -> None:
    done = without("llama_cpp", "ask", "the cat", "--model", model_file, "--engine", "toy", "--max-tokens", 3)
    assert done.returncode == 0, done.stderr


def test_a_checkpoint_becomes_an_onnx_folder_and_answers_without_ggml(tmp_path: Path) -> None:
    config = replace(EXPECTED["huginn"], n_vocab=300, n_ctx=64)
    checkpoint = save(tmp_path / "c", config, random_weights(config, 3), {"tokenizer.json": tokenizer_json()})
    done = without("llama_cpp", "export", "onnx", checkpoint, "-o", tmp_path / "m", "--bits", 8)
    assert done.returncode == 0, done.stderr
    done = without("llama_cpp", "ask", "the cat", "--model", tmp_path / "m", "--max-tokens", 3)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("models", "list", "--json"),
        ("models", "show", "default", "--json"),
        ("inspect", "default", "--json"),
        ("ask", "It is May. Go 1 month forward. Which month is it?", "--json"),
        ("curve", "--depths", "4", "--per-cell", "1", "--steps", "1", "--json"),
    ],
)
def test_commands_take_the_default_model_as_onnx_without_ggml(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCALDEPTH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    done = without("llama_cpp", *arguments)
    assert done.returncode == 0, done.stderr
    assert "gguf" not in done.stdout
    json.loads(done.stdout)


def test_doctor_says_what_to_type(model_file: Path) -> None:
    done = without("llama_cpp", "doctor")
    assert done.returncode == 0, done.stderr
    assert 'pip install "localdepth[gguf]"' in done.stdout
    assert "with onnx" in done.stdout
    done = without("onnxruntime", "doctor")
    assert "pip install onnxruntime" in done.stdout
    assert "with ggml" in done.stdout
