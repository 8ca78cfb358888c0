"""The tensors that outlive the graphs: weights in place, token ids, positions, mask and logits."""

from contextlib import ExitStack
from dataclasses import dataclass

from localdepth.config import ModelConfig
from localdepth.engine.base import KvType, Limits
from localdepth.engine.ggml import lib as ggml
from localdepth.engine.ggml.device import Device
from localdepth.engine.ggml.handles import Tensor, TensorGroup, TensorSpec
from localdepth.engine.ggml.weights import Weights, matrices, rope_factors

__all__ = ["HEAD_ROWS", "Parts", "io_bytes", "make_parts", "n_rows"]

HEAD_ROWS = 32  # logits computed at a time when all rows are wanted


@dataclass(frozen=True, slots=True)
class Parts:
    """What graphs are built over.

    Attributes:
        weights: by canonical name.
        embedding: what token vectors are read from, on the CPU.
        rope_factors: [head_dim / 2], where the model scales its rotation.
        tokens: ``tokens``, [n_batch] ids, on the CPU.
        io: ``positions``, ``rows``, ``mask`` and ``logits``, written or read between graphs.
        kv_bytes: size of one element of the K/V planes.
        sums: by weight, [n_in]: every product adds the squares of its inputs here; None costs nothing.
    """

    weights: Weights
    embedding: Tensor
    rope_factors: Tensor | None
    tokens: TensorGroup
    io: TensorGroup
    kv_bytes: int
    sums: TensorGroup | None = None


def make_parts(
    device: Device,
    config: ModelConfig,
    limits: Limits,
    weights: Weights,
    embedding: Tensor,
    stack: ExitStack,
    importance: bool = False,
) -> Parts:
    """Everything but the weights, allocated on ``device`` and freed with ``stack``."""
    n = n_rows(limits)

    def group(specs: dict[str, TensorSpec], place: int | None) -> TensorGroup:
        made = TensorGroup(device.lib, specs, place)
        stack.callback(made.close)
        return made

    io = {
        "positions": (ggml.I32, (n,)),
        "rows": (ggml.I64, (n,)),  # where new keys and values go
        "mask": (ggml.F16, (limits.n_ctx * n,)),
        "logits": (ggml.F32, (config.n_vocab, HEAD_ROWS)),
    }
    sums = None
    if importance:
        sums = group({name: (ggml.F32, (n_in,)) for name, n_in in matrices(config).items()}, device.memory)
        sums.clear()
    return Parts(
        weights=weights,
        embedding=embedding,
        rope_factors=rope_factors(device, config, stack),
        tokens=group({"tokens": (ggml.I32, (n,))}, None),
        io=group(io, device.memory),
        kv_bytes=4 if limits.kv_type is KvType.F32 else 2,
        sums=sums,
    )


def n_rows(limits: Limits) -> int:
    """Most rows a graph computes."""
    return min(limits.n_batch, limits.n_ctx)


def io_bytes(config: ModelConfig, limits: Limits) -> int:
    """Bytes of mask, positions and logits."""
    return n_rows(limits) * (2 * limits.n_ctx + 16) + 4 * config.n_vocab * HEAD_ROWS
