"""The reference model behind the engine seam: what ``verify`` and the parity tests compare other engines with."""

from functools import cached_property
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from localdepth.config import STAGES
from localdepth.engine.base import F32, Ids, KvType, Limits
from localdepth.engine.eager import Attend, EagerEngine
from localdepth_train.checkpoint import Checkpoint
from localdepth_train.reference import Block, ReferenceModel, Rotation

__all__ = ["ReferenceEngine", "load_reference"]


def load_reference(checkpoint: Checkpoint) -> ReferenceModel:
    """The checkpoint's weights in a float32 reference model, in evaluation mode."""
    with torch.device("meta"):
        model = ReferenceModel(checkpoint.config)
    state = {name: torch.from_numpy(checkpoint.read(name)) for name in checkpoint.config.tensors()}
    model.load_state_dict(state, assign=True)
    return model.eval()


class ReferenceEngine(EagerEngine):
    """Torch arithmetic in float32 over the shared plain cache."""

    def __init__(self, model: ReferenceModel, limits: Limits) -> None:
        super().__init__(model.config, limits)
        self.model = model

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, *, n_ctx: int | None = None, ring: int | None = None) -> Self:
        """Load ``checkpoint`` with a float32 cache."""
        config = checkpoint.config
        limits = Limits(n_ctx=n_ctx or config.n_ctx, kv_depth=config.measure_depth, ring=ring, kv_type=KvType.F32)
        return cls(load_reference(checkpoint), limits)

    @cached_property
    def _blocks(self) -> dict[tuple[str, int], Block]:
        return {
            (stage, i): block
            for stage in STAGES
            for i, block in enumerate(self.model.get_submodule(stage).children())
            if isinstance(block, Block)
        }

    @torch.inference_mode()
    def embed(self, ids: Ids) -> F32:
        return self._out(self.model.embed(torch.from_numpy(ids.astype(np.int64))))

    @torch.inference_mode()
    def block(self, stage: str, layer: int, x: F32, start: int, attend: Attend) -> F32:
        rotation = Rotation(self.config, start, len(x))

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # each [1, H, n, D]
            new = (t[0].transpose(0, 1).contiguous().numpy() for t in (k, v))
            keys, values = (torch.from_numpy(a).transpose(0, 1)[None] for a in attend(*new))
            positions = torch.arange(start, start + len(x))
            mask = torch.arange(keys.shape[2]) <= positions[:, None]
            return functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)

        return self._out(self._blocks[stage, layer](self._in(x), rotation, attention))

    @torch.inference_mode()
    def inject(self, s: F32, e: F32, r: int) -> F32:
        return self._out(self.model.inject(self._in(s), self._in(e), r))

    @torch.inference_mode()
    def enter_coda(self, s: F32) -> F32:
        return self._out(self.model.enter_coda(self._in(s)))

    @torch.inference_mode()
    def head(self, x: F32) -> F32:
        return self._out(self.model.head(self._in(x)))

    @staticmethod
    def _in(x: F32) -> Tensor:
        return torch.from_numpy(x)[None]  # [n, E] -> [1, n, E]

    @staticmethod
    def _out(x: Tensor) -> F32:
        array: F32 = x.reshape(-1, x.shape[-1]).numpy()
        return array
