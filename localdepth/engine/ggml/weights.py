"""The model's weights as ggml tensors, in the layouts that compute fastest.

The plain layout is the file itself, mapped. Packed layouts are copies that ggml interleaves for its kernels; which
of them serve which products was measured (1024 x 4096, one thread of an AVX-512 machine, µs by rows):

    Q4_0  plain 196 at 1, 6715 at 64      CPU_REPACK 129, 4077     AMX 58 at 1
    Q4_K  plain 144 at 1, 3044 at 64      CPU_REPACK 117, 3977     AMX 84 at 1
    Q5_K  plain 193 at 1                                           AMX 144 at 1
    Q8_0  plain 194 at 1                                           AMX 171 at 1

So Q4_0 is always repacked, and Q4_K is kept twice: packed for few rows, plain for many. AMX layouts serve single
rows only: for more, ggml's tile code kills the process when some compilers built it.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np

from localdepth.config import ModelConfig, RopeScaling
from localdepth.engine.ggml import lib as ggml
from localdepth.engine.ggml.device import Device
from localdepth.engine.ggml.handles import (
    Graph,
    Memory,
    Tensor,
    TensorGroup,
    TensorSpec,
)
from localdepth.engine.ggml.lib import Ggml
from localdepth.gguf import GgufFile
from localdepth.quant import Quant

__all__ = ["PackPlan", "Weights", "map_plain", "matrices", "move", "pack", "plan_packs", "rope_factors"]

_FACTORS = "rope_factors"
_MANY = 1 << 30  # rows
_SUPPORT_ROWS = 2  # of the product that a layout is asked about

_PACKS: tuple[tuple[str, frozenset[Quant], int], ...] = (  # buffer type, quants, most rows it serves; best first
    ("AMX", frozenset({Quant.Q4_0, Quant.Q4_K, Quant.Q5_K, Quant.Q8_0}), 1),
    ("CPU_REPACK", frozenset({Quant.Q4_K}), 7),
    ("CPU_REPACK", frozenset({Quant.Q4_0}), _MANY),
)


@dataclass(frozen=True, slots=True)
class PackPlan:
    """Copies of some matrices in one packed layout, which serve products of up to ``max_rows`` rows."""

    layout: str
    max_rows: int
    names: tuple[str, ...]
    n_bytes: int

    @property
    def serves_all(self) -> bool:
        """Whether the plain layout is not needed beside it."""
        return self.max_rows == _MANY


class Weights:
    """Tensors by canonical name; for a product, the layout that suits its number of rows.

    Args:
        plain: every tensor, in the layout of the file.
        packed: copies with the most rows they serve, fewest first.
    """

    def __init__(self, plain: TensorGroup, packed: Sequence[tuple[int, TensorGroup]] = ()) -> None:
        self._plain, self._packed = plain, packed

    def get(self, name: str) -> Tensor | None:
        """A norm, a bias, or None where the model has none of this name."""
        return self._plain.get(name)

    def for_rows(self, name: str, n: int) -> Tensor:
        """A matrix for a product with n rows."""
        for max_rows, group in self._packed:
            if n <= max_rows and (packed := group.get(name)) is not None:
                return packed
        return self._plain[name]


def matrices(config: ModelConfig) -> dict[str, int]:
    """Every matrix that multiplies, with its number of columns; an embedding only does where the head is tied."""
    shapes = {name: shape for name, shape in config.tensors().items() if len(shape) > 1}
    if not config.tied_head:
        del shapes["token_embd.weight"]
    return {name: shape[1] for name, shape in shapes.items()}


def map_plain(lib: Ggml, file: GgufFile, stack: ExitStack) -> TensorGroup:
    """All tensors of the file where they lie; nothing is read until it is used."""
    memory = Memory(file.mapped(), [info.offset for info in file.tensors.values()])
    return _keep(stack, TensorGroup(lib, _specs(file), memory))


def rope_factors(device: Device, config: ModelConfig, stack: ExitStack) -> Tensor | None:
    """What scales the rotation frequencies, [head_dim / 2]; None where nothing does."""
    if config.rope_scaling is RopeScaling.NONE:
        return None
    group = _keep(stack, TensorGroup(device.lib, {_FACTORS: (ggml.F32, (config.head_dim // 2,))}, device.memory))
    plain = replace(config, rope_scaling=RopeScaling.NONE).rope_frequencies()
    # ggml divides each rotation frequency by its factor
    group.write(_FACTORS, np.asarray(np.array(plain) / np.array(config.rope_frequencies()), np.float32))
    return group[_FACTORS]


def plan_packs(lib: Ggml, file: GgufFile) -> list[PackPlan]:
    """Which matrices to copy into which packed layouts of this CPU, and what that takes."""
    types = lib.extra_buffer_types()
    plans: list[PackPlan] = []
    wanted = matrices(file.config)
    for layout, quants, max_rows in _PACKS:
        if layout not in types:
            continue
        taken = {name for plan in plans for name in plan.names if not plan.serves_all and max_rows < _MANY}
        candidates = [name for name in wanted if file.tensors[name].quant in quants and name not in taken]
        specs = {name: _spec(file, name) for name in candidates}
        by_spec = {spec: _packed_bytes(lib, spec, types[layout]) for spec in set(specs.values())}
        sizes = {name: by_spec[spec] for name, spec in specs.items()}
        names = tuple(name for name, size in sizes.items() if size)
        if names:
            plans.append(PackPlan(layout, max_rows, names, sum(sizes[name] for name in names)))
    return plans


def pack(lib: Ggml, file: GgufFile, plans: Sequence[PackPlan], stack: ExitStack) -> list[tuple[int, TensorGroup]]:
    """Make the copies; of a matrix whose copy serves everything the mapped pages are let go."""
    types = lib.extra_buffer_types()
    groups = []
    for plan in plans:
        specs = {name: _spec(file, name) for name in plan.names}
        group = _keep(stack, TensorGroup(lib, specs, types[plan.layout]))
        group.use_huge_pages()
        for name in plan.names:
            group.write(name, file.data(name))
            if plan.serves_all:
                file.let_go(name)
        groups.append((plan.max_rows, group))
    return groups


def move(device: Device, file: GgufFile, stack: ExitStack) -> TensorGroup:
    """Copy all that multiplies, adds or scales to a device; the embedding goes along only where it is the head too."""
    specs = _specs(file)
    if not file.config.tied_head:
        del specs["token_embd.weight"]
    group = _keep(stack, TensorGroup(device.lib, specs, device.memory))
    group.hold_weights()
    for name in specs:
        group.write(name, file.data(name))
    return group


def _packed_bytes(lib: Ggml, spec: TensorSpec, buffer_type: int) -> int:
    """Bytes of a matrix in a packed layout, 0 where the layout does not take it (setting it would crash)."""
    with ExitStack() as stack:
        group = _keep(stack, TensorGroup(lib, {"weight": spec}, buffer_type))
        rows = _keep(stack, TensorGroup(lib, {"rows": (ggml.F32, (spec[1][0], _SUPPORT_ROWS))}))
        graph = Graph(lib, 4)
        stack.callback(graph.close)
        product = lib.ggml_mul_mat(graph.context, group["weight"], rows["rows"])
        if not lib.ggml_backend_dev_supports_op(lib.cpu_device(), product):
            return 0
        return int(lib.ggml_backend_buft_get_alloc_size(buffer_type, group["weight"]))


def _spec(file: GgufFile, name: str) -> TensorSpec:
    info = file.tensors[name]
    return info.quant.ggml_type, tuple(reversed(info.shape))


def _specs(file: GgufFile) -> dict[str, TensorSpec]:
    return {name: _spec(file, name) for name in file.tensors}


def _keep(stack: ExitStack, group: TensorGroup) -> TensorGroup:
    stack.callback(group.close)
    return group
