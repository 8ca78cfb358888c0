"""ModelConfig: what it accepts, what it refuses, and what it derives."""

from dataclasses import replace

import pytest
from hypothesis import given

from localdepth.config import Injection, ModelConfig, NormPlacement, QkNorm
from localdepth.errors import ConfigError, DepthError
from tests.published import EXPECTED, FAMILIES
from tests.strategies import configs

HUGINN = EXPECTED["huginn"]


@given(configs())
def test_a_record_survives_the_round_trip(config: ModelConfig) -> None:
    assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_core": 0}, "n_core=0"),
        ({"n_prelude": -1}, "n_prelude=-1"),
        ({"n_embd": 1 << 30}, "damaged"),
        ({"n_head_kv": 3}, "multiple of n_head_kv=3"),
        ({"head_dim": 7}, "odd"),
        ({"norm_eps": 0.0}, "norm_eps=0.0"),
        ({"norm_eps": float("nan")}, "finite"),
        ({"state_std": -1.0}, "negative"),
        ({"default_depth": 65}, "default_depth <= max_depth"),
        ({"auto_min_depth": 0}, "auto_min_depth"),
        ({"tied_head": 1}, "type bool"),
        ({"n_vocab": True}, "type int"),
        ({"rope_base": 10000}, "type float"),
        ({"rope_scaling": "llama3"}, "type RopeScaling"),
        ({"v_bias": 1}, "type bool"),
    ],
)
def test_contradictions_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(HUGINN, **change)  # type: ignore[arg-type]  # wrong on purpose


def test_missing_and_unknown_fields_are_named() -> None:
    record = HUGINN.to_dict()
    with pytest.raises(ConfigError, match="missing model fields n_embd"):
        ModelConfig.from_dict({key: value for key, value in record.items() if key != "n_embd"})
    with pytest.raises(ConfigError, match="missing model fields qk_bias"):
        ModelConfig.from_dict({key: value for key, value in record.items() if key != "qk_bias"})
    with pytest.raises(ConfigError, match="unknown model fields n_loops"):
        ModelConfig.from_dict({**record, "n_loops": 4})
    with pytest.raises(ConfigError, match="qk_norm='heads' is not one of none, full, head"):
        ModelConfig.from_dict({**record, "qk_norm": "heads"})
    with pytest.raises(ConfigError, match="injection='gate' is not one of concat_linear, add, none"):
        ModelConfig.from_dict({**record, "injection": "gate"})


def test_a_field_that_came_later_may_be_missing() -> None:
    record = HUGINN.to_dict()
    del record["v_bias"]
    assert ModelConfig.from_dict(record) == HUGINN


@pytest.mark.parametrize("depth", [0, -1, 65, True, 2.0, "4", None])
def test_depth_outside_the_range_is_refused(depth: object) -> None:
    with pytest.raises(DepthError, match=r"1\.\.64"):
        HUGINN.check_depth(depth)  # type: ignore[arg-type]  # wrong on purpose


def test_measurements_may_go_to_sixty_four() -> None:
    shallow = replace(HUGINN, max_depth=8)
    assert shallow.check_depth(64, measure=True) == 64
    with pytest.raises(DepthError):
        shallow.check_depth(9)
    with pytest.raises(DepthError):
        shallow.check_depth(65, measure=True)


def test_tensors_follow_the_options() -> None:
    assert "output.weight" not in HUGINN.tensors()
    assert "core.0.attn_q.bias" in HUGINN.tensors()
    added = replace(HUGINN, injection=Injection.ADD, qk_bias=False, tied_head=False)
    assert not any(name.startswith("injection.") or name.endswith(".bias") for name in added.tensors())
    assert added.tensors()["output.weight"] == (90, 48)
    olmo = replace(added, norm_placement=NormPlacement.POST_BRANCH, qk_norm=QkNorm.FULL)
    norms = {name.removeprefix("core.0.") for name in olmo.tensors() if name.startswith("core.0.") and "norm" in name}
    assert norms == {"attn_q_norm.weight", "attn_k_norm.weight", "attn_post_norm.weight", "ffn_post_norm.weight"}


def test_qwen_blocks_have_biases_on_all_inputs_or_a_norm_on_every_head() -> None:
    qwen2, qwen3 = (FAMILIES[kind].tensors() for kind in ("retrofit_qwen2", "retrofit_qwen3"))
    biases = {name: shape for name, shape in qwen2.items() if name.startswith("core.0.") and name.endswith(".bias")}
    assert biases == {"core.0.attn_q.bias": (48,), "core.0.attn_k.bias": (24,), "core.0.attn_v.bias": (24,)}
    assert qwen3["core.0.attn_q_norm.weight"] == qwen3["core.0.attn_k_norm.weight"] == (16,)


def test_parameters_of_the_published_huginn_are_counted() -> None:
    huginn = replace(
        HUGINN, n_core=4, n_coda=2, n_embd=5280, n_head=55, n_head_kv=55, head_dim=96, n_ff=17920, n_vocab=65536
    )
    adapter, block_norms = 2 * 5280**2, 8 * 4 * 5280
    assert huginn.n_params == 3_509_051_040 + adapter + block_norms  # its authors leave these two out


def test_llama3_scaling_keeps_fast_pairs_and_slows_slow_ones() -> None:
    config = replace(EXPECTED["retrofit_llama3"], head_dim=64)
    scaled, plain = config.rope_frequencies(), replace(EXPECTED["retrofit_llama"], head_dim=64, rope_base=500000.0)
    ratios = [a / b for a, b in zip(scaled, plain.rope_frequencies(), strict=True)]
    assert ratios[0] == 1.0
    assert ratios[-1] == pytest.approx(1 / 8)
    assert ratios == sorted(ratios, reverse=True)
