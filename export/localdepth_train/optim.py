"""Muon for the matrices inside the model, AdamW for embeddings, head, norms and biases; or AdamW for all."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from localdepth_train.team import WHOLE

__all__ = ["Optimizers"]

_OUTER = ("token_embd.", "output.")  # a row per token: orthogonalising mixes rows that never meet


class Optimizers:
    """The two optimisers as one.

    Weight decay is for the matrices inside; a ``muon_lr`` of 0 leaves them to AdamW.
    Source: Jordan et al. 2024 (Muon); learning rates on AdamW's scale by Liu et al. 2025, arXiv:2502.16982.
    """

    def __init__(self, model: nn.Module, muon_lr: float, adamw_lr: float, weight_decay: float) -> None:
        self._model = model
        named = list(model.named_parameters())
        inner = [p for name, p in named if p.ndim == 2 and not name.startswith(_OUTER)]
        rest = [p for name, p in named if p.ndim != 2 or name.startswith(_OUTER)]
        groups = [{"params": rest, "weight_decay": 0.0}]
        if not muon_lr:
            groups.append({"params": inner, "weight_decay": weight_decay})
        adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95))
        self._all: list[tuple[torch.optim.Optimizer, float]] = [(adamw, adamw_lr)]
        if inner and muon_lr:
            muon = torch.optim.Muon(inner, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            self._all.append((muon, muon_lr))

    def step(self, lr_factor: float) -> None:
        """Apply the gradients at ``lr_factor`` times the learning rates and clear them."""
        for optimizer, lr in self._all:
            for group in optimizer.param_groups:
                group["lr"] = lr * lr_factor
            optimizer.step()
            optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, by parameter name."""
        return get_optimizer_state_dict(self._model, self._optimizers, options=WHOLE)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state``."""
        set_optimizer_state_dict(self._model, self._optimizers, dict(state), options=WHOLE)

    @property
    def _optimizers(self) -> list[torch.optim.Optimizer]:
        return [optimizer for optimizer, _ in self._all]
