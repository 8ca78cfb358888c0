"""Checkpoint -> folder of ONNX graphs: whole or not at all, and it says what it is."""

import hashlib
import json
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnxruntime import InferenceSession

from localdepth.config import ModelConfig
from localdepth.engine.toy import random_weights
from localdepth.errors import CheckpointError, ConfigError, DepthError, StorageError
from localdepth_export.onnx_graphs.convert import to_onnx
from localdepth_train.checkpoint import Checkpoint, save
from tests.conftest import TEMPLATE, tokenizer_json
from tests.engines import reference_of
from tests.published import FAMILIES, make_checkpoint, weights_of

GRAPHS = {"prelude.onnx", "pass.onnx", "coda.onnx", "looped.onnx", "looped_exit.onnx", "model.onnx"}
FILES = GRAPHS | {"config.json", "genai_config.json", "weights.bin"}
TEXTS: Mapping[str, Any] = {
    "tokenizer.json": tokenizer_json(),
    "tokenizer_config.json": {"bos_token": "<bos>", "eos_token": "<eos>", "chat_template": TEMPLATE},
    "generation_config.json": {"eos_token_id": [3, 1]},
    "LICENSE": "do as you like",
    "README.md": "---\nlicense: apache-2.0\n---\n# card",
}


def record_of(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return record


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_becomes_a_folder_whose_graphs_are_sound(kind: str, tmp_path: Path) -> None:
    done = to_onnx(make_checkpoint(tmp_path / "c", kind), tmp_path / "m", bits=4)
    assert {path.name for path in (tmp_path / "m").iterdir()} == FILES
    assert done.n_bytes == sum(path.stat().st_size for path in (tmp_path / "m").iterdir())
    assert (done.quant, done.n_params, done.has_tokenizer) == ("INT4", FAMILIES[kind].n_params, False)
    assert ModelConfig.from_dict(record_of(tmp_path / "m")["model"]) == FAMILIES[kind]
    for name in GRAPHS:
        session = InferenceSession(tmp_path / "m" / name, providers=["CPUExecutionProvider"])
        assert json.loads(session.get_modelmeta().custom_metadata_map["localdepth.n_core"]) == FAMILIES[kind].n_core
        assert len((tmp_path / "m" / name).read_bytes()) < 200_000  # no weights inside


def test_an_exported_graph_answers_as_the_reference(tmp_path: Path) -> None:
    config, weights = weights_of("huginn")
    to_onnx(make_checkpoint(tmp_path / "c", "huginn"), tmp_path / "m", depth=3)
    ids = np.array([[5, 7, 11]])
    session = InferenceSession(tmp_path / "m" / "model.onnx", providers=["CPUExecutionProvider"])
    nothing = np.zeros((1, 4, 0, 16), np.float32)
    inputs = {port.name: nothing for port in session.get_inputs() if port.name.startswith("past")}
    inputs |= {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(3)[None]}
    [logits] = session.run(["logits"], inputs)
    with torch.no_grad():
        wanted = reference_of(config, weights)(torch.from_numpy(ids), 3).numpy()
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-4)


def checkpoint_with_texts(folder: Path) -> Path:
    """A checkpoint of our layout with everything that may lie beside the weights."""
    config = replace(FAMILIES["huginn"], n_vocab=300)
    texts = {name: text if isinstance(text, str) else json.dumps(text) for name, text in TEXTS.items()}
    return save(folder, config, random_weights(config, 0), texts)


def test_tokenizer_template_and_licence_travel_with_the_weights(tmp_path: Path) -> None:
    assert to_onnx(checkpoint_with_texts(tmp_path / "c"), tmp_path / "m", bits=8).has_tokenizer
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"):
        assert (tmp_path / "m" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()
    assert (tmp_path / "m" / "chat_template.jinja").read_text() == TEMPLATE
    record = record_of(tmp_path / "m")
    assert record["tokenizer"] == {"bos": 0, "eos": [3, 1], "add_bos": False}
    assert (record["provenance"]["license"], record["provenance"]["source"]) == ("apache-2.0", "c")
    assert (record["provenance"]["quant"], record["check"]["status"]) == ("INT8", "unverified")
    genai = json.loads((tmp_path / "m" / "genai_config.json").read_text())["model"]
    assert (genai["bos_token_id"], genai["eos_token_id"]) == (0, [3, 1])


def test_the_record_has_checksums_of_all_that_answers_depend_on(tmp_path: Path) -> None:
    to_onnx(checkpoint_with_texts(tmp_path / "c"), tmp_path / "m", bits=8)
    checksums = record_of(tmp_path / "m")["checksums"]
    assert set(checksums) == GRAPHS | {"weights.bin", "tokenizer.json", "chat_template.jinja"}
    for name, checksum in checksums.items():
        assert hashlib.sha256((tmp_path / "m" / name).read_bytes()).hexdigest() == checksum


def test_graphs_name_their_source_and_share_one_file(tmp_path: Path) -> None:
    to_onnx(make_checkpoint(tmp_path / "c", "retrofit_llama"), tmp_path / "m", source="somebody/model")
    for name in GRAPHS:
        model = onnx.load(tmp_path / "m" / name, load_external_data=False)
        props = {item.key: item.value for item in model.metadata_props}
        assert props["localdepth.provenance.source"] == "somebody/model"
        places = [{e.key: e.value for e in t.external_data} for t in model.graph.initializer if t.external_data]
        assert {place["location"] for place in places} == {"weights.bin"}


def test_an_older_export_is_replaced_and_anything_else_kept(tmp_path: Path) -> None:
    checkpoint, out = make_checkpoint(tmp_path / "c", "huginn"), tmp_path / "m"
    to_onnx(checkpoint, out)
    to_onnx(checkpoint, out, bits=4)
    assert record_of(out)["provenance"]["quant"] == "INT4"
    (out / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match="holds something else"):
        to_onnx(checkpoint, out)
    with pytest.raises(StorageError, match="holds something else"):
        to_onnx(checkpoint, checkpoint)
    assert (out / "notes.txt").read_text() == "mine"
    assert Checkpoint(checkpoint).config == FAMILIES["huginn"]


def test_an_export_that_is_killed_leaves_the_old_folder(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "c", "huginn")
    to_onnx(checkpoint, tmp_path / "m", bits=8)
    program = (
        "import os, signal, sys\n"
        "from localdepth_export.onnx_graphs.convert import to_onnx\n"
        "kill = lambda done, total: os.kill(os.getpid(), signal.SIGKILL) if 2 * done > total else None\n"
        "to_onnx(sys.argv[1], sys.argv[2], on_progress=kill)"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(checkpoint), str(tmp_path / "m")])
    assert killed.returncode == -signal.SIGKILL
    assert record_of(tmp_path / "m")["provenance"]["quant"] == "INT8"


def test_a_full_disk_is_told_of_the_folder_that_was_asked_for(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "c", "huginn")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(StorageError, match=f"^{re.escape(str(tmp_path))}/m/weights.bin cannot"):
            to_onnx(checkpoint, tmp_path / "m")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name for path in tmp_path.iterdir()} == {"c"}


def test_bad_requests_and_bad_weights_leave_nothing_behind(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "c", "huginn")
    with pytest.raises(ConfigError, match="bits=3"):
        to_onnx(checkpoint, tmp_path / "m", bits=3)
    with pytest.raises(DepthError, match="depth=65"):
        to_onnx(checkpoint, tmp_path / "m", depth=65)
    config, weights = weights_of("huginn")
    weights["coda.0.ffn_up.weight"][0, 0] = np.nan
    save(tmp_path / "broken", config, weights)
    with pytest.raises(CheckpointError, match=r"coda\.0\.ffn_up\.weight .* not finite"):
        to_onnx(tmp_path / "broken", tmp_path / "m")
    assert {path.name for path in tmp_path.iterdir()} == {"c", "broken"}


@pytest.mark.parametrize("kind", ["huginn", "retrofit_llama3", "retrofit_olmo2"])
def test_onnxruntime_genai_gives_the_tokens_of_the_reference(kind: str, tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    config, weights = weights_of(kind)
    to_onnx(make_checkpoint(tmp_path / "c", kind), tmp_path / "m", depth=4)
    prompt = [5, 7, 11, 13]
    model = genai.Model(str(tmp_path / "m"))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + 32, min_length=len(prompt) + 32)
    generator = genai.Generator(model, params)
    generator.append_tokens(np.array(prompt, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    reference, wanted = reference_of(config, weights), list(prompt)
    with torch.no_grad():
        for _ in range(32):
            logits = reference(torch.tensor([wanted]), 4)[0, -1]
            logits[0] = -torch.inf  # the end, which min_length forbids
            wanted.append(int(logits.argmax()))
    assert generator.get_sequence(0).tolist() == wanted
