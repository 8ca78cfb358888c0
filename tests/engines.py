"""Makes engines of every kind from the same weights, and runs them in the ways the parity tests compare."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from localdepth.config import ModelConfig
from localdepth.engine.base import F32, Engine, KvType, Limits
from localdepth.engine.ggml.engine import GgmlEngine
from localdepth.engine.ggml.quantize import quantize
from localdepth.engine.onnx.engine import OnnxEngine
from localdepth.engine.toy import ToyEngine
from localdepth.gguf import read
from localdepth.loop import forward
from localdepth.onnx_folder.folder import read as read_folder
from localdepth.onnx_folder.layout import Layout
from localdepth.policy.base import Decision
from localdepth.quant import Quant
from localdepth.record import Provenance, TokenizerRecord
from localdepth_export.gguf_writer import write
from localdepth_export.onnx_graphs import folder as onnx_folder
from localdepth_export.onnx_graphs.source import Source
from localdepth_export.onnx_graphs.weights import as_pieces
from localdepth_train.reference import ReferenceModel
from localdepth_train.reference_engine import ReferenceEngine

__all__ = ["KINDS", "fixed", "greedy", "make", "reference_of", "run", "write_folder", "write_model"]

KINDS = ("reference", "toy", "ggml", "onnx")


def reference_of(config: ModelConfig, weights: Mapping[str, F32]) -> ReferenceModel:
    """The torch model with these weights."""
    model = ReferenceModel(config)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    return model.eval()


def write_model(
    path: Path,
    config: ModelConfig,
    weights: Mapping[str, F32],
    quant: Quant = Quant.F32,
    tokenizer: TokenizerRecord | None = None,
    provenance: Provenance | None = None,
) -> Path:
    """A GGUF file; tensors that cannot hold ``quant`` are float32."""
    quants = {name: quant if quant.fits(shape) else Quant.F32 for name, shape in config.tensors().items()}
    stored = ((name, quantize(weights[name], quants[name])) for name in quants)
    write(path, config, quants, stored, tokenizer=tokenizer, provenance=provenance)
    return path


def write_folder(
    path: Path,
    config: ModelConfig,
    weights: Mapping[str, F32],
    bits: int = 32,
    tokenizer: TokenizerRecord | None = None,
    depth: int = 1,
) -> Path:
    """A folder of ONNX graphs."""
    layout = Layout(config, bits)
    onnx_folder.write_folder(
        Source(
            kind="test",
            config=config,
            layout=layout,
            encode=lambda name: as_pieces(name, weights[name], layout.bits[name]),
            tokenizer=tokenizer,
            files={"tokenizer.json": tokenizer.json.encode()} if tokenizer else {},
            provenance={"source": "test"},
        ),
        path,
        depth,
    )
    return path


def make(kind: str, config: ModelConfig, weights: Mapping[str, F32], folder: Path, **limits: object) -> Engine:
    """An engine of ``kind``; a float32 cache and one thread unless told otherwise."""
    settings = {"n_ctx": min(config.n_ctx, 64), "kv_depth": 64, "kv_type": KvType.F32, **limits}
    made = Limits(**settings)  # type: ignore[arg-type]  # tests pass what Limits takes
    if kind == "reference":
        return ReferenceEngine(reference_of(config, weights), made)
    if kind == "toy":
        return ToyEngine(config, weights, made)
    if kind == "onnx":
        with read_folder(write_folder(folder / "model", config, weights)) as opened:
            return OnnxEngine(opened, made)
    with read(write_model(folder / "model.gguf", config, weights)) as file:
        return GgmlEngine(file, made)


def fixed(depth: int) -> Decision:
    """The same depth for every position."""
    return Decision(floor=depth, ceiling=depth, chosen_by="test", reason="fixed")


def run(
    engine: Engine, ids: Sequence[int] | NDArray[np.int64], depths: Sequence[int], state: F32 | None = None
) -> list[F32]:
    """Logits of all positions of one prompt at each depth, each from a fresh cache."""
    results = []
    for depth in depths:
        kv = engine.open(depth)
        results.append(forward(engine, kv, np.array(ids, np.int32), fixed(depth), "all", state)[0])
        kv.close()
    return results


def greedy(
    engine: Engine, prompt: Sequence[int], depths: Sequence[int], states: Sequence[F32 | None] | None = None
) -> tuple[list[int], F32]:
    """Greedy tokens and the logits [n, n_vocab] that chose them; call i of the model runs ``depths[i]`` passes."""
    kv = engine.open(max(depths))
    new, tokens, rows = list(prompt), [], []
    for i, depth in enumerate(depths):
        state = None if states is None else states[i]
        logits, _ = forward(engine, kv, np.array(new, np.int32), fixed(depth), state=state)
        rows.append(logits[0])
        new = [int(logits[0].argmax())]
        tokens += new
    kv.close()
    return tokens, np.array(rows)
