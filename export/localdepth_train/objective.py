"""The training objective: truncated backpropagation through depth, cross entropy on labelled positions.

Shapes: B batch, T tokens, E n_embd, V n_vocab, N labelled positions.
"""

import torch
from torch import Tensor
from torch.nn import functional

from localdepth_train.reference import ReferenceModel

__all__ = ["IGNORED", "decode", "labelled_logits", "loss", "right_rows", "state_after"]

IGNORED = -100  # label of a position that teaches nothing


def state_after(model: ReferenceModel, ids: Tensor, n_nograd: int, k_grad: int, state: Tensor | None = None) -> Tensor:
    """State [B,T,E] after ``n_nograd`` passes without gradient and ``k_grad`` with, from ``state`` or zeros.

    Gradient reaches the prelude only through the embeds that the last ``k_grad`` passes inject.
    Source: Geiping et al. 2025, arXiv:2502.05171, section 3.3.
    """
    e = model.embeds(ids)
    s = torch.zeros_like(e) if state is None else state
    with torch.no_grad():
        for r in range(n_nograd):
            s = model.core_pass(s, e, r)
    for r in range(n_nograd, n_nograd + k_grad):
        s = model.core_pass(s, e, r)
    return s


def labelled_logits(
    model: ReferenceModel, ids: Tensor, labels: Tensor, n_nograd: int, k_grad: int, state: Tensor | None = None
) -> Tensor:
    """Logits [N,V] of the positions of ids [B,T] whose label is not ``IGNORED``, in reading order."""
    return decode(model, state_after(model, ids, n_nograd, k_grad, state), labels)


def decode(model: ReferenceModel, s: Tensor, labels: Tensor) -> Tensor:
    """Logits [N,V] of the labelled positions of state s [B,T,E]."""
    shown = labels != IGNORED
    if model.config.n_coda:
        return model.logits(s)[shown]
    return model.logits(s[shown][None])[0]  # without a coda positions do not meet: decode only the labelled ones


def loss(
    model: ReferenceModel, ids: Tensor, labels: Tensor, n_nograd: int, k_grad: int, state: Tensor | None = None
) -> Tensor:
    """Mean cross entropy over the labels that are not ``IGNORED``.

    Args:
        ids: [B,T] tokens.
        labels: [B,T] what each position should predict, already shifted.
        n_nograd: passes without gradient.
        k_grad: passes with gradient, after those.
        state: initial state [B,T,E]; zeros if None.
    """
    logits = labelled_logits(model, ids, labels, n_nograd, k_grad, state)
    return functional.cross_entropy(logits.float(), labels[labels != IGNORED])


def right_rows(logits: Tensor, labels: Tensor) -> Tensor:
    """Which rows of labels [B,T] have the likeliest token right at every labelled position: [B] bool.

    ``logits`` [N,V] as ``labelled_logits`` gives them.
    """
    shown = labels != IGNORED
    right = ~shown
    right[shown] = logits.argmax(-1) == labels[shown]
    return right.all(-1)
