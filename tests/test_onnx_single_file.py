"""One file with its weights inside is the looped graph of a folder, and says what it is."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxruntime import InferenceSession

from localdepth.config import ModelConfig
from localdepth.engine.base import F32
from localdepth.engine.toy import random_weights
from localdepth.errors import ConfigError, StorageError
from localdepth.onnx_folder.folder import read
from localdepth.onnx_folder.layout import BITS, Layout
from localdepth_export.onnx_graphs.convert import to_onnx
from localdepth_export.onnx_graphs.single_file import write_single
from localdepth_export.onnx_graphs.source import Source
from localdepth_export.onnx_graphs.weights import as_pieces
from localdepth_train.checkpoint import save
from tests.conftest import TEMPLATE, tokenizer_json
from tests.published import FAMILIES, make_checkpoint
from tests.strategies import configs


def logits(file: Path, depth: int = 3) -> F32:
    """Of three tokens, from no cache."""
    session = InferenceSession(file, providers=["CPUExecutionProvider"])
    inputs: dict[str, Any] = {"ids": np.array([[5, 7, 11]]), "n_total": np.array([3], np.int32), "rows": np.arange(3)}
    for port in session.get_inputs():
        if port.name.startswith("past"):
            sizes = {"n_passes": depth, "n_past": 0}
            inputs[port.name] = np.zeros([sizes.get(n, n) for n in port.shape], np.float32)
        elif port.name == "state":
            inputs["state"] = np.zeros((1, 1, port.shape[2]), np.float32)
    result: F32 = session.run(["logits"], inputs)[0]
    return result


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", ["huginn", "retrofit_olmo2", "retrofit_qwen2"])
def test_it_gives_the_logits_of_the_folder(kind: str, bits: int, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "c", kind)
    to_onnx(checkpoint, tmp_path / "m", bits=bits)
    done = to_onnx(checkpoint, tmp_path / "one.onnx", bits=bits, single_file=True)
    assert (done.path, done.n_bytes) == (tmp_path / "one.onnx", (tmp_path / "one.onnx").stat().st_size)
    np.testing.assert_array_equal(logits(tmp_path / "one.onnx"), logits(tmp_path / "m" / "looped.onnx"))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(config=configs(), bits=st.sampled_from(BITS))
def test_every_option_makes_a_sound_file_that_holds_each_weight_once(
    config: ModelConfig, bits: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = replace(config, n_ctx=16)
    weights, layout = random_weights(config, seed=0), Layout(config, bits)
    source = Source(
        kind="test",
        config=config,
        layout=layout,
        encode=lambda name: as_pieces(name, weights[name], layout.bits[name]),
        tokenizer=None,
        files={},
        provenance={},
    )
    path = tmp_path_factory.mktemp("single") / "one.onnx"
    write_single(source, path)
    InferenceSession(path, providers=["CPUExecutionProvider"])
    graph = onnx.load(path).graph
    held = sum(len(tensor.raw_data) for tensor in graph.initializer)
    assert 0 <= held - sum(piece.n_bytes for piece in layout.values()) < 4096  # constants


def test_it_says_what_it_is_and_brings_its_tokenizer(tmp_path: Path) -> None:
    config = replace(FAMILIES["huginn"], n_vocab=300)
    texts = {"tokenizer.json": tokenizer_json(), "chat_template.jinja": TEMPLATE}
    texts["tokenizer_config.json"] = json.dumps({"bos_token": "<bos>", "eos_token": "<eos>"})
    save(tmp_path / "c", config, random_weights(config, 0), texts)
    to_onnx(tmp_path / "c", tmp_path / "one.onnx", bits=4, core_bits=8, single_file=True, license_name="MIT")
    said = InferenceSession(tmp_path / "one.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(said["localdepth.n_core"]) == config.n_core
    assert said["localdepth.provenance.quant"] == "INT4,injection=INT8,core=INT8"
    assert said["localdepth.provenance.license"] == "MIT"
    assert said["tokenizer.huggingface.json"] == tokenizer_json()
    assert said["tokenizer.chat_template"] == TEMPLATE
    assert json.loads(said["tokenizer.ggml.bos_token_id"]) == 0
    assert json.loads(said["tokenizer.ggml.eos_token_ids"]) == [1]


def test_a_name_that_does_not_end_in_onnx_is_a_folder_to_put_it_in(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "c", "huginn")
    assert to_onnx(checkpoint, tmp_path / "a" / "b", single_file=True).path == tmp_path / "a" / "b" / "looped.onnx"
    (tmp_path / "d.onnx").mkdir()
    (tmp_path / "d.onnx" / "mine").write_text("mine")
    to_onnx(checkpoint, tmp_path / "d.onnx", single_file=True)
    assert {path.name for path in (tmp_path / "d.onnx").iterdir()} == {"looped.onnx", "mine"}
    (tmp_path / "my.txt").write_text("mine")
    for out in ("d.onnx/mine/x.onnx", "my.txt"):
        with pytest.raises(StorageError, match=r"(mine|my\.txt) is a file, .* a file that ends in \.onnx, or a folder"):
            to_onnx(checkpoint, tmp_path / out, single_file=True)
    assert (tmp_path / "my.txt").read_text() == "mine"


@pytest.mark.parametrize("out", ["m", "m/looped.onnx", "m/other.onnx"])
def test_nothing_is_written_into_a_model_folder(out: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "c", "huginn")
    to_onnx(checkpoint, tmp_path / "m")
    with pytest.raises(StorageError, match=r"m holds a model folder, .*; name a file or another folder"):
        to_onnx(checkpoint, tmp_path / out, bits=8, single_file=True)
    with read(tmp_path / "m") as folder:
        assert folder.is_intact()


def test_only_an_older_file_of_ours_is_replaced(tmp_path: Path) -> None:
    checkpoint, out = make_checkpoint(tmp_path / "c", "huginn"), tmp_path / "one.onnx"
    to_onnx(checkpoint, out, single_file=True)
    assert to_onnx(checkpoint, out, bits=4, single_file=True).n_bytes == out.stat().st_size
    out.write_bytes(b"somebody's")
    with pytest.raises(StorageError, match="holds something else"):
        to_onnx(checkpoint, out, single_file=True)
    assert out.read_bytes() == b"somebody's"


def test_more_than_onnx_can_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    config = replace(FAMILIES["retrofit_llama"], n_vocab=1 << 20, n_embd=512, head_dim=16)

    def never(name: str) -> dict[str, F32]:
        raise AssertionError("nothing is read")

    source = Source(
        kind="test",
        config=config,
        layout=Layout(config, 32),
        encode=never,
        tokenizer=None,
        files={},
        provenance={},
    )
    with pytest.raises(ConfigError, match=r"one file of 4,\d+,\d+,\d+ bytes is beyond the 2,147,483,647"):
        write_single(source, tmp_path / "new" / "one.onnx")
    assert list(tmp_path.iterdir()) == []
