"""Reading checkpoint directories: every layout, every element type, and everything that can be wrong."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from localdepth.config import ModelConfig
from localdepth.engine.toy import random_weights
from localdepth.errors import CheckpointError, ConfigError, StorageError
from localdepth_train.checkpoint import Checkpoint, rewrite, save
from localdepth_train.checkpoint.layouts import LayoutName, recognise
from tests.published import CONFIGS, EXPECTED, FAMILIES, make_checkpoint, weights_of
from tests.strategies import configs

KINDS = {
    "huginn": "Huginn",
    "retrofit_llama": "retrofit Llama",
    "retrofit_llama3": "retrofit Llama",
    "retrofit_olmo2": "retrofit OLMo-2",
}


def edit(folder: Path, **changes: Any) -> None:
    """Change fields of config.json; a value of ... removes the field."""
    record = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in record.items() if v is not ...}))


def edit_tensors(folder: Path, **changes: Any) -> None:
    tensors = load_file(folder / "model.safetensors") | changes
    save_file({name: a for name, a in tensors.items() if a is not ...}, folder / "model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_published_layouts_are_recognised_and_read(kind: str, dtype: Any, tmp_path: Path) -> None:
    config, weights = weights_of(kind)
    checkpoint = Checkpoint(make_checkpoint(tmp_path, kind, dtype=dtype))
    assert (checkpoint.kind, checkpoint.config) == (KINDS[kind], config)
    for name, array in weights.items():
        np.testing.assert_array_equal(checkpoint.read(name), array.astype(dtype).astype(np.float32))


def test_both_published_spellings_of_a_config_are_accepted(fixtures: Path) -> None:
    for saved in (fixtures / "parity").glob("*/config_save_pretrained.json"):
        checkpoint = Checkpoint(saved.parent)
        shapes = {name: checkpoint.shape(name) for name in checkpoint.stored}
        assert recognise(json.loads(saved.read_text()), shapes, saved.parent).config == checkpoint.config


def test_converted_checkpoints_with_junk_tensors_equal_clean_ones(fixtures: Path) -> None:
    for folder in (fixtures / "parity").glob("surgery_*"):
        raw = Checkpoint(folder / "converted_raw")
        clean = Checkpoint(folder / "converted")
        assert raw.config == clean.config
        for name in clean.config.tensors():
            np.testing.assert_array_equal(raw.read(name), clean.read(name))


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    _, weights = weights_of("huginn")
    make_checkpoint(tmp_path, "huginn")
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = Checkpoint(tmp_path)
    np.testing.assert_array_equal(checkpoint.read("core.1.attn_k.weight"), weights["core.1.attn_k.weight"])
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_our_own_layout_survives_the_round_trip(family: str, tmp_path: Path) -> None:
    config, weights = weights_of(family)
    save(tmp_path / "own", config, weights, {"tokenizer.json": "{}"})
    checkpoint = Checkpoint(tmp_path / "own")
    assert (checkpoint.kind, checkpoint.config, checkpoint.text("tokenizer.json")) == ("localdepth", config, "{}")
    for name, array in weights.items():
        np.testing.assert_array_equal(checkpoint.read(name), array)


def test_saving_tensors_that_do_not_fit_is_refused(tmp_path: Path) -> None:
    config, weights = weights_of("huginn")
    with pytest.raises(ConfigError, match=r"output_norm\.weight"):
        save(tmp_path / "x", config, {**weights, "output_norm.weight": np.ones(3, np.float32)})


def test_saving_where_a_file_stands_is_a_storage_error(tmp_path: Path) -> None:
    config, weights = weights_of("huginn")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        save(tmp_path / "file", config, weights)


@given(configs(), st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]))
@settings(max_examples=20)
def test_any_model_survives_the_round_trip_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, config: ModelConfig, dtype: Any
) -> None:
    weights = {name: array.astype(dtype) for name, array in random_weights(config, 0).items()}
    checkpoint = Checkpoint(save(tmp_path_factory.mktemp("c") / "own", config, weights))
    assert checkpoint.config == config
    for name, array in weights.items():
        raw = np.asarray(checkpoint.unread(name))
        assert raw.dtype == array.dtype
        np.testing.assert_array_equal(raw, array)


@pytest.mark.parametrize("kind", ["retrofit_llama", "retrofit_llama3", "retrofit_olmo2"])
def test_published_retrofits_are_written_as_they_were_read(kind: str, tmp_path: Path) -> None:
    given = make_checkpoint(tmp_path / "given", kind)
    rewrite(given, tmp_path / "ours", layout=LayoutName.OURS)
    rewrite(tmp_path / "ours", tmp_path / "again", layout=LayoutName.PUBLISHED)
    assert Checkpoint(tmp_path / "again").config == Checkpoint(given).config == Checkpoint(tmp_path / "ours").config
    before, after = (load_file(folder / "model.safetensors") for folder in (given, tmp_path / "again"))
    assert set(before) - set(after) == {"freqs_cis", "transformer.coda.0.norm_3.weight"}
    for name, array in after.items():
        np.testing.assert_array_equal(array, before[name])


def test_a_huginn_is_not_written_in_the_published_layout(tmp_path: Path) -> None:
    config, weights = weights_of("huginn")
    with pytest.raises(ConfigError, match="layout='theirs' is not one of ours, published"):
        save(tmp_path / "x", config, weights, layout="theirs")
    with pytest.raises(ConfigError, match=r"has no place for .*norm_placement=on_sum"):
        save(tmp_path / "x", config, weights, layout="published")
    assert not (tmp_path / "x").exists()


def test_parts_of_one_tensor_must_be_of_one_type(tmp_path: Path) -> None:
    config, weights = weights_of("retrofit_llama")
    mixed = {**weights, "core.0.attn_k.weight": weights["core.0.attn_k.weight"].astype(np.float16)}
    with pytest.raises(ConfigError, match=r"core\.0\.attn_k\.weight, .* become one tensor and have different types"):
        save(tmp_path / "x", config, mixed, layout=LayoutName.PUBLISHED)
    raw = Checkpoint(save(tmp_path / "x", config, mixed)).unread("core.0.attn_k.weight")
    assert raw.dtype == np.float16


def test_saving_tells_how_far_it_is(tmp_path: Path) -> None:
    config, weights = weights_of("huginn")
    told: list[tuple[int, int]] = []
    save(tmp_path / "x", config, weights, on_progress=lambda done, total: told.append((done, total)))
    n_bytes = 4 * config.n_params
    assert told[-1] == (n_bytes, n_bytes)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_a_checkpoint_replaces_only_one_of_its_own_layout(tmp_path: Path) -> None:
    config, weights = weights_of("retrofit_llama")
    out = save(tmp_path / "x", config, weights)
    assert save(out, config, weights, {"tokenizer.json": "{}"}) == out
    with pytest.raises(StorageError, match="would be lost"):
        save(out, config, weights, layout=LayoutName.PUBLISHED)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match="would be lost"):
        save(out, config, weights)
    (out / "notes.txt").unlink()
    (out / "config.json").write_text("{")
    with pytest.raises(StorageError, match="would be lost"):
        save(out, config, weights)


def test_a_plain_model_is_told_the_retrofit_line(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "retrofit_llama")
    edit(tmp_path, model_type="llama")
    with pytest.raises(CheckpointError, match="localdepth retrofit"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "model_type 'bert'"),
        ({"model_type": ...}, "model_type None"),
        ({"n_embd": ...}, "n_embd"),
        ({"n_embd": "48"}, "n_embd='48' must be a whole number"),
        ({"num_attention_heads": 0}, "division"),
        ({"n_layers_in_recurrent_block": 3}, "missing transformer.core_block.2"),
        ({"n_layers_in_recurrent_block": 1}, "unknown transformer.core_block.1"),
        ({"intermediate_size": 70}, r"mlp\.fc\.weight .* shape \[144, 48\]"),
        ({"nonlin_name": "GELU"}, "nonlin_name='GELU'"),
        ({"injection_type": "gate"}, "injection_type='gate'"),
        ({"bias": True}, "bias=True"),
        ({"num_key_value_heads": 2}, "qk_bias .* as many key heads"),
        ({"rope_theta": 10000.0, "max_position_embeddings": 96}, "unknown .*norm_3|unknown .*qk_bias"),
    ],
)
def test_broken_configs_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "huginn")
    edit(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transformer.ln_f.weight": ...}, "missing transformer.ln_f.weight"),
        ({"transformer.extra.weight": np.ones(3, np.float32)}, "unknown transformer.extra.weight"),
        ({"transformer.ln_f.weight": np.ones(47, np.float32)}, r"shape \[47\]"),
        ({"transformer.ln_f.weight": np.ones(48, np.int32)}, "stored as I32"),
        ({"lm_head.weight": np.ones((90, 48), np.float32)}, "head is tied, but lm_head.weight differs"),
    ],
)
def test_broken_tensors_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "huginn")
    edit_tensors(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path)


def test_a_second_copy_of_a_tied_head_is_accepted(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "huginn")
    wte = load_file(tmp_path / "model.safetensors")["transformer.wte.weight"]
    edit_tensors(tmp_path, **{"lm_head.weight": wte})
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.config == EXPECTED["huginn"]


def test_missing_directories_files_and_bad_json_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a directory"):
        Checkpoint(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="JSON object"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["huginn"]))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pickled \.bin weights are not read"):
        Checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{")
    with pytest.raises(CheckpointError, match="download it again"):
        Checkpoint(tmp_path)


def test_an_index_that_leaves_its_folder_is_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "huginn")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../x.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside its folder"):
        Checkpoint(tmp_path)
