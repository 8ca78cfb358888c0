"""ONNX graphs compute what the reference does: every family, product and head size, at once and token by token."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper
from onnxruntime import InferenceSession, OrtValue, SessionOptions
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

from localdepth.config import Injection, ModelConfig
from localdepth.engine.base import F32, KvType, Limits
from localdepth.engine.toy import ToyEngine, random_weights
from localdepth.onnx_folder.layout import BITS, WEIGHTS, Layout, from_blocks, scales_of
from localdepth.onnx_folder.ports import kv_head_dim
from localdepth_export.onnx_graphs.bits import choose_bits
from localdepth_export.onnx_graphs.builder import Builder
from localdepth_export.onnx_graphs.looped import looped_exit_graph, looped_graph
from localdepth_export.onnx_graphs.stages import coda_graph, pass_graph, prelude_graph
from localdepth_export.onnx_graphs.unrolled import unrolled_graph
from localdepth_export.onnx_graphs.weights import as_pieces, write_weights
from tests.engines import greedy, reference_of, run
from tests.published import FAMILIES
from tests.strategies import configs

CLOSE = 1e-4  # of logits in float32, whose sums run in another order
DEPTHS = (1, 2, 4, 8, 16)
CAPACITY = 24  # positions that a cache holds
IDS = np.random.default_rng(7).integers(0, 90, 9)
CUTS = {"at once": [9], "token by token": [1] * 9}
MODELS: dict[str, ModelConfig] = {
    **FAMILIES,
    "heads of 2": replace(FAMILIES["retrofit_llama"], head_dim=2),
    "heads of 8": replace(FAMILIES["retrofit_qwen3"], head_dim=8),
    "interleaved heads of 20": replace(FAMILIES["huginn"], head_dim=20),
    "adds": replace(FAMILIES["retrofit_llama"], injection=Injection.ADD),
    "injects once": replace(FAMILIES["retrofit_olmo2"], injection=Injection.NONE),
    "core alone": replace(FAMILIES["retrofit_llama"], n_prelude=0, n_coda=0, injection=Injection.NONE),
}
Caches = Mapping[str, OrtValue]
Ids64 = NDArray[np.int64]


class Graph:
    """A session on one thread that is given its caches to write in place."""

    def __init__(self, folder: Path, name: str) -> None:
        options = SessionOptions()
        options.intra_op_num_threads = 1
        self._session = InferenceSession(folder / f"{name}.onnx", options, providers=["CPUExecutionProvider"])

    def caches(self, **sizes: int) -> Caches:
        """Zeros for every past, by layer and side; ``sizes`` of the dimensions that have names."""
        shapes = {port.name: port.shape for port in self._session.get_inputs() if port.name.startswith("past")}
        return {
            name.partition(".")[2]: OrtValue.ortvalue_from_numpy(
                np.zeros([n if isinstance(n, int) else sizes[n] for n in shape], np.float32)
            )
            for name, shape in shapes.items()
        }

    def run(self, caches: Caches, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """All outputs but the caches."""
        binding = self._session.io_binding()
        given = {name: OrtValue.ortvalue_from_numpy(array) for name, array in inputs.items()}
        for port in self._session.get_inputs():
            binding.bind_ortvalue_input(port.name, given.get(port.name) or caches[port.name.partition(".")[2]])
        names = [port.name for port in self._session.get_outputs()]
        for name in names:
            if name.startswith("present"):
                binding.bind_ortvalue_output(name, caches[name.partition(".")[2]])
            else:
                binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        outputs = dict(zip(names, binding.get_outputs(), strict=True))
        return {name: np.array(value.numpy()) for name, value in outputs.items() if not name.startswith("present")}

    def grow(self, past: Mapping[str, F32], inputs: Mapping[str, NDArray[Any]]) -> tuple[F32, dict[str, F32]]:
        """Logits and new caches, nothing bound."""
        names = [port.name for port in self._session.get_outputs()]
        given = {**inputs, **{f"past.{name}": array for name, array in past.items()}}
        outputs = dict(zip(names, self._session.run(names, given), strict=True))
        return outputs.pop("logits"), {name.removeprefix("present."): array for name, array in outputs.items()}


class Exported:
    """A model as graphs in a folder, all of whose sums are of floats."""

    def __init__(
        self, config: ModelConfig, weights: Mapping[str, F32], folder: Path, bits: int | Mapping[str, int] = 32
    ) -> None:
        self.config, self.folder, self.layout = config, folder, Layout(config, bits)
        self._graphs: dict[str, Graph] = {}
        bits = self.layout.bits
        write_weights(folder / WEIGHTS, config, self.layout, lambda name: as_pieces(name, weights[name], bits[name]))

    def graph(self, name: str, make: Callable[..., Builder], *settings: int) -> Graph:
        """A session of one graph, made on first use."""
        if name not in self._graphs:
            made = make(self.config, self.layout, *settings).model(name, {})
            multiply_floats(made.graph)
            onnx.save_model(made, self.folder / f"{name}.onnx")
            self._graphs[name] = Graph(self.folder, name)
        return self._graphs[name]


def multiply_floats(graph: onnx.GraphProto) -> None:
    """Have weights in blocks multiplied with floats, where the exported graph rounds them to 8 bits."""
    for node in graph.node:
        for attribute in node.attribute:
            multiply_floats(attribute.g)
            if attribute.name == "accuracy_level":
                attribute.i = 1


def pieces(ids: Ids64, sizes: Sequence[int]) -> Iterator[tuple[Ids64, dict[str, NDArray[Any]]]]:
    """Consecutive pieces of a prompt [1,T], and where they end."""
    ends = np.cumsum(sizes)
    for start, end in zip(ends - sizes, ends, strict=True):
        yield ids[None, start:end], {"n_total": np.array([end], np.int32)}


def by_stages(model: Exported, depth: int, sizes: Sequence[int], prompt: Ids64 = IDS) -> F32:
    prelude, coda = model.graph("prelude", prelude_graph), model.graph("coda", coda_graph)
    core = model.graph("pass", pass_graph)
    first, last = prelude.caches(n_past=CAPACITY), coda.caches(n_past=CAPACITY)
    planes = [core.caches(n_past=CAPACITY) for _ in range(depth)]
    logits = []
    for ids, place in pieces(prompt, sizes):
        injected = prelude.run(first, {"ids": ids, **place})["injected"]
        state = np.zeros_like(injected)
        for r, plane in enumerate(planes):
            state = core.run(plane, {"state": state, "injected": injected, **place})["next_state"]
            if model.config.injection is Injection.NONE and r == 0:
                injected = np.zeros_like(injected)
        logits.append(coda.run(last, {"state": state, "rows": np.arange(ids.size), **place})["logits"])
    return np.concatenate(logits)


def whole_inputs(config: ModelConfig, ids: Ids64) -> dict[str, NDArray[Any]]:
    return {"ids": ids, "state": np.zeros((1, 1, config.n_embd), np.float32), "rows": np.arange(ids.size)}


def by_scan(model: Exported, depth: int, sizes: Sequence[int], prompt: Ids64 = IDS) -> F32:
    graph = model.graph("looped", looped_graph)
    caches = graph.caches(n_past=CAPACITY, n_passes=depth)
    return np.concatenate(
        [
            graph.run(caches, {**whole_inputs(model.config, ids), **place})["logits"]
            for ids, place in pieces(prompt, sizes)
        ]
    )


def by_loop(model: Exported, depth: int, sizes: Sequence[int], prompt: Ids64 = IDS) -> F32:
    graph = model.graph("looped_exit", looped_exit_graph)
    caches = graph.caches(n_past=CAPACITY, n_planes=depth)
    limits = {"threshold": np.array(0, np.float32), "max_passes": np.array(depth)}
    logits = []
    for ids, place in pieces(prompt, sizes):
        outputs = graph.run(caches, {**whole_inputs(model.config, ids), **place, **limits})
        assert outputs["n_passes"] == [depth]
        keep(caches, outputs, int(place["n_total"][0]))
        logits.append(outputs["logits"])
    return np.concatenate(logits)


def keep(caches: Caches, outputs: Mapping[str, NDArray[Any]], end: int) -> None:
    """Put the core's new keys and values where the next call reads them."""
    for name, new in outputs.items():
        if name.startswith("new."):
            planes = caches[name.removeprefix("new.")].numpy()[..., end - new.shape[-2] : end, :]
            planes[: len(new)], planes[len(new) :] = new, new[-1]


def unrolled(model: Exported, depth: int, sizes: Sequence[int], prompt: Ids64 = IDS) -> F32:
    graph = model.graph(f"unrolled_{depth}", unrolled_graph, depth)
    caches = graph.caches(n_batch=1, n_past=CAPACITY)
    logits = []
    for ids, place in pieces(prompt, sizes):
        end = int(place["n_total"][0])
        positions = np.arange(end - ids.size, end)[None]
        mask = np.ones((1, end), np.int64)
        outputs = graph.run(caches, {"input_ids": ids, "position_ids": positions, "attention_mask": mask})
        logits.append(outputs["logits"][0])
    return np.concatenate(logits)


PRODUCTS = [by_stages, by_scan, by_loop, unrolled]


def damped(config: ModelConfig) -> dict[str, F32]:
    """Random weights whose loop settles, as that of trained ones does."""
    weights = random_weights(config, seed=0)
    if config.injection is Injection.CONCAT_LINEAR:
        weights["injection.state.weight"] *= np.float32(0.7)
    return weights


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Exported, dict[int, F32]]:
    """A model as graphs, and the reference's logits by depth."""
    config = MODELS[request.param]
    weights = damped(config)
    reference, ids = reference_of(config, weights), torch.from_numpy(IDS)[None]
    with torch.no_grad():
        wanted = {depth: reference(ids, depth)[0].numpy() for depth in DEPTHS}
    return Exported(config, weights, tmp_path_factory.mktemp("onnx")), wanted


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("product", PRODUCTS)
def test_logits_are_those_of_the_reference(
    pair: tuple[Exported, dict[int, F32]], product: Callable[..., F32], cut: str
) -> None:
    model, wanted = pair
    for depth, logits in wanted.items():
        np.testing.assert_allclose(product(model, depth, CUTS[cut]), logits, rtol=0, atol=CLOSE)


def test_the_prelude_gives_embeds_and_what_of_them_is_injected(pair: tuple[Exported, dict[int, F32]]) -> None:
    model, _ = pair
    weights, graph = damped(model.config), model.graph("prelude", prelude_graph)
    outputs = graph.run(graph.caches(n_past=CAPACITY), {"ids": IDS[None], "n_total": np.array([len(IDS)], np.int32)})
    with torch.no_grad():
        embeds = reference_of(model.config, weights).embeds(torch.from_numpy(IDS)[None]).numpy()
    np.testing.assert_allclose(outputs["embeds"], embeds, rtol=0, atol=CLOSE)
    mixing = weights.get("injection.embeds.weight", np.eye(model.config.n_embd, dtype=np.float32))
    np.testing.assert_allclose(outputs["injected"], embeds @ mixing.T, rtol=0, atol=CLOSE)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(config=configs(), bits=st.sampled_from(BITS))
def test_every_option_is_what_the_toy_engine_makes_of_it(config: ModelConfig, bits: int) -> None:
    config = replace(config, n_ctx=16)
    weights, ids = random_weights(config, seed=1), np.arange(5) % config.n_vocab
    stored = {name: as_stored(array, bits) for name, array in weights.items()}
    [wanted] = run(ToyEngine(config, stored, Limits(n_ctx=16, kv_depth=2, kv_type=KvType.F32)), ids, [2])
    with TemporaryDirectory() as folder:
        model = Exported(config, weights, Path(folder), bits)
        for product in PRODUCTS:
            np.testing.assert_allclose(product(model, 2, [4, 1], ids), wanted, rtol=0, atol=CLOSE)


def as_stored(array: F32, bits: int) -> F32:
    """A tensor as its stored numbers stand for it."""
    pieces = as_pieces("x", array, 32 if array.ndim == 1 else bits)
    if scales_of("x") in pieces:
        return from_blocks(pieces["x"], pieces[scales_of("x")], array.shape[1], bits)
    return pieces["x"].astype(np.float32)


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("kind", ["huginn", "retrofit_llama"])
def test_weights_of_fewer_bits_mean_what_they_say(kind: str, bits: int, tmp_path: Path) -> None:
    weights = damped(MODELS[kind])
    reference = reference_of(MODELS[kind], {name: as_stored(array, bits) for name, array in weights.items()})
    with torch.no_grad():
        wanted = reference(torch.from_numpy(IDS)[None], 4)[0].numpy()
    model = Exported(MODELS[kind], weights, tmp_path, bits)
    for product in PRODUCTS:
        np.testing.assert_allclose(product(model, 4, [8, 1]), wanted, rtol=0, atol=CLOSE)


def test_stages_may_differ_in_bits(tmp_path: Path) -> None:
    config, weights = MODELS["retrofit_llama"], damped(MODELS["retrofit_llama"])
    bits = choose_bits(config, 4, core_bits=8)
    reference = reference_of(config, {name: as_stored(array, bits.get(name, 32)) for name, array in weights.items()})
    with torch.no_grad():
        wanted = reference(torch.from_numpy(IDS)[None], 4)[0].numpy()
    model = Exported(config, weights, tmp_path, bits)
    for product in PRODUCTS:
        np.testing.assert_allclose(product(model, 4, [8, 1]), wanted, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("kind", ["huginn", "injects once"])
def test_the_loop_ends_after_the_pass_whose_change_is_small_enough(kind: str, tmp_path: Path) -> None:
    model = Exported(MODELS[kind], damped(MODELS[kind]), tmp_path)
    changes = list(changes_by_pass(model, 8))
    graph = model.graph("looped_exit", looped_exit_graph)
    for r, threshold in enumerate(changes):
        limits = {"threshold": np.array(threshold * 1.0001, np.float32), "max_passes": np.array(8)}
        inputs = {**whole_inputs(model.config, IDS[None]), "n_total": np.array([len(IDS)], np.int32), **limits}
        outputs = graph.run(graph.caches(n_past=CAPACITY, n_planes=8), inputs)
        first = next(i for i, change in enumerate(changes) if change <= threshold)
        assert outputs["n_passes"] == [first + 1]
        assert first <= r


def changes_by_pass(model: Exported, depth: int) -> Iterator[float]:
    """The change that the pass graph tells, checked against the states themselves."""
    prelude, core = model.graph("prelude", prelude_graph), model.graph("pass", pass_graph)
    place = {"n_total": np.array([len(IDS)], np.int32)}
    injected = prelude.run(prelude.caches(n_past=CAPACITY), {"ids": IDS[None], **place})["injected"]
    state = np.zeros_like(injected)
    for r in range(depth):
        fed = injected if r == 0 or model.config.injection is not Injection.NONE else np.zeros_like(injected)
        outputs = core.run(core.caches(n_past=CAPACITY), {"state": state, "injected": fed, **place})
        before, state = state, outputs["next_state"]
        moved, size = np.linalg.norm(state - before, axis=-1), np.linalg.norm(state, axis=-1)
        np.testing.assert_allclose(outputs["change"], np.mean(moved / size), rtol=1e-5)
        yield float(outputs["change"])


@pytest.mark.parametrize("kind", ["huginn", "heads of 2"])
def test_tokens_may_run_as_many_passes_each_as_they_like(kind: str, tmp_path: Path) -> None:
    config, depths = MODELS[kind], [3, 1, 5, 2, 5]
    engine = ToyEngine(config, damped(config), Limits(n_ctx=CAPACITY, kv_depth=5, kv_type=KvType.F32))
    tokens, wanted = greedy(engine, IDS.tolist(), depths)
    model = Exported(config, damped(config), tmp_path)
    graph = model.graph("looped_exit", looped_exit_graph)
    caches, prompt = graph.caches(n_past=CAPACITY, n_planes=5), np.array([*IDS, *tokens[:-1]])
    for (ids, place), depth, logits in zip(pieces(prompt, [len(IDS), 1, 1, 1, 1]), depths, wanted, strict=True):
        limits = {"threshold": np.array(0, np.float32), "max_passes": np.array(depth)}
        outputs = graph.run(caches, {**whole_inputs(config, ids), **place, **limits})
        keep(caches, outputs, int(place["n_total"][0]))
        np.testing.assert_allclose(outputs["logits"][-1], logits, rtol=0, atol=CLOSE)


def test_caches_may_grow_instead_of_being_written_in_place(tmp_path: Path) -> None:
    config = MODELS["huginn"]
    model = Exported(config, damped(config), tmp_path)
    graph = model.graph("looped", looped_graph)
    caches = {name: value.numpy() for name, value in graph.caches(n_past=0, n_passes=3).items()}
    logits = []
    for ids, place in pieces(IDS, [4, 1, 4]):
        found, caches = graph.grow(caches, {**whole_inputs(config, ids), **place})
        logits.append(found)
    np.testing.assert_array_equal(np.concatenate(logits), by_scan(model, 3, [4, 1, 4]))


@pytest.mark.parametrize("head_dim", range(2, 34, 2))
def test_the_attention_takes_heads_of_the_width_they_are_padded_to_and_no_others(head_dim: int) -> None:
    config = replace(MODELS["retrofit_llama"], head_dim=head_dim)
    assert attends(kv_head_dim(config))
    assert attends(head_dim) == (kv_head_dim(config) == head_dim)


def attends(head_dim: int) -> bool:
    """Whether ONNX Runtime runs its attention on heads of this width."""
    vectors = {name: np.ones((1, 1, head_dim), np.float32) for name in ("q", "k", "v")}
    past = {name: np.ones((1, 1, 4, head_dim), np.float32) for name in ("past_k", "past_v")}
    place = {"last": np.array([0], np.int32), "total": np.array([1], np.int32)}
    inputs = {**vectors, **past, **place}
    node = helper.make_node(
        "GroupQueryAttention", list(inputs), ["o", "k2", "v2"], domain="com.microsoft", num_heads=1, kv_num_heads=1
    )
    declared = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in inputs.items()
    ]
    wanted = [helper.make_empty_tensor_value_info(name) for name in node.output]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(
        helper.make_graph([node], "attention", declared, wanted), opset_imports=opsets, ir_version=10
    )
    options = SessionOptions()
    options.log_severity_level = 4
    session = InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    try:
        session.run(["o"], inputs)
    except InvalidArgument:
        return False
    return True
