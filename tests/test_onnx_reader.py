"""Folders of ONNX graphs: what they say is read exactly, and nothing in them reaches ONNX Runtime unchecked."""

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from localdepth.engine.base import KvType, Limits
from localdepth.engine.onnx.engine import OnnxEngine
from localdepth.engine.toy import random_weights
from localdepth.errors import EngineError, LocalDepthError, ModelFileError
from localdepth.loading import inspect, load
from localdepth.onnx_folder.folder import read
from localdepth.onnx_folder.layout import BITS, WEIGHTS
from localdepth.onnx_folder.protobuf import read_model
from localdepth.onnx_folder.record import CONFIG
from localdepth.record import CheckStatus, TokenizerRecord, quant_of, summary
from tests import engines
from tests.conftest import TEMPLATE, tokenizer_json
from tests.published import FAMILIES

GRAPHS = ("prelude.onnx", "pass.onnx", "coda.onnx")
FILES = (CONFIG, *GRAPHS, WEIGHTS, "tokenizer.json", "chat_template.jinja")
SIZES = replace(FAMILIES["huginn"], n_vocab=300, n_ctx=32, n_prelude=1, n_core=1, n_coda=1)
SPEAKING = TokenizerRecord(tokenizer_json(), bos=0, eos=(1,), add_bos=True, chat_template=TEMPLATE)

Edit = Callable[[Any], None]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "model"
    return engines.write_folder(path, SIZES, random_weights(SIZES, 0), bits=8, tokenizer=SPEAKING)


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(sound, tmp_path / "model"))


def edit_record(folder: Path, edit: Edit) -> None:
    record = json.loads((folder / CONFIG).read_text())
    edit(record)
    (folder / CONFIG).write_text(json.dumps(record))


def edit_graph(folder: Path, name: str, edit: Edit) -> None:
    """Change a graph, and its checksum too, as somebody would who means it."""
    model = onnx.load(folder / name, load_external_data=False)
    edit(model)
    put(folder, name, model.SerializeToString())


def put(folder: Path, name: str, raw: bytes) -> None:
    (folder / name).write_bytes(raw)
    checksum = hashlib.sha256(raw).hexdigest()
    edit_record(folder, lambda record: record["checksums"].update({name: checksum}))


@pytest.mark.parametrize("bits", BITS)
def test_a_folder_says_what_was_written(bits: int, tmp_path: Path) -> None:
    weights = random_weights(SIZES, 0)
    path = engines.write_folder(tmp_path / "model", SIZES, weights, bits, SPEAKING)
    with read(path) as opened:
        assert opened.config == inspect(path) == SIZES
        assert opened.tokenizer == SPEAKING
        assert opened.provenance == {"source": "test"}
        assert opened.check is not None
        assert opened.check.status is CheckStatus.UNVERIFIED
        assert opened.is_intact()
        assert opened.n_bytes == sum(file.stat().st_size for file in path.iterdir())
        assert quant_of(opened) == {32: "F32", 16: "F16", 8: "INT8", 4: "INT4"}[bits]
        assert summary(opened)["n_params"] == SIZES.n_params
        step = {32: 0, 16: 1e-3, 8: 1 / 128, 4: 1 / 8}[bits]
        for name, weight in weights.items():
            assert np.abs(opened.array(name) - weight).max() <= step * np.abs(weight).max()
    with pytest.raises(ModelFileError, match="closed"):
        opened.array("token_embd.weight")


def test_a_folder_without_tokenizer_takes_ids(tmp_path: Path) -> None:
    path = engines.write_folder(tmp_path / "model", SIZES, random_weights(SIZES, 0))
    with load(path) as model:
        assert len(model.generate([1, 2], depth=2, max_tokens=2).tokens) == 2


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_missing_empty_or_a_folder_is_named(name: str, folder: Path) -> None:
    path = folder / name
    path.unlink()
    with pytest.raises(ModelFileError, match=f"{name}.* no such file"):
        read(folder)
    path.touch()
    with pytest.raises(ModelFileError, match=f"{name} is empty"):
        read(folder)
    path.unlink()
    path.mkdir()
    with pytest.raises(ModelFileError, match=f"{name} is a directory"):
        read(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_link_out_of_the_folder_is_refused_and_one_inside_is_followed(name: str, folder: Path) -> None:
    path = folder / name
    outside, inside = folder.parent / "elsewhere", folder / "beside"
    path.rename(outside)
    path.symlink_to(outside)
    with pytest.raises(ModelFileError, match=f"{name} is a link out of its folder; copy the file itself"):
        read(folder)
    path.unlink()
    outside.rename(inside)
    path.symlink_to("beside")
    read(folder).close()
    inside.unlink()
    path.unlink()
    path.symlink_to(name)  # a circle
    with pytest.raises(ModelFileError):
        read(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda r: r.update(format_version=2), "format_version=2 is not 1; upgrade"),
        (lambda r: r.update(surprise=1), "unknown key 'surprise'"),
        (lambda r: r.pop("check"), "no key 'check'"),
        (lambda r: r.update(model=[]), "model is of type list, not dict"),
        (lambda r: r["model"].update(n_core=0), "n_core=0 must be at least 1"),
        (lambda r: r["model"].update(n_core=4000), "4002 layers cannot be made of"),
        (lambda r: r["model"].update(n_vocab=301), "n_vocab 301 against 300"),
        (
            lambda r: r["model"].update(norm_eps=0.5, embed_scale=2.0),
            r"norm_eps 0\.5 against .*, embed_scale 2\.0 against",
        ),
        (lambda r: r["model"].update(surprise=1), "unknown model fields surprise"),
        (lambda r: r["model"].update(injection="x" * 999), "injection='x{40}' is not one of"),
        (lambda r: r["bits"].update({"core.0.attn_q.weight": 5}), "bits=5 is not one of"),
        (lambda r: r["bits"].update({"core.0.attn_q.weight": True}), "is of type bool"),
        (lambda r: r["bits"].pop("core.0.attn_q.weight"), "core.0.attn_q.weight"),
        (lambda r: r["bits"].update({"core.0.attn_q.weight": 4}), "none of the weights|bytes"),
        (lambda r: r["checksums"].pop("pass.onnx"), "checksums has none for pass.onnx"),
        (lambda r: r["checksums"].pop("tokenizer.json"), "checksums has none for tokenizer.json"),
        (lambda r: r["checksums"].update({"../x": "0"}), "more than the files of a folder"),
        (lambda r: r["checksums"].update({"pass.onnx": "0"}), "pass.onnx is not what its checksum says"),
        (lambda r: r["tokenizer"].update(bos=300), r"token id 300 of the tokenizer is outside 0\.\.299"),
        (lambda r: r["tokenizer"].update(bos=None), "add_bos_token is true"),
        (lambda r: r["tokenizer"].update(eos=1), "eos is of type int, not list"),
        (lambda r: r["provenance"].update(author="me"), "provenance has an unknown key 'author'"),
        (lambda r: r["provenance"].update(source=1), "source is of type int, not str"),
        (lambda r: r["check"].update(status="fine"), "'fine' is not one of"),
        (lambda r: r["check"].update(depths=[1]), "one value of each kind"),
    ],
)
def test_a_record_that_is_wrong_is_refused_with_what_is_wrong(edit: Edit, message: str, folder: Path) -> None:
    edit_record(folder, edit)
    with pytest.raises(ModelFileError, match=message):
        read(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "[" * 9999, '{"format": "\\ud800"}', "\xff", "9" * 5000, "{}"])
def test_a_record_that_is_none_is_refused(text: str, folder: Path) -> None:
    (folder / CONFIG).write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelFileError, match=r"export|empty"):
        load(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_ctx", 64),
        ("norm_eps", 0.5),
        ("rope_style", "half"),
        ("rope_base", 7.0),
        ("rope_scaling", "llama3"),
        ("rope_scaling_factor", 8.0),
        ("rope_scaling_low_freq_factor", 2.0),
        ("rope_scaling_high_freq_factor", 5.0),
        ("rope_scaling_original_n_ctx", 9),
        ("embed_scale", 3.0),
        ("state_init", "zeros"),
        ("state_std", 3.0),
        ("norm_after_core", False),
        ("default_depth", 2),
        ("max_depth", 63),
        ("auto_min_depth", 2),
        ("trained_mean_depth", 1.5),
    ],
)
def test_a_field_that_no_size_gives_away_is_still_the_one_of_the_graphs(field: str, value: Any, folder: Path) -> None:
    said = SIZES.to_dict()[field]
    edit_record(folder, lambda record: record["model"].update({field: value}))
    with pytest.raises(ModelFileError, match=f"prelude.onnx: .* different models: {field} {value} against {said}; "):
        read(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_a_text_that_was_changed_is_named(name: str, folder: Path) -> None:
    with (folder / name).open("a") as file:
        file.write(" ")
    with pytest.raises(ModelFileError, match=f"{name} is not what its checksum says"):
        read(folder)


def test_a_template_that_came_later_is_not_the_models(tmp_path: Path) -> None:
    bare = replace(SPEAKING, chat_template=None)
    path = engines.write_folder(tmp_path / "model", SIZES, random_weights(SIZES, 0), tokenizer=bare)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    with read(path) as opened:
        assert opened.tokenizer == bare


def test_other_directories_are_told_how_to_become_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"export gguf .* or localdepth export onnx"):
        load(tmp_path)


def test_weights_of_another_length_are_refused_and_turned_bits_are_found(folder: Path) -> None:
    raw = bytearray((folder / WEIGHTS).read_bytes())
    (folder / WEIGHTS).write_bytes(raw + b"\0")
    with pytest.raises(ModelFileError, match=f"{WEIGHTS} has {len(raw) + 1} bytes, a model of these sizes {len(raw)}"):
        read(folder)
    raw[100] ^= 4
    (folder / WEIGHTS).write_bytes(raw)
    with read(folder) as opened:
        assert not opened.is_intact()


def weight_named(model: Any, name: str) -> Any:
    return next(item for item in model.graph.initializer if item.name == name)


def relocate(model: Any, **place: str) -> None:
    """Point a weight to another place."""
    tensor = weight_named(model, "core.0.attn_q.weight")
    for entry in tensor.external_data:
        entry.value = place.get(entry.key, entry.value)


def node_of(model: Any, op: str) -> Any:
    return next(node for node in model.graph.node if node.op_type == op)


def add_constant(model: Any, name: str, values: Any) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array(values), name))


def move_past_end(model: Any) -> None:
    """Have attention believe that there are more tokens than there are."""
    add_constant(model, "much", np.array([1 << 20], np.int32))
    node_of(model, "GroupQueryAttention").input[6] = "much"


def rotate_elsewhere(model: Any) -> None:
    add_constant(model, "far", np.array([1 << 40], np.int64))
    node_of(model, "RotaryEmbedding").input[1] = "far"


def swap_planes(model: Any) -> None:
    node = node_of(model, "GroupQueryAttention")
    node.input[3], node.input[4] = node.input[4], node.input[3]


def insert(model: Any, before: str, i: int, op: str, *inputs: str) -> None:
    """Send an input of the first node of a kind through another node."""
    target = node_of(model, before)
    made = helper.make_node(op, [target.input[i], *inputs], ["made"])
    model.graph.node.insert(list(model.graph.node).index(target), made)
    target.input[i] = "made"


def multiply_tokens(model: Any, op: str, i: int) -> None:
    """A broadcast makes eight tokens of one."""
    add_constant(model, "eight", np.zeros((1, 8, 1), np.float32))
    insert(model, op, i, "Add", "eight")


def pad_tokens(model: Any) -> None:
    add_constant(model, "behind", np.array([0, 0, 0, 0, 7, 0]))
    insert(model, "GroupQueryAttention", 2, "Pad", "behind")


def split_rows(model: Any) -> None:
    """Two tokens of half the width."""
    add_constant(model, "halves", np.array([1, -1, SIZES.n_head_kv * SIZES.head_dim // 2]))
    insert(model, "GroupQueryAttention", 2, "Reshape", "halves")


def double_often(model: Any) -> None:
    """A place that would take for ever to write down."""
    for i in range(60):
        model.graph.node.insert(i, helper.make_node("Sub", [f"s{i - 1}" if i else "n_total"] * 2, [f"s{i}"]))
    node_of(model, "GroupQueryAttention").input[6] = "s59"


def take_inputs(model: Any, op: str) -> None:
    del node_of(model, op).input[:]


def attribute(model: Any, op: str, name: str, value: float) -> None:
    changed = next(item for item in node_of(model, op).attribute if item.name == name)
    setattr(changed, "f" if isinstance(value, float) else "i", value)


def add_body(model: Any) -> None:
    branch = helper.make_graph([], "g", [], [])
    model.graph.node.append(helper.make_node("If", ["n_total"], ["x"], then_branch=branch, else_branch=branch))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: relocate(m, location="/etc/passwd"), "lies in '/etc/passwd'; weights lie in weights.bin"),
        (lambda m: relocate(m, location="../weights.bin"), "lies in '../weights.bin'"),
        (lambda m: relocate(m, location="sub/weights.bin"), "lies in 'sub/weights.bin'"),
        (lambda m: relocate(m, offset="1"), "none of the weights"),
        (lambda m: relocate(m, offset="-1"), "lies at '-1'"),
        (lambda m: relocate(m, offset="9" * 30), "lies at '9"),
        (lambda m: relocate(m, offset="²"), "lies at"),
        (lambda m: weight_named(m, "core.0.attn_q.weight").dims.append(1 << 40), "none of the weights"),
        (lambda m: weight_named(m, "core.0.attn_q.weight").dims.append(-1), "has shape"),
        (lambda m: weight_named(m, "core.0.attn_q.weight").external_data.pop(), "does not say where"),
        (lambda m: setattr(weight_named(m, "core.0.attn_q.weight"), "data_type", 17), "numbers of type 17"),
        (lambda m: add_constant(m, "big", np.zeros(1000, np.float32)), "4000 bytes in the graph, over 1024"),
        (lambda m: setattr(m.graph.initializer[-1], "raw_data", b""), "0 bytes where"),
        (lambda m: m.graph.initializer.append(m.graph.initializer[0]), "two tensors called"),
        (lambda m: setattr(m.graph.input[0], "name", "other"), "input 'state' of the graph is not what"),
        (lambda m: m.graph.input.append(m.graph.input[0]), "input"),
        (lambda m: m.graph.output.pop(), "output"),
        (lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 1 << 30), "numbers of type"),
        (lambda m: setattr(m.opset_import[0], "version", 99), "with operators"),
        (lambda m: setattr(m, "ir_version", 99), "IR 99"),
        (lambda m: m.ClearField("graph"), "no graph"),
        (lambda m: setattr(m.graph.node[0], "op_type", "Exotic"), "an operator 'Exotic'"),
        (lambda m: setattr(m.graph.node[0], "domain", "evil"), "of 'evil'"),
        (lambda m: m.graph.node[-1].input.append("nowhere"), "takes 'nowhere' before it is made"),
        (lambda m: m.graph.node.append(m.graph.node[0]), "makes .* again"),
        (lambda m: m.graph.ClearField("node"), "does nothing for"),
        (add_body, "a field 6 that our graphs do not have"),
        (lambda m: m.functions.add(name="f"), "a field 25"),
        (lambda m: m.graph.sparse_initializer.add(), "a field 15"),
        (move_past_end, "GroupQueryAttention of .* is not what"),
        (rotate_elsewhere, "RotaryEmbedding of .* is not what"),
        (swap_planes, "GroupQueryAttention of .* is not what"),
        (lambda m: multiply_tokens(m, "GroupQueryAttention", 0), "GroupQueryAttention of .* is not what"),
        (lambda m: multiply_tokens(m, "GroupQueryAttention", 2), "GroupQueryAttention of .* is not what"),
        (lambda m: multiply_tokens(m, "RotaryEmbedding", 0), "RotaryEmbedding of .* is not what"),
        (pad_tokens, "Pad of .* is not what"),
        (split_rows, "GroupQueryAttention of .* is not what"),
        (double_often, "GroupQueryAttention of .* is not what"),
        (lambda m: take_inputs(m, "GroupQueryAttention"), "GroupQueryAttention of '' is not what"),
        (lambda m: take_inputs(m, "RotaryEmbedding"), "RotaryEmbedding of '' is not what"),
        (lambda m: take_inputs(m, "SimplifiedLayerNormalization"), "RotaryEmbedding of .* is not what"),
        (lambda m: attribute(m, "GroupQueryAttention", "kv_num_heads", 0), "'kv_num_heads' = 0, unlike this model"),
        (lambda m: attribute(m, "RotaryEmbedding", "rotary_embedding_dim", 1 << 20), "unlike this model"),
        (lambda m: attribute(m, "MatMulNBits", "block_size", 16), "unlike this model"),
        (lambda m: attribute(m, "GroupQueryAttention", "scale", 2.0), "'scale' = 2.0, unlike this model"),
        (lambda m: attribute(m, "SkipSimplifiedLayerNormalization", "epsilon", 0.5), "'epsilon' = 0.5, unlike"),
        (lambda m: m.ClearField("metadata_props"), "missing model fields n_prelude"),
        (lambda m: setattr(m.metadata_props[0], "value", "{"), "a field of the model is not JSON"),
        (lambda m: setattr(m.metadata_props[0], "value", "9"), "n_prelude 1 against 9"),
        (lambda m: attribute(m, "MatMulNBits", "K", 1 << 40), "unlike this model"),
    ],
)
def test_a_graph_that_is_not_ours_is_refused(edit: Edit, message: str, folder: Path) -> None:
    edit_graph(folder, "pass.onnx", edit)
    with pytest.raises(ModelFileError, match=message):
        read(folder)


def test_a_graph_of_another_stage_is_refused(folder: Path) -> None:
    put(folder, "pass.onnx", (folder / "coda.onnx").read_bytes())
    with pytest.raises(ModelFileError, match=r"pass.onnx: .* of the graph is not what"):
        read(folder)


def test_what_only_onnxruntime_can_tell_is_an_engine_error(folder: Path) -> None:
    def unfit(model: Any) -> None:
        node_of(model, "MatMulNBits").input[2] = "core.0.ffn_down.weight.scales"

    edit_graph(folder, "pass.onnx", unfit)
    with pytest.raises(EngineError, match="ONNX Runtime cannot"), read(folder) as opened:
        OnnxEngine(opened, Limits(n_ctx=8, kv_depth=2, kv_type=KvType.F32))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"\x08", "a number without end"),
        (b"\x08" + b"\xff" * 11, "a number without end"),
        (b"\x08\x01\x08\x01", "ir_version given twice"),
        (b"\x0b", "wire type 3"),
        (b"\x3a\x7f", "127 bytes announced where 0 are left"),
        (b"\x12\x01\xff", "not UTF-8"),
        (b"\x0d\0\0\0\0", "ir_version with wire type 5"),
        (b"\xf8\x01\x01", "a field 31"),
    ],
)
def test_bytes_that_are_no_graph_are_refused(raw: bytes, message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        read_model(raw)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(raw: bytes) -> None:
    with suppress(ModelFileError):
        read_model(raw)


def spoiled(raw: bytes) -> st.SearchStrategy[bytes]:
    """Cut short, or with some bytes changed."""
    places = st.integers(0, len(raw) - 1)

    def changed(changes: list[tuple[int, int]]) -> bytes:
        content = bytearray(raw)
        for place, value in changes:
            content[place] = value
        return bytes(content)

    return st.one_of(
        st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=4).map(changed),
        places.map(lambda end: raw[:end]),
    )


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(FILES))
def test_a_spoiled_file_is_used_or_refused(sound: Path, folder: Path, data: st.DataObject, name: str) -> None:
    raw = (sound / name).read_bytes()
    if name in (CONFIG, WEIGHTS):
        (folder / name).write_bytes(data.draw(spoiled(raw)))
    else:
        put(folder, name, data.draw(spoiled(raw)))
    with suppress(LocalDepthError), load(folder, n_threads=1) as model:
        model.generate("the cat", depth=2, max_tokens=2)
    for file in (name, CONFIG):
        shutil.copy(sound / file, folder / file)


def test_a_larger_model_than_its_bits_say_costs_no_time(folder: Path) -> None:
    wide = {"n_embd": 1 << 17, "n_ff": 1 << 20, "n_vocab": 1 << 20, "n_ctx": 1 << 24, "n_head": 1, "n_head_kv": 1}
    edit_record(folder, lambda record: record["model"].update(wide))
    with pytest.raises(ModelFileError):
        read(folder)
