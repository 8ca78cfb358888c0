"""Muon for the matrices inside the model, AdamW for embeddings, head, norms and biases."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["Optimizers"]

_OUTER = ("token_embd.", "output.")  # a row per token: orthogonalising mixes rows that never meet


class Optimizers:
    """The two optimisers as one.

    Source: Jordan et al. 2024 (Muon); learning rates on AdamW's scale by Liu et al. 2025, arXiv:2502.16982.
    """

    def __init__(self, model: nn.Module, muon_lr: float, adamw_lr: float, weight_decay: float) -> None:
        named = list(model.named_parameters())
        inner = [p for name, p in named if p.ndim == 2 and not name.startswith(_OUTER)]
        rest = [p for name, p in named if p.ndim != 2 or name.startswith(_OUTER)]
        self._all: dict[str, tuple[torch.optim.Optimizer, float]] = {
            "adamw": (torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0), adamw_lr)
        }
        if inner:
            muon = torch.optim.Muon(inner, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            self._all["muon"] = (muon, muon_lr)

    def step(self, lr_factor: float) -> None:
        """Apply the gradients at ``lr_factor`` times the learning rates and clear them."""
        for optimizer, lr in self._all.values():
            for group in optimizer.param_groups:
                group["lr"] = lr * lr_factor
            optimizer.step()
            optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {name: optimizer.state_dict() for name, (optimizer, _) in self._all.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state``."""
        for name, (optimizer, _) in self._all.items():
            optimizer.load_state_dict(state[name])
