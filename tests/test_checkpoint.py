"""Reading checkpoint directories: every layout, every element type, and everything that can be wrong."""

import json
from contextlib import suppress
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
from tests.bases import in_shards
from tests.published import CONFIGS, EXPECTED, FAMILIES, make_checkpoint, published_tensors, weights_of
from tests.strategies import configs, json_values

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
        shapes = {name: array.shape for name, array in load_file(saved.parent / "model.safetensors").items()}
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
    checkpoint = Checkpoint(in_shards(make_checkpoint(tmp_path, "huginn")))
    np.testing.assert_array_equal(checkpoint.read("core.1.attn_k.weight"), weights["core.1.attn_k.weight"])
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors"):
        Checkpoint(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "huginn")
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    twice = "transformer.ln_f.weight"
    save_file({twice: 2 * tensors[twice]}, tmp_path / "b.safetensors")
    index = {"weight_map": {**dict.fromkeys(tensors, "a.safetensors"), "gone": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=rf"{twice} is in .*a\.safetensors and in b\.safetensors; keep the one"):
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
    with pytest.raises(ConfigError, match=r"output_norm\.weight has shape \[3\] where the config implies \[48\]"):
        save(tmp_path / "x", config, {**weights, "output_norm.weight": np.ones(3, np.float32)})
    with pytest.raises(ConfigError, match=r"extra has shape \[3\] where the config implies none"):
        save(tmp_path / "x", config, {**weights, "extra": np.ones(3, np.float32)})
    del weights["output_norm.weight"]
    with pytest.raises(ConfigError, match=r"output_norm\.weight has shape none where the config implies \[48\]"):
        save(tmp_path / "x", config, weights)


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


def test_what_a_writer_has_against_replacing_a_checkpoint_is_heard(tmp_path: Path) -> None:
    config, weights = weights_of("retrofit_llama")
    shown: list[Path] = []

    def judge(folder: Path) -> None:
        shown.append(folder)
        raise StorageError("it is the only copy")

    out = save(tmp_path / "x", config, weights, judge=judge)
    assert shown == []
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(StorageError, match="it is the only copy"):
        save(out, config, {name: 2 * array for name, array in weights.items()}, judge=judge)
    assert shown == [out]
    assert (out / "model.safetensors").read_bytes() == before


def test_a_card_goes_along_byte_for_byte_when_a_checkpoint_is_rewritten(tmp_path: Path) -> None:
    config, weights = weights_of("retrofit_llama")
    card = b"---\r\nlicense: mit\r\n---\r\nna\xefve"
    rewrite(save(tmp_path / "x", config, weights, {"README.md": card}), tmp_path / "y", layout=LayoutName.PUBLISHED)
    assert (tmp_path / "y" / "README.md").read_bytes() == card


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
        ({"num_attention_heads": 0}, r"num_attention_heads=0 must be a whole number in 1\.\."),
        ({"n_embd": 10**400}, "n_embd=1000.* must be a whole number"),
        ({"n_layers_in_prelude": -1}, r"n_layers_in_prelude=-1 must be a whole number in 0\.\."),
        ({"norm_eps": None}, "norm_eps=None must be a finite number"),
        ({"norm_eps": "1e-6"}, "norm_eps='1e-6' must be a finite number"),
        ({"rope_base": 10**400}, "rope_base=1000.* must be a finite number"),
        ({"qk_bias": "yes"}, "qk_bias='yes' must be true or false"),
        ({"tie_embeddings": 1}, "tie_embeddings=1 must be true or false"),
        ({"n_layers_in_recurrent_block": 3}, "missing transformer.core_block.2"),
        ({"n_layers_in_recurrent_block": 1}, "unknown transformer.core_block.1"),
        ({"intermediate_size": 70}, r"mlp\.fc\.weight .* shape \[144, 48\]"),
        ({"nonlin_name": "GELU"}, "nonlin_name='GELU'"),
        ({"injection_type": "gate"}, "injection_type='gate' is not one of linear, add"),
        ({"injection_type": ["linear"]}, r"injection_type=\['linear'\] is not one of"),
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
        ({"rope_theta": None}, "rope_theta=None must be a finite number"),
        ({"rope_scaling": "x"}, "rope_scaling='x' must be a JSON object"),
        ({"rope_scaling": {"type": "llama3", "factor": "8"}}, "factor='8' must be a finite number"),
        ({"init_values": 5}, "init_values=5 must be a JSON object"),
        ({"init_values": {"std": "small"}}, "std='small' must be a finite number"),
        ({"init_values": {"embed_scale": True}}, "embed_scale=True must be a finite number"),
    ],
)
def test_broken_configs_of_retrofits_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "retrofit_llama")
    edit(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=rf"config\.json: {message}"):
        Checkpoint(tmp_path)


@given(st.sampled_from(sorted(CONFIGS)), st.data())
def test_any_value_in_a_config_is_read_or_refused(kind: str, data: st.DataObject) -> None:
    record, shapes = CONFIGS[kind], {n: a.shape for n, a in published_tensors(*weights_of(kind)).items()}
    key = data.draw(st.sampled_from(sorted({*record, "rope_scaling", "init_values", "qk_bias", "head_dim"})))
    value = data.draw(json_values("type", "rope_type", "llama3", "factor", "low_freq_factor", "std", "embed_scale"))
    with suppress(CheckpointError):
        recognise({**record, key: value}, shapes, Path("x"))


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (2, "has format_version 2, this version reads 1; update localdepth"),
        (..., "has format_version None, this version reads 1; download it again, or write the checkpoint anew"),
        ("2", "has format_version '2', this version reads 1; download it again"),
    ],
)
def test_other_versions_of_our_layout_are_refused_with_the_remedy(version: Any, message: str, tmp_path: Path) -> None:
    config, weights = weights_of("huginn")
    edit(save(tmp_path / "own", config, weights), format_version=version)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path / "own")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transformer.ln_f.weight": ...}, r"missing transformer\.ln_f\.weight; unknown none; download it again, or"),
        ({"transformer.extra.weight": np.ones(3, np.float32)}, "unknown transformer.extra.weight"),
        ({"transformer.ln_f.weight": np.ones(47, np.float32)}, r"shape \[47\]"),
        ({"transformer.ln_f.weight": np.ones(48, np.int32)}, "stored as I32; convert it to one of F32, F16, BF16"),
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
    with pytest.raises(CheckpointError, match=r"nowhere does not exist; pass the folder that holds config\.json"):
        Checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no config\.json; .* in checkpoint/ once it ends"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(CheckpointError, match=r"is not UTF-8: .*; download it again"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"not valid JSON: .*; download it again"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="JSON object, got list; download it again"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["huginn"]))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pickled \.bin weights are not read"):
        Checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{")
    with pytest.raises(CheckpointError, match="download it again"):
        Checkpoint(tmp_path)


def test_in_the_folder_of_a_run_its_checkpoint_is_pointed_at(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "run" / "checkpoint", "huginn")
    with pytest.raises(CheckpointError, match=rf"pass the folder that holds config\.json: {checkpoint}$"):
        Checkpoint(tmp_path / "run")


def test_an_index_that_leaves_its_folder_is_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "huginn")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../x.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside its folder"):
        Checkpoint(tmp_path)
