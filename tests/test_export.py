"""Checkpoint -> model file: exact where the format allows, and honest where it does not."""

import json
import math
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tokenizers

from localdepth.engine.toy import random_weights
from localdepth.errors import CheckpointError, ConfigError, StorageError
from localdepth.gguf import read
from localdepth.loading import load
from localdepth.quant import Quant
from localdepth.record import Check, CheckStatus
from localdepth_export.convert import to_gguf
from localdepth_export.recipe import Recipe
from localdepth_export.verification import verify
from localdepth_train.checkpoint import save
from tests.conftest import TEMPLATE, tokenizer_json
from tests.published import EXPECTED, FAMILIES, make_checkpoint, weights_of

# Every row holds a block of 256.
WIDE = replace(
    EXPECTED["retrofit_llama"],
    n_prelude=1,
    n_core=1,
    n_coda=0,
    n_embd=256,
    head_dim=64,
    n_ff=256,
    trained_mean_depth=4.0,
)


@pytest.mark.parametrize("kind", FAMILIES)
def test_float32_files_hold_the_checkpoint_bit_for_bit(kind: str, tmp_path: Path) -> None:
    config, weights = weights_of(kind)
    done = to_gguf(make_checkpoint(tmp_path / "c", kind), tmp_path / "m.gguf", quant="F32")
    assert (done.fallbacks, done.n_params, done.n_bytes) == ((), config.n_params, (tmp_path / "m.gguf").stat().st_size)
    with read(tmp_path / "m.gguf") as file:
        assert file.config == config
        for name, array in weights.items():
            np.testing.assert_array_equal(file.array(name), array)


@pytest.mark.parametrize(("quant", "dtype"), [("BF16", ml_dtypes.bfloat16), ("F16", np.float16)])
def test_sixteen_bit_checkpoints_survive_in_their_own_format(quant: str, dtype: Any, tmp_path: Path) -> None:
    _, weights = weights_of("retrofit_llama")
    to_gguf(make_checkpoint(tmp_path / "c", "retrofit_llama", dtype=dtype), tmp_path / "m.gguf", quant=quant)
    with read(tmp_path / "m.gguf") as file:
        for name, array in weights.items():
            np.testing.assert_array_equal(file.array(name), array.astype(dtype).astype(np.float32))


def test_tensors_that_cannot_hold_the_quant_fall_back_and_are_listed(tmp_path: Path) -> None:
    done = to_gguf(make_checkpoint(tmp_path / "c", "huginn"), tmp_path / "m.gguf", quant="q8_0")
    config = EXPECTED["huginn"]  # rows of 48 and 72: no whole blocks of 32
    matrices = [name for name, shape in config.tensors().items() if len(shape) == 2]
    assert done.fallbacks == tuple(f"{name}: Q8_0 -> F16" for name in matrices)
    with read(tmp_path / "m.gguf") as file:
        assert file.provenance["fallbacks"] == done.fallbacks
        assert {file.tensors[name].quant for name in matrices} == {Quant.F16}
        assert {info.quant for name, info in file.tensors.items() if name not in matrices} == {Quant.F32}
    with load(tmp_path / "m.gguf") as model:
        assert len(model.generate([1, 2, 3], max_tokens=3).tokens) == 3


@pytest.mark.parametrize(("quant", "value"), [("F16", 1e5), ("Q8_0", 1e8), ("BF16", 3.4e38), ("Q4_0", 1e6)])
def test_values_too_large_for_a_quant_are_refused_and_nothing_is_left(quant: str, value: float, tmp_path: Path) -> None:
    config, weights = weights_of("retrofit_llama")
    config = replace(config, n_embd=64, head_dim=16)
    weights = random_weights(config, 0)
    weights["token_embd.weight"][3, 3] = value
    save(tmp_path / "c", config, weights)
    with pytest.raises(ConfigError, match=rf"token_embd\.weight: .* do not fit {quant}; export as F32"):
        to_gguf(tmp_path / "c", tmp_path / "m.gguf", quant=quant)
    weights["token_embd.weight"][3, 3] = np.nan
    save(tmp_path / "c", config, weights)
    with pytest.raises(CheckpointError, match=r"token_embd\.weight .* not finite"):
        to_gguf(tmp_path / "c", tmp_path / "m.gguf", quant=quant)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def with_tokenizer(folder: Path, **files: object) -> Path:
    """A checkpoint of our layout with text files beside it."""
    config = replace(EXPECTED["huginn"], n_vocab=300)
    texts = {name: text if isinstance(text, str) else json.dumps(text) for name, text in files.items()}
    return save(folder, config, random_weights(config, 0), texts)


def test_tokenizer_template_and_licence_travel_with_the_weights(tmp_path: Path) -> None:
    files = {
        "tokenizer.json": tokenizer_json(),
        "tokenizer_config.json": {
            "bos_token": {"content": "<bos>"},
            "eos_token": "<eos>",
            "add_bos_token": True,
            "chat_template": [{"name": "tools", "template": "x"}, {"name": "default", "template": TEMPLATE}],
        },
        "generation_config.json": {"eos_token_id": [3, 1]},
        "README.md": "---\ntags: [x]\nlicense: apache-2.0\n---\n# card",
    }
    assert to_gguf(with_tokenizer(tmp_path / "c", **files), tmp_path / "m.gguf").has_tokenizer
    with read(tmp_path / "m.gguf") as file:
        assert file.tokenizer is not None
        assert (file.tokenizer.bos, file.tokenizer.eos, file.tokenizer.add_bos) == (0, (3, 1), True)
        assert file.tokenizer.chat_template == TEMPLATE
        assert (file.provenance["license"], file.provenance["source"]) == ("apache-2.0", "c")
        assert str(file.provenance["exporter"]).startswith("localdepth ")
    with load(tmp_path / "m.gguf") as model:
        assert model.generate("the cat", max_tokens=4).tokens


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_K", "F16"])
def test_export_holds_twice_the_largest_tensor_at_most(quant: str, tmp_path: Path) -> None:
    config = replace(EXPECTED["retrofit_llama"], n_vocab=8000, n_embd=1024, head_dim=16, n_ff=2048)
    weights = {name: np.zeros(shape, ml_dtypes.bfloat16) for name, shape in config.tensors().items()}
    save(tmp_path / "c", config, weights)
    program = (
        "import resource, sys\n"
        "from localdepth_export.convert import to_gguf\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = peak(); to_gguf(sys.argv[1], sys.argv[2], quant=sys.argv[3]); print(peak() - before)"
    )
    arguments = [sys.executable, "-c", program, str(tmp_path / "c"), str(tmp_path / "m.gguf"), quant]
    taken = int(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout)
    largest = 4 * max(math.prod(shape) for shape in config.tensors().values())
    output = (tmp_path / "m.gguf").stat().st_size
    assert output + 2 * largest < 4 * config.n_params  # the test could tell
    assert taken < output + 2 * largest


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.json": "{"}, "not valid JSON"),
        ({"tokenizer.json": "[]"}, "JSON object"),
        ({"tokenizer.json": tokenizer_json(), "tokenizer_config.json": "nope"}, "tokenizer_config.json"),
    ],
)
def test_broken_tokenizer_files_are_refused(files: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        to_gguf(with_tokenizer(tmp_path / "c", **files), tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_writing_where_nothing_can_be_written_is_a_storage_error(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "c", "huginn")
    with pytest.raises(StorageError):
        to_gguf(checkpoint, tmp_path / "missing" / "m.gguf")


def test_an_export_that_is_killed_leaves_the_old_file(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "c", "huginn")
    (tmp_path / "m.gguf").write_bytes(b"GGUF old")
    program = (
        "import os, signal, sys\n"
        "from localdepth_export.convert import to_gguf\n"
        "kill = lambda done, total: os.kill(os.getpid(), signal.SIGKILL) if 2 * done > total else None\n"
        "to_gguf(sys.argv[1], sys.argv[2], on_progress=kill)"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(checkpoint), str(tmp_path / "m.gguf")])
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "m.gguf").read_bytes() == b"GGUF old"


@pytest.mark.parametrize("kind", ["retrofit_olmo2", "retrofit_qwen2", "retrofit_qwen3"])
def test_verification_is_written_into_the_file(kind: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "c", kind)
    to_gguf(checkpoint, tmp_path / "m.gguf", quant="F32")
    with read(tmp_path / "m.gguf") as file:
        assert file.check == Check(CheckStatus.UNVERIFIED)
    report = verify(tmp_path / "m.gguf", checkpoint, depths=(1, 2, 8))
    assert report.passed
    assert max(report.check.max_abs) < 1e-4
    assert set(report.check.top1) == {1.0}
    with read(tmp_path / "m.gguf") as file:
        assert file.check == report.check
        assert file.check.status is CheckStatus.VERIFIED


RECIPES = [*Quant, "Q4_K,core=Q6_K,head=Q8_0"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_stays_within_its_bound(recipe: str, tmp_path: Path) -> None:
    checkpoint = save(tmp_path / "c", WIDE, random_weights(WIDE, 1))
    done = to_gguf(checkpoint, tmp_path / "m.gguf", quant=recipe)
    assert (done.quant, done.fallbacks) == (recipe, ())
    report = verify(tmp_path / "m.gguf", checkpoint, depths=(1, 4))
    assert report.passed, report
    assert report.exact
    assert (max(report.check.max_abs) < 1e-4) == (recipe == "F32")


@pytest.mark.parametrize("recipe", RECIPES)
def test_one_wrong_tensor_fails_the_verification_and_is_named(recipe: str, tmp_path: Path) -> None:
    weights = random_weights(WIDE, 1)
    checkpoint = save(tmp_path / "c", WIDE, weights)
    weights["core.0.attn_q.weight"] = weights["core.0.attn_q.weight"][::-1].copy()
    to_gguf(save(tmp_path / "wrong", WIDE, weights), tmp_path / "m.gguf", quant=recipe)
    report = verify(tmp_path / "m.gguf", checkpoint, depths=(1,))
    assert (report.passed, report.wrong_tensors) == (False, ("core.0.attn_q.weight",))
    with read(tmp_path / "m.gguf") as file:
        assert file.check is not None
        assert file.check.status is CheckStatus.FAILED


@pytest.mark.parametrize("quant", Quant)
def test_one_wrong_number_fails_the_verification(quant: Quant, tmp_path: Path) -> None:
    checkpoint = save(tmp_path / "c", WIDE, random_weights(WIDE, 1))
    to_gguf(checkpoint, tmp_path / "m.gguf", quant=quant)
    with read(tmp_path / "m.gguf") as file:
        info = file.tensors["core.0.ffn_up.weight"]
    contents = bytearray((tmp_path / "m.gguf").read_bytes())
    middle = quant.block_bytes // 2  # of a block in the middle: past the scales, the high bits of one number or two
    contents[info.offset + info.n_bytes // 2 // quant.block_bytes * quant.block_bytes + middle] ^= 0x88
    (tmp_path / "m.gguf").write_bytes(contents)
    assert verify(tmp_path / "m.gguf", checkpoint, depths=(1,)).wrong_tensors == ("core.0.ffn_up.weight",)


def test_every_stage_is_stored_as_the_recipe_says_and_the_file_says_so(tmp_path: Path) -> None:
    checkpoint = save(tmp_path / "c", WIDE, random_weights(WIDE, 1))
    seen: list[tuple[int, int]] = []
    text = "Q4_K,injection=F16,core=Q6_K,head=Q8_0"
    to_gguf(checkpoint, tmp_path / "m.gguf", quant=text, on_progress=lambda done, total: seen.append((done, total)))
    with read(tmp_path / "m.gguf") as file:
        assert file.provenance["quant"] == text
        stored = {name: info.quant for name, info in file.tensors.items()}
        assert stored == Recipe.parse(text).choose(WIDE)[0]
    assert len(seen) == len(stored)
    assert seen[-1] == (WIDE.n_params, WIDE.n_params)


def test_logits_that_are_not_finite_fail_the_verification(tmp_path: Path) -> None:
    config = EXPECTED["retrofit_llama"]
    weights = random_weights(config, 1)
    for name in ("core.0.ffn_gate.weight", "core.0.ffn_up.weight"):
        weights[name] *= np.float32(1e30)  # their product overflows
    checkpoint = save(tmp_path / "c", config, weights)
    to_gguf(checkpoint, tmp_path / "m.gguf", quant="F32")
    report = verify(tmp_path / "m.gguf", checkpoint, depths=(1, 2))
    assert not np.isfinite(report.check.max_abs).any()
    assert not report.passed


def test_verifying_at_no_depth_is_refused(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "c", "retrofit_llama")
    to_gguf(checkpoint, tmp_path / "m.gguf")
    with pytest.raises(ConfigError, match="no depths"):
        verify(tmp_path / "m.gguf", checkpoint, depths=())


def test_a_start_token_that_the_tokenizer_adds_itself_is_kept(tmp_path: Path) -> None:
    rules = json.loads(tokenizer_json())
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [0], "tokens": ["<bos>"]}},
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    for processor in (template, {"type": "Sequence", "processors": [byte_level, template]}):
        rules["post_processor"] = processor
        files = {"tokenizer.json": json.dumps(rules), "tokenizer_config.json": {"bos_token": "<bos>"}}
        to_gguf(with_tokenizer(tmp_path / "c", **files), tmp_path / "m.gguf")
        with load(tmp_path / "m.gguf") as model:
            expected = tokenizers.Tokenizer.from_str(json.dumps(rules)).encode("the cat").ids
            assert model.tokenize("the cat") == expected
            assert expected[0] == 0


def test_a_file_of_another_model_is_not_compared(tmp_path: Path) -> None:
    to_gguf(make_checkpoint(tmp_path / "a", "retrofit_llama"), tmp_path / "m.gguf", quant="F32")
    other = make_checkpoint(tmp_path / "b", "retrofit_llama3")
    with pytest.raises(ConfigError, match=r"rope_base 10000\.0 against 500000\.0"):
        verify(tmp_path / "m.gguf", other)
    with pytest.raises(ConfigError, match="no tokenizer"):
        verify(tmp_path / "m.gguf", tmp_path / "a", text="some text")


def test_real_looped_weights_of_the_published_layouts_export(fixtures: Path, tmp_path: Path) -> None:
    folders = sorted(path.parent for path in (fixtures / "parity").glob("*/config_save_pretrained.json"))
    assert len(folders) >= 5
    for folder in folders:
        to_gguf(folder, tmp_path / "m.gguf", quant="F32")
        expected = np.load(folder / "expected.npz")
        with load(tmp_path / "m.gguf", kv_type="f32", n_ctx=32) as model:
            for depth in (1, 2, 4, 8, 16):
                logits = model.logits(expected["input_ids"][0], depth=depth, state=expected["init_state"][0])
                np.testing.assert_allclose(logits, expected[f"logits_r{depth}"][0], atol=1e-4, rtol=0)
            states = model.states(expected["input_ids"][1], depth=8, state=expected["init_state"][1])
            np.testing.assert_allclose(states, expected["states_r8"][:, 1], atol=1e-4, rtol=0)
