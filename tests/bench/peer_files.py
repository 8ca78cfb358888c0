"""The same looped model in the three forms that are compared, weight for weight.

- ours: the core once, ``injection`` none, so that with s_0 = 0 the arithmetic is that of plain layers;
- ``llama``: the layers unrolled, each with its own copy of the weights, as stock llama.cpp runs any plain model;
- ``nanbeige``: llama.cpp's own looped architecture, which has neither prelude nor coda nor a depth per request.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGUFWriter

from localdepth.config import STAGES, Injection, ModelConfig, RopeStyle
from localdepth.quant import Quant
from localdepth_export.gguf_writer import write

__all__ = ["model", "write_nanbeige", "write_ours", "write_unrolled"]

Weights = Mapping[str, npt.NDArray[np.uint8]]  # stored bytes by canonical name


def model(n_embd: int, n_ff: int, n_layers: tuple[int, int, int], n_vocab: int, n_ctx: int) -> ModelConfig:
    """A Llama-like model that stock llama.cpp can run unrolled; ``n_layers`` are prelude, core, coda."""
    n_prelude, n_core, n_coda = n_layers
    return ModelConfig(
        n_prelude=n_prelude,
        n_core=n_core,
        n_coda=n_coda,
        n_embd=n_embd,
        n_head=n_embd // 64,
        n_head_kv=n_embd // 128,
        head_dim=64,
        n_ff=n_ff,
        n_vocab=n_vocab,
        n_ctx=n_ctx,
        norm_eps=1e-5,
        injection=Injection.NONE,
        rope_style=RopeStyle.INTERLEAVED,
        default_depth=1,
        max_depth=64,
    )


def write_ours(path: Path, config: ModelConfig, quants: Mapping[str, Quant], weights: Weights) -> Path:
    """Our own format."""
    write(path, config, quants, weights.items())
    return path


def write_unrolled(path: Path, config: ModelConfig, quants: Mapping[str, Quant], weights: Weights, depth: int) -> Path:
    """Architecture ``llama`` with n_prelude + depth * n_core + n_coda layers."""
    repeats = {"prelude": 1, "core": depth, "coda": 1}
    layers = [f"{s}.{i}" for s in STAGES for _ in range(repeats[s]) for i in range(config.n_layer(s))]
    _write(GGUFWriter(path, "llama"), config, quants, weights, layers)
    return path


def write_nanbeige(path: Path, config: ModelConfig, quants: Mapping[str, Quant], weights: Weights, depth: int) -> Path:
    """Architecture ``nanbeige``: the core, looped ``depth`` times."""
    assert config.n_prelude == config.n_coda == 0, "nanbeige loops all its layers"
    writer = GGUFWriter(path, "nanbeige")
    writer.add_uint32("nanbeige.num_loops", depth)
    writer.add_bool("nanbeige.skip_loop_final_norm", True)
    _write(writer, config, quants, weights, [f"core.{i}" for i in range(config.n_core)])
    return path


def _write(
    writer: GGUFWriter, config: ModelConfig, quants: Mapping[str, Quant], weights: Weights, layers: list[str]
) -> None:
    writer.add_context_length(config.n_ctx)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(len(layers))
    writer.add_feed_forward_length(config.n_ff)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_head_kv)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.n_vocab)
    shapes = config.tensors()
    for name, source in _names(config, layers):
        shape, quant = shapes[source], quants[source]
        rows = weights[source].reshape(math.prod(shape[:-1]), -1)
        writer.add_tensor(
            name,
            rows.view(np.float32) if quant is Quant.F32 else rows,
            raw_shape=shape if quant is Quant.F32 else rows.shape,
            raw_dtype=quant.ggml_type,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _names(config: ModelConfig, layers: list[str]) -> Iterator[tuple[str, str]]:
    """llama.cpp's name and ours of each tensor; beyond the prefix of a layer they are the same."""
    for name in config.tensors():
        if not name.startswith(STAGES):
            yield name, name
    for index, layer in enumerate(layers):
        for name in config.tensors():
            if name.startswith(f"{layer}."):
                yield f"blk.{index}.{name.removeprefix(f'{layer}.')}", name
