"""Surgery: kept weights bit for bit, new ones as promised, and folders that are whole or not there."""

import json
import math
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from localdepth.config import Injection, ModelConfig, StateInit
from localdepth.errors import CheckpointError, ConfigError, StorageError
from localdepth.loading import load
from localdepth_export.convert import to_gguf
from localdepth_train.checkpoint import Checkpoint, rewrite, save
from localdepth_train.checkpoint.layouts import LayoutName
from localdepth_train.checkpoint.plain import recognise_plain
from localdepth_train.surgery import Cost, Surgery, retrofit
from tests.bases import BASES, in_shards, make_base, plain_logits, random_base, write_weights
from tests.conftest import tokenizer_json
from tests.published import make_checkpoint

torch = pytest.importorskip("torch")
from localdepth_train.recipe import load_recipe  # noqa: E402
from localdepth_train.reference_engine import load_reference  # noqa: E402  needs torch

SURGERIES = ("tinyllama", "llama32", "olmo2")
CHOICE = {"prelude": "0,2", "core": "5,3", "coda": "1"}  # neither neighbours nor in order
KEPT = [0, 2, 5, 3, 1]
IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 35]
ROUNDING = 2e-5  # float32 against float64
TOLERANCE = 1e-4  # of the published fixtures, absolute and relative


def logits(folder: Path, depth: int, ids: Any = None) -> Any:
    """Of a checkpoint in the torch reference: [T, V], or [B, T, V] for a batch."""
    batch = torch.tensor([IDS]) if ids is None else torch.from_numpy(ids).long()
    with torch.no_grad():
        out = load_reference(Checkpoint(folder))(batch, depth).numpy()
    return out[0] if ids is None else out


def only_kept(base: Path, out: Path) -> Path:
    """The layers in ``KEPT`` as a plain model of their own."""
    opened = Checkpoint(base, recognise_plain)
    config = replace(opened.config, n_core=len(KEPT))

    def stored(name: str) -> str:
        stage, _, rest = name.partition(".")
        i, _, part = rest.partition(".")
        return f"core.{KEPT[int(i)]}.{part}" if stage == "core" else name

    return save(out, config, {name: opened.unread(stored(name)) for name in config.tensors()})


def published(fixtures: Path, name: str) -> tuple[Path, dict[str, Any]]:
    folder = fixtures / "parity" / f"surgery_{name}"
    spec = json.loads((folder / "meta.json").read_text())["spec"]
    return folder, {stage: spec[stage] for stage in ("prelude", "core", "coda")}


# --- against the published surgery ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SURGERIES)
def test_the_published_layout_is_the_published_surgery_but_for_the_draw(
    name: str, fixtures: Path, tmp_path: Path
) -> None:
    folder, choice = published(fixtures, name)
    retrofit(folder / "base", tmp_path / "out", **choice, layout="published")
    ours, theirs = (load_file(place / "model.safetensors") for place in (tmp_path / "out", folder / "converted"))
    assert set(ours) == set(theirs)
    for tensor in set(ours) - {"transformer.adapter.weight"}:
        assert ours[tensor].dtype == theirs[tensor].dtype
        np.testing.assert_array_equal(ours[tensor], theirs[tensor])
    drawn, bound = ours["transformer.adapter.weight"], 1 / math.sqrt(2 * 48)
    assert drawn.shape == theirs["transformer.adapter.weight"].shape
    assert 0.99 * bound < np.abs(drawn).max() <= bound
    assert drawn.std() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    records = [json.loads((place / "config.json").read_text()) for place in (tmp_path / "out", folder / "converted")]
    assert records[0] == records[1]


@pytest.mark.parametrize("name", SURGERIES)
@pytest.mark.parametrize("layout", LayoutName)
def test_identity_reproduces_the_kept_layers_at_every_depth(
    name: str, layout: str, fixtures: Path, tmp_path: Path
) -> None:
    folder, choice = published(fixtures, name)
    retrofit(folder / "base", tmp_path / "out", **choice, layout=layout, init="identity")
    expected = np.load(folder / "expected.npz")
    first = logits(tmp_path / "out", 1, expected["input_ids"])
    for key in ("identity_adapter_logits_r1", "identity_adapter_logits_r2", "kept_layers_logits"):
        np.testing.assert_allclose(first, expected[key], atol=TOLERANCE, rtol=TOLERANCE)
    for depth in (2, 5):
        np.testing.assert_array_equal(logits(tmp_path / "out", depth, expected["input_ids"]), first)


@pytest.mark.parametrize("name", SURGERIES)
def test_our_layout_holds_the_same_weights_and_keeps_a_tie(name: str, fixtures: Path, tmp_path: Path) -> None:
    folder, choice = published(fixtures, name)
    retrofit(folder / "base", tmp_path / "out", **choice)
    ours, theirs = Checkpoint(tmp_path / "out"), Checkpoint(folder / "converted")
    is_tied = name == "llama32"
    assert ours.config == replace(theirs.config, tied_head=is_tied, trained_mean_depth=0.0)
    for tensor in (name for name in ours.config.tensors() if not name.startswith("injection.")):
        np.testing.assert_array_equal(ours.read(tensor), theirs.read(tensor))


# --- every kind of base -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASES)
def test_depth_one_of_identity_and_pass_through_is_the_kept_layers(name: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", name)
    wanted = plain_logits(BASES[name], random_base(BASES[name]), IDS, KEPT)
    for init in ("identity", "pass-through"):
        retrofit(base, tmp_path / init, **CHOICE, init=init)
    retrofit(base, tmp_path / "add", **CHOICE, injection="add")
    firsts = [logits(tmp_path / out, 1) for out in ("identity", "pass-through", "add")]
    np.testing.assert_allclose(firsts[0], wanted, atol=ROUNDING)
    plain = logits(only_kept(base, tmp_path / "kept"), 1)
    for first in firsts:
        np.testing.assert_array_equal(first, plain)


@pytest.mark.parametrize("layout", LayoutName)
def test_a_base_in_shards_becomes_the_same_file(layout: str, tmp_path: Path) -> None:
    whole = make_base(tmp_path / "whole", "llama", ml_dtypes.bfloat16)
    parts = in_shards(make_base(tmp_path / "parts", "llama", ml_dtypes.bfloat16))
    made = [retrofit(base, tmp_path / f"of {base.name}", **CHOICE, layout=layout).path for base in (whole, parts)]
    weights = [(path / "model.safetensors").read_bytes() for path in made]
    assert weights[0] == weights[1]


def test_pass_through_is_addition_to_begin_with(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    retrofit(base, tmp_path / "matrix", **CHOICE, init="pass-through")
    retrofit(base, tmp_path / "sum", **CHOICE, injection="add", init="pass-through")
    for depth in (1, 3):
        np.testing.assert_array_equal(logits(tmp_path / "matrix", depth), logits(tmp_path / "sum", depth))
    assert np.abs(logits(tmp_path / "sum", 3) - logits(tmp_path / "sum", 1)).max() > 0.1


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("layout", LayoutName)
@pytest.mark.parametrize("init", ["paper", "identity"])
def test_every_tensor_keeps_the_number_type_of_the_base(dtype: Any, layout: str, init: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama", dtype)
    retrofit(base, tmp_path / "out", **CHOICE, layout=layout, init=init)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {array.dtype for array in stored.values()} == {np.dtype(dtype)}
    given = load_file(base / "model.safetensors")
    raw = np.asarray(Checkpoint(tmp_path / "out").unread("core.0.ffn_up.weight"))
    np.testing.assert_array_equal(raw, given["model.layers.5.mlp.up_proj.weight"])


@pytest.mark.parametrize("name", ["llama", "llama3", "mistral", "olmo2"])
@pytest.mark.parametrize("options", [{}, {"init": "identity"}, {"injection": "add", "init": "pass-through"}])
def test_both_layouts_turn_into_each_other_bit_for_bit(name: str, options: dict[str, str], tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", name, ml_dtypes.bfloat16)
    (base / "tokenizer.json").write_text('{"a": "ä"}', encoding="utf-8")
    first = retrofit(base, tmp_path / "ours", **CHOICE, **options)
    rewrite(tmp_path / "ours", tmp_path / "theirs", layout=LayoutName.PUBLISHED)
    rewrite(tmp_path / "theirs", tmp_path / "again", layout=LayoutName.OURS)
    retrofit(base, tmp_path / "at-once", **CHOICE, **options, layout="published")
    steps = [Checkpoint(tmp_path / place) for place in ("ours", "theirs", "again", "at-once")]
    untied = replace(first.config, tied_head=False, auto_min_depth=steps[1].config.auto_min_depth)
    untied = replace(untied, trained_mean_depth=float(first.config.default_depth))
    assert [step.config for step in steps[1:]] == [untied] * 3
    for tensor in first.config.tensors():
        for step in steps[1:]:
            np.testing.assert_array_equal(step.read(tensor), steps[0].read(tensor))
    for step in steps:
        assert step.text("tokenizer.json") == '{"a": "ä"}'


@pytest.mark.parametrize("name", ["llama", "llama3"])  # the second has a tied head
@pytest.mark.parametrize("layout", LayoutName)
@pytest.mark.parametrize("init", ["paper", "identity"])
def test_what_is_said_of_a_retrofit_is_what_its_folder_says(name: str, layout: str, init: str, tmp_path: Path) -> None:
    made = retrofit(make_base(tmp_path / "base", name), tmp_path / "out", **CHOICE, layout=layout, init=init)
    assert made.config == Checkpoint(made.path).config
    assert made.config.tied_head == (name == "llama3" and layout == LayoutName.OURS)
    assert made.config.trained_mean_depth == (made.config.default_depth if layout == LayoutName.PUBLISHED else 0)
    assert sum(made.parameters().values()) == made.config.n_params


# --- what is new ------------------------------------------------------------------------------------------------------


def test_the_draw_follows_the_seed(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        retrofit(base, tmp_path / out, **CHOICE, seed=seed)
    a, b, c = (Checkpoint(tmp_path / out).read("injection.state.weight") for out in "abc")
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)
    assert not np.array_equal(a, Checkpoint(tmp_path / "a").read("injection.embeds.weight"))


def test_depths_and_state_are_those_of_an_untrained_model(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    drawn, kept = (retrofit(base, tmp_path / init, **CHOICE, init=init).config for init in ("paper", "identity"))
    assert (drawn.state_init, drawn.default_depth, drawn.auto_min_depth) == (StateInit.NORMAL, 32, 2)
    assert drawn.state_std == 0.008703882797784892
    assert (kept.state_init, kept.state_std, kept.default_depth, kept.auto_min_depth) == (StateInit.ZEROS, 0.0, 1, 1)
    assert drawn.trained_mean_depth == kept.trained_mean_depth == 0
    assert drawn.max_depth == kept.max_depth == 64


def test_costs_are_counted_by_depth() -> None:
    tinyllama = ModelConfig(
        n_prelude=4,
        n_core=8,
        n_coda=4,
        n_embd=2048,
        n_head=32,
        n_head_kv=4,
        head_dim=64,
        n_ff=5632,
        n_vocab=32000,
        n_ctx=2048,
        norm_eps=1e-5,
        default_depth=32,
        max_depth=64,
    )
    plain = replace(
        tinyllama,
        n_prelude=0,
        n_core=22,
        n_coda=0,
        injection=Injection.NONE,
        default_depth=1,
    )
    # K/V in KiB as published for bf16, which F16 equals
    assert [Cost.of(tinyllama, depth).kv_bytes / 1024 for depth in (4, 8, 32)] == [40, 72, 264]
    assert Cost.of(plain, 1).kv_bytes / 1024 == 22
    core = Cost.of(tinyllama, 2).flops - Cost.of(tinyllama, 1).flops
    assert core == 2 * (8 * (2 * 2048**2 + 2 * 256 * 2048 + 3 * 2048 * 5632) + 2048**2)
    assert Cost.of(plain, 1).flops == 2 * (plain.n_params - 32000 * 2048 - (2 * 22 + 1) * 2048)


def test_the_report_says_what_went_where(tmp_path: Path) -> None:
    made = retrofit(make_base(tmp_path / "base", "qwen2"), tmp_path / "out", **CHOICE)
    assert (made.kind, made.layers.core, made.dropped) == ("Qwen2", (5, 3), (4,))
    assert sum(made.parameters().values()) == made.config.n_params
    assert made.parameters()["injection"] == 2 * 24 * 24
    assert made.base_cost().flops < made.cost(4).flops < made.cost(8).flops


def test_the_tokenizer_and_the_licence_come_along(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama", eos_token_id=2, bos_token_id=1)
    (base / "README.md").write_text("---\nlicense: llama3.2\nlicense_link: x\ntags: [a]\n---\nA fine base.\n")
    (base / "LICENSE").write_bytes(b"\xff not UTF-8")
    (base / "tokenizer.model").write_bytes(b"\x00\x01")
    (base / "notes.txt").write_text("mine")
    retrofit(base, tmp_path / "out", **CHOICE, source="lab/base")
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert set(files) == {
        *("config.json", "model.safetensors", "generation_config.json", "README.md", "LICENSE", "tokenizer.model"),
    }
    assert (files["LICENSE"], files["tokenizer.model"]) == (b"\xff not UTF-8", b"\x00\x01")
    assert json.loads(files["generation_config.json"]) == {"bos_token_id": 1, "eos_token_id": 2}
    card = files["README.md"].decode()
    assert card.startswith('---\nlicense: llama3.2\nlicense_link: x\nbase_model: "lab/base"\n---\n')
    assert "| core | 5,3 |" in card


def generation_of(base: Path, out: Path) -> Any:
    retrofit(base, out, **CHOICE)
    return json.loads((out / "generation_config.json").read_text())


def test_generation_settings_are_the_bases_and_their_ids_those_of_its_config(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama", eos_token_id=[2, 3], bos_token_id=1)
    settings = base / "generation_config.json"
    settings.write_text('{"temperature": 0.6, "eos_token_id": null}')
    assert generation_of(base, tmp_path / "out") == {"temperature": 0.6, "bos_token_id": 1, "eos_token_id": [2, 3]}
    settings.write_text('{"eos_token_id": 7}')
    assert generation_of(base, tmp_path / "out") == {"bos_token_id": 1, "eos_token_id": 7}
    settings.write_bytes(b'{"eos_token_id":7,\n"bos_token_id":0}')
    generation_of(base, tmp_path / "out")
    assert (tmp_path / "out" / "generation_config.json").read_bytes() == settings.read_bytes()
    settings.write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json is not valid JSON"):
        generation_of(base, tmp_path / "out")


@pytest.mark.parametrize(
    ("card", "front"),
    [
        (b"---\r\nlicense: mit\r\ntags: [a]\r\n---\r\n", "license: mit\n"),
        (b"---\ntags:\n- a\nlicense:\n- mit\n- apache-2.0\n---\n", "license:\n- mit\n- apache-2.0\n"),
        (b"\xef\xbb\xbf---\nlicense: mit\n---\n", "license: mit\n"),
        (b"---\nlicense: mit\n---\nna\xefve", "license: mit\n"),
        (b"---\nlicense: [mit\n---\n", "license: [mit\n"),
        (b"no front matter", ""),
    ],
)
def test_the_licence_comes_along_however_the_card_is_written(card: bytes, front: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    (base / "README.md").write_bytes(card)
    made = retrofit(base, tmp_path / "out", **CHOICE)
    assert (made.path / "README.md").read_text().startswith(f'---\n{front}base_model: "base"\n---\n')


# --- refusals, and what stays where it was ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "gguf"}, "layout='gguf' is not one of ours, published"),
        ({"injection": "gate"}, "injection='gate' is not one of concat_linear, add"),
        ({"injection": "none"}, "injection='none' is not one of"),
        ({"init": "random"}, "init='random' is not one of paper, identity, pass-through"),
        ({"injection": "add", "init": "identity"}, "change one of them"),
        ({"core": "9"}, "core names layer 9"),
        ({"seed": -1}, "seed=-1 must not be negative"),
        ({"preset": "tinyllama-4-8-4"}, "leave out prelude"),
    ],
)
def test_impossible_wishes_are_refused_before_anything_is_written(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base", "llama")
    with pytest.raises(ConfigError, match=message):
        retrofit(base, tmp_path / "out", **{**CHOICE, **options})
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize(("name", "field"), [("qwen2", "qk_bias=True, v_bias=True"), ("qwen3", "qk_norm=head")])
def test_what_the_published_code_cannot_hold_is_refused(name: str, field: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"the published layout has no place for {field}"):
        retrofit(make_base(tmp_path / "base", name), tmp_path / "out", **CHOICE, layout="published")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_the_base_is_never_written_over(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    before = (base / "config.json").read_bytes()
    with pytest.raises(ConfigError, match="is the base itself"):
        retrofit(base, base / ".." / "base", **CHOICE)
    with pytest.raises(StorageError, match="holds something else and would be lost"):
        retrofit(base, make_base(tmp_path / "other", "olmo2"), **CHOICE)
    assert (base / "config.json").read_bytes() == before
    assert len(load_file(tmp_path / "other" / "model.safetensors")) == len(random_base(BASES["olmo2"]))


def test_a_base_that_ends_early_leaves_the_older_retrofit(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    retrofit(base, tmp_path / "out", **CHOICE, seed=1)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    whole = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(whole[:-8])
    with pytest.raises(CheckpointError, match="download it again"):
        retrofit(base, tmp_path / "out", **CHOICE, seed=2)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    (base / "model.safetensors").write_bytes(whole)
    retrofit(base, tmp_path / "out", **CHOICE, seed=2)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


def test_only_a_retrofit_that_was_not_trained_is_replaced(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    made = retrofit(base, tmp_path / "out", **CHOICE)
    retrofit(base, made.path, **CHOICE, seed=1)
    trained = replace(made.config, trained_mean_depth=4.0)
    opened = Checkpoint(made.path)
    save(made.path, trained, {name: opened.unread(name) for name in trained.tensors()}, opened.carried())
    plain = only_kept(base, tmp_path / "plain")
    theirs = make_checkpoint(tmp_path / "theirs", "retrofit_llama")
    (theirs / "README.md").write_text("---\nlicense: mit\n---\nTrained for weeks.")
    for out, layout in ((made.path, "ours"), (plain, "ours"), (theirs, "published")):
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        with pytest.raises(StorageError, match="is no untrained retrofit and would be lost; name another folder"):
            retrofit(base, out, **CHOICE, layout=layout)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_memory_is_taken_for_about_the_largest_tensor(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama", vocab_size=100_000)
    write_weights(base, {**BASES["llama"], "vocab_size": 100_000}, np.float32)
    largest, whole = 4 * 100_000 * 24, (base / "model.safetensors").stat().st_size
    assert whole > 2 * largest
    for layout in LayoutName:
        tracemalloc.start()
        retrofit(base, tmp_path / layout, **CHOICE, layout=layout)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1.2 * largest


# --- all the way ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["babyllama-105", "stories260K"])
def test_a_real_checkpoint_speaks_on_after_surgery(name: str, fixtures: Path, tmp_path: Path) -> None:
    base = fixtures / "data" / "weights" / name
    made = retrofit(base, tmp_path / "out", prelude="0", core="1-3", coda="4", init="identity")
    assert made.dropped == ()
    to_gguf(tmp_path / "out", tmp_path / "model.gguf", quant="Q8_0")
    with load(tmp_path / "model.gguf") as model:
        said = [model.generate("Once upon a time", depth=depth, max_tokens=40).text for depth in (1, 4)]
    assert said[0] == said[1]
    assert "there was a" in said[0]


RECIPE = """
seed = 0
batch_size = 2
save_every = 2
start = "nowhere"
[evaluation]
every = 2
depths = [1]
[[phases]]
name = "heal"
steps = 2
[phases.depth]
mean = 2
backprop = 1
[phases.optimizer]
adamw_lr = 1e-3
[phases.text]
n_tokens = 16
shuffle_buffer = 2
held_out_one_in = 2
[[phases.text.sources]]
path = "{text}"
"""


@pytest.fixture
def untrained(tmp_path: Path) -> Surgery:
    """A retrofit with a tokenizer."""
    base = make_base(tmp_path / "base", "llama", vocab_size=300)
    write_weights(base, {**BASES["llama"], "vocab_size": 300}, np.float32)
    (base / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    (base / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    return retrofit(base, tmp_path / "looped", **CHOICE, init="identity")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Two steps on a few sentences, which start from a folder that is not there."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"the cat sat on the mat {i} times and the rat ate {i} oats" for i in range(40)))
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(text=text))
    return path


def test_a_retrofit_is_trained_from_where_it_lies(untrained: Surgery, recipe: Path, tmp_path: Path) -> None:
    by_file = untrained.train(recipe)
    by_object = untrained.train(load_recipe(recipe), tmp_path / "again")
    assert by_file.checkpoint == tmp_path / "looped-trained" / "checkpoint"
    assert by_object.checkpoint == tmp_path / "again" / "checkpoint"
    assert by_file.steps == 2
    one, other = (Checkpoint(report.checkpoint) for report in (by_file, by_object))
    assert one.config == replace(untrained.config, default_depth=2, trained_mean_depth=2.0)
    for name in one.config.tensors():
        np.testing.assert_array_equal(one.read(name), other.read(name))
    name = "core.0.ffn_up.weight"
    assert not np.array_equal(one.read(name), Checkpoint(untrained.path).read(name))


def test_surgery_does_not_replace_what_training_has_made(untrained: Surgery, recipe: Path, tmp_path: Path) -> None:
    trained = untrained.train(recipe).checkpoint
    assert trained is not None
    before = Checkpoint(trained).read("output_norm.weight")
    with pytest.raises(StorageError, match="is no untrained retrofit and would be lost"):
        retrofit(tmp_path / "base", trained, **CHOICE)
    np.testing.assert_array_equal(Checkpoint(trained).read("output_norm.weight"), before)
