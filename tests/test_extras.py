"""What a machine without an optional package is told."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.published import make_checkpoint

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
        ("safetensors", "export", ("export", "gguf", "CHECKPOINT", "-o", "OUT")),
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


def test_doctor_says_what_to_type(model_file: Path) -> None:
    done = without("llama_cpp", "doctor")
    assert done.returncode == 0, done.stderr
    assert 'pip install "localdepth[gguf]"' in done.stdout
    assert "with onnx" in done.stdout
    done = without("onnxruntime", "doctor")
    assert "pip install onnxruntime" in done.stdout
    assert "with ggml" in done.stdout
