"""Plain models, read as models that loop once: they compute what their family does, or are refused with the reason."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from localdepth.config import Injection
from localdepth.errors import CheckpointError
from localdepth_train.checkpoint import Checkpoint, save
from localdepth_train.checkpoint.plain import is_plain, recognise_plain
from tests.bases import BASES, in_shards, make_base, plain_logits, random_base
from tests.published import make_checkpoint
from tests.strategies import json_values

torch = pytest.importorskip("torch")
from localdepth_train.reference_engine import load_reference  # noqa: E402  needs torch

KINDS = {
    "llama": "Llama",
    "llama3": "Llama",
    "mistral": "Mistral",
    "olmo2": "OLMo-2",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
}
ROUNDING = 2e-5  # float32 against float64


def opened(folder: Path) -> Checkpoint:
    return Checkpoint(folder, recognise_plain)


@pytest.mark.parametrize("name", BASES)
def test_a_plain_model_computes_what_its_family_does(name: str, tmp_path: Path) -> None:
    base = opened(make_base(tmp_path, name))
    assert base.kind == KINDS[name]
    assert is_plain(base.config)
    ids = [3, 1, 4, 1, 5, 9, 2, 6, 5, 35, 49, 0, 7, 7, 3, 2, 38, 4, 6, 26]
    with torch.no_grad():
        got = load_reference(base)(torch.tensor([ids]), 1)[0].numpy()
    np.testing.assert_allclose(
        got, plain_logits(BASES[name], random_base(BASES[name]), ids, [*range(6)]), atol=ROUNDING
    )


def test_published_bases_give_their_published_logits(fixtures: Path) -> None:
    for folder in (fixtures / "parity").glob("surgery_*"):
        expected = np.load(folder / "expected.npz")
        with torch.no_grad():
            got = load_reference(opened(folder / "base"))(torch.from_numpy(expected["input_ids"]).long(), 1)
        np.testing.assert_allclose(got.numpy(), expected["base_logits"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_weights_are_read_in_their_own_type_or_widened(dtype: Any, tmp_path: Path) -> None:
    base = opened(make_base(tmp_path, "qwen2", dtype))
    for ours, theirs in (("attn_v.bias", "v_proj.bias"), ("attn_q.weight", "q_proj.weight")):
        wanted = random_base(BASES["qwen2"])[f"model.layers.2.self_attn.{theirs}"].astype(dtype)
        raw = np.asarray(base.unread(f"core.2.{ours}"))
        assert raw.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(raw, wanted)
        np.testing.assert_array_equal(base.read(f"core.2.{ours}"), wanted.astype(np.float32))


def test_shards_and_leftovers_are_read_through(tmp_path: Path) -> None:
    make_base(tmp_path, "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    read = opened(in_shards(tmp_path)).read("output_norm.weight")
    np.testing.assert_array_equal(read, tensors["model.norm.weight"])


def test_a_tied_model_may_store_its_head_again_but_not_another_one(tmp_path: Path) -> None:
    make_base(tmp_path, "llama3")
    tensors = load_file(tmp_path / "model.safetensors")
    same = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].copy()}
    save_file(same, tmp_path / "model.safetensors")
    assert opened(tmp_path).config.tied_head
    save_file({**same, "lm_head.weight": 2 * same["lm_head.weight"]}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"head is tied, but lm_head\.weight differs"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("name", "changes", "n_ctx"),
    [
        ("mistral", {"sliding_window": 16}, 16),
        ("mistral", {"sliding_window": 4096}, 64),
        ("mistral", {}, 64),
        ("qwen2", {}, 64),
        ("qwen2", {"use_sliding_window": True}, 16),
        ("qwen2", {"use_sliding_window": True, "layer_types": ["full_attention"] * 6}, 64),
        ("qwen2", {"layer_types": ["full_attention"] * 5 + ["sliding_attention"]}, 16),
        ("llama", {"sliding_window": 16}, 64),
    ],
)
def test_a_sliding_window_is_the_context(name: str, changes: dict[str, Any], n_ctx: int, tmp_path: Path) -> None:
    assert opened(make_base(tmp_path, name, **changes)).config.n_ctx == n_ctx


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 5e5},
        {"rope_theta": None, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope_scaling": {"type": "default"}, "rope_theta": 500000},
    ],
)
def test_all_spellings_of_the_rope_settings_are_read(changes: dict[str, Any], tmp_path: Path) -> None:
    assert opened(make_base(tmp_path, "llama", **changes)).config.rope_base == 5e5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "attention_bias=True is not supported, only False"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling of type 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling of type 'linear'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "lacks 'low_freq_factor'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, r"by kind of layer \(full_attention\)"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor=0\.5"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5 is not supported, only 1"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"layer_types": ["linear_attention"] * 6}, "layer_types has 'linear_attention'"),
        ({"num_hidden_layers": 7}, r"missing model\.layers\.6"),
        ({"num_hidden_layers": 5}, r"unknown model\.layers\.5"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers=0 must be a whole number in 1\.\."),
        ({"num_attention_heads": 0}, r"num_attention_heads=0 must be a whole number in 1\.\."),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0 must be a whole number"),
        ({"hidden_size": "24"}, "hidden_size='24' must be a whole number"),
        ({"intermediate_size": 41}, r"has shape \[40, 24\] where config\.json implies \[41, 24\]"),
        ({"tie_word_embeddings": True}, "head is tied, but"),
        ({"rms_norm_eps": None}, "rms_norm_eps=None must be a finite number"),
        ({"rms_norm_eps": [1e-5]}, r"rms_norm_eps=\[1e-05\] must be a finite number"),
        ({"rope_theta": "1e4"}, "rope_theta='1e4' must be a finite number"),
        ({"rope_theta": 10**400}, "rope_theta=1000.* must be a finite number"),
        ({"rope_scaling": "x"}, "rope_scaling='x' must be a JSON object"),
        ({"rope_scaling": {"rope_type": None, "type": "linear", "factor": 2}}, "rope_scaling of type 'linear'"),
        ({"rope_scaling": {"rope_type": "default", "type": "linear"}}, "rope_scaling of type 'linear'"),
        ({"rope_scaling": {"rope_type": ["llama3"]}}, r"rope_scaling of type \['llama3'\]"),
        ({"rope_parameters": [5e5]}, r"rope_parameters=\[500000\.0\] must be a JSON object"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false' must be true or false"),
        ({"layer_types": 5}, "layer_types=5 must be a list"),
        ({"layer_types": [["full_attention"]]}, r"layer_types has \['full_attention'\]"),
        ({"model_type": "mixtral"}, "model_type 'mixtral'; bases can be llama, mistral, olmo2, qwen2, qwen3"),
        ({"model_type": "qwen2_moe"}, "model_type 'qwen2_moe'"),
        ({"model_type": "qwen2"}, r"missing .*q_proj\.bias|missing .*bias"),
        ({"model_type": ["llama"]}, "model_type"),
    ],
)
def test_what_cannot_be_represented_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        opened(make_base(tmp_path, "llama", **changes))


@given(st.sampled_from(sorted(BASES)), st.data())
def test_any_value_in_a_config_is_read_or_refused(name: str, data: st.DataObject) -> None:
    record, shapes = BASES[name], {tensor: array.shape for tensor, array in random_base(BASES[name]).items()}
    key = data.draw(st.sampled_from(sorted({*record, "rope_scaling", "rope_parameters", "layer_types", "head_dim"})))
    value = data.draw(json_values("type", "rope_type", "llama3", "factor", "rope_theta", "partial_rotary_factor"))
    with suppress(CheckpointError):
        recognise_plain({**record, key: value}, shapes, Path("x"))


def test_a_looped_model_is_no_base(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds a looped model"):
        opened(make_checkpoint(tmp_path, "retrofit_llama"))


def test_a_plain_model_of_our_own_layout_is_a_base(tmp_path: Path) -> None:
    base = opened(make_base(tmp_path / "base", "qwen3"))
    config = base.config
    assert (config.n_core, config.injection) == (6, Injection.NONE)
    save(tmp_path / "own", config, {name: base.unread(name) for name in config.tensors()})
    again = opened(tmp_path / "own")
    assert again.config == config
    np.testing.assert_array_equal(again.read("core.3.attn_k_norm.weight"), base.read("core.3.attn_k_norm.weight"))
    assert Checkpoint(tmp_path / "own").config == config  # which can be exported as it is
