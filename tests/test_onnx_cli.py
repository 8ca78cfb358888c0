"""``export onnx``, ``export gguf`` of a folder, and ``verify``, as a user runs them."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from localdepth.engine.toy import random_weights
from localdepth.gguf import read
from localdepth.onnx_folder import folder as onnx_folder
from localdepth.quant import Quant
from localdepth_export.onnx_graphs.convert import to_onnx
from localdepth_train.checkpoint import save
from tests.engines import write_model
from tests.published import EXPECTED, make_checkpoint


def localdepth(*arguments: object) -> Any:
    """Run the command; its result with text output."""
    command = [sys.executable, "-m", "localdepth", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "100"})


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "c", "retrofit_llama")


def test_a_checkpoint_is_exported_and_verified(checkpoint: Path, tmp_path: Path) -> None:
    shared = ("export", "onnx", checkpoint, "-o", tmp_path / "m", "--bits", 4, "--core-bits", 8, "--license", "MIT")
    done = localdepth(*shared, "--json")
    assert (done.returncode, done.stdout.count("\n")) == (0, 1)
    record = json.loads(done.stdout)
    assert (record["quant"], record["path"]) == ("INT4,injection=INT8,core=INT8", str(tmp_path / "m"))
    assert record["n_bytes"] == sum(path.stat().st_size for path in (tmp_path / "m").iterdir())
    n_params = EXPECTED["retrofit_llama"].n_params
    said = localdepth(*shared).stdout
    assert f"retrofit Llama, {n_params:,} parameters as INT4,injection=INT8,core=INT8" in said
    assert "no tokenizer" in said
    checked = localdepth("verify", tmp_path / "m", checkpoint, "--depths", "1,4", "--json")
    assert checked.returncode == 0, checked.stderr
    assert json.loads(checked.stdout)["depths"] == [1, 4]
    with onnx_folder.read(tmp_path / "m") as folder:
        assert folder.check is not None
        assert list(folder.check.kl) == json.loads(checked.stdout)["kl"]
        assert folder.provenance["license"] == "MIT"


def test_one_file_is_written_where_one_is_wanted(checkpoint: Path, tmp_path: Path) -> None:
    done = localdepth("export", "onnx", checkpoint, "-o", tmp_path / "m.onnx", "--single-file", "--bits", 8)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"c", "m.onnx"}
    assert f"{(tmp_path / 'm.onnx').stat().st_size:,} bytes" in done.stdout
    for command in (("ask", "hi", "--model"), ("inspect",), ("export", "gguf", "-o", tmp_path / "m.gguf")):
        done = localdepth(*command, tmp_path / "m.onnx")
        assert done.returncode == 2
        assert "a single file is for other programs" in done.stderr.replace("\n", " ")


@pytest.mark.parametrize(("kind", "extras"), [("onnx", "onnx,train"), ("gguf", "export,train")])
def test_one_line_brings_all_that_verifying_takes(kind: str, extras: str, checkpoint: Path, tmp_path: Path) -> None:
    assert localdepth("export", kind, checkpoint, "-o", tmp_path / "m").returncode == 0
    program = "import sys; sys.modules['safetensors'] = None; from localdepth.cli import main; main()"
    command = [sys.executable, "-c", program, "verify", str(tmp_path / "m"), str(checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert f'pip install "localdepth[{extras}]"' in done.stderr.replace("\n", " ")


def test_model_files_are_carried_over_both_ways(checkpoint: Path, tmp_path: Path) -> None:
    gguf, folder = tmp_path / "m.gguf", tmp_path / "m"
    assert localdepth("export", "gguf", checkpoint, "-o", gguf, "-q", "F16").returncode == 0
    assert localdepth("export", "onnx", gguf, "-o", folder).returncode == 0
    done = localdepth("export", "gguf", folder, "-o", tmp_path / "back.gguf", "--json")
    assert json.loads(done.stdout)["quant"] == "F16"
    with read(gguf) as first, read(tmp_path / "back.gguf") as second:
        assert first.checksum == second.checksum


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("onnx", "c", "-o", "out", "--bits", "3"), "bits=3 is not one of 32, 16, 8, 4"),
        (("onnx", "c", "-o", "out", "--depth", "999"), "depth=999"),
        (("onnx", "m.gguf", "-o", "out", "--bits", "8"), "--bits=8 with the model file"),
        (("onnx", "m.gguf", "-o", "out", "--core-bits", "8"), "--core-bits=8 with the model file"),
        (("onnx", "m.gguf", "-o", "out"), "is stored as Q5_0"),
        (("onnx", "nothing", "-o", "out"), "does not exist"),
        (("onnx", "c", "-o", "m.gguf", "--single-file"), "m.gguf is a file, not a folder for looped.onnx"),
        (("onnx", "c", "-o", "m", "--single-file"), "m holds a model folder"),
        (("onnx", "m", "-o", "out"), "m is an ONNX folder already; for other bits export its checkpoint"),
        (("gguf", "m.gguf", "-o", "out"), "m.gguf is a GGUF file already"),
        (("gguf", "m/looped.onnx", "-o", "out"), "a single file is for other programs, here pass a folder"),
        (("onnx", "c", "-o", "one.onnx", "--single-file", "--depth", "3"), "depth=3 with a single file"),
        (("onnx", "c", "-o", "c"), "holds something else"),
        (("gguf", "m", "-o", "out", "-q", "Q4_0"), "--quant=Q4_0 with the model file"),
        (("gguf", "m", "-o", "out"), "no whole number of its blocks"),
    ],
)
def test_what_cannot_be_exported_is_refused_and_nothing_is_left(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    to_onnx(make_checkpoint(Path("c"), "retrofit_llama"), "m", bits=4)
    config = replace(EXPECTED["retrofit_llama"], n_embd=64, head_dim=16)
    write_model(Path("m.gguf"), config, random_weights(config, 0), Quant.Q5_0)
    done = localdepth("export", *arguments)
    assert (done.returncode in (2, 3), done.stdout) == (True, "")
    assert message in done.stderr.replace("\n", " ")
    assert {path.name for path in tmp_path.iterdir()} == {"c", "m", "m.gguf"}


@pytest.mark.parametrize("single", [(), ("--single-file",)])
def test_ctrl_c_leaves_nothing_half_written(single: tuple[str, ...], tmp_path: Path) -> None:
    config = replace(EXPECTED["retrofit_llama"], n_vocab=20_000, n_embd=1024, head_dim=16, n_ff=4096)
    zeros = {name: np.zeros(shape, np.float16) for name, shape in config.tensors().items()}
    save(tmp_path / "c", config, zeros)
    process = subprocess.Popen(
        [sys.executable, "-m", "localdepth", "export", "onnx", tmp_path / "c", "-o", tmp_path / "m.onnx", *single],
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it
    )
    while process.poll() is None and not list(tmp_path.glob(".localdepth-*")):  # it has begun
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert (process.returncode, b"Traceback" in errors) == (130, False)
    assert {path.name for path in tmp_path.iterdir()} == {"c"}
