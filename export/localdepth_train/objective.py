"""The training objective: truncated backpropagation through depth, cross entropy on labelled positions.

Shapes: B batch, T tokens, E n_embd, V n_vocab, N labelled positions.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from localdepth_train.depth_sampler import Passes
from localdepth_train.reference import Attend, ReferenceModel, attention_within, causal_attention
from localdepth_train.text.packing import IGNORED

__all__ = [
    "attends",
    "decode",
    "divergence",
    "loss",
    "right_rows",
    "run_passes",
]


def run_passes(
    model: ReferenceModel,
    ids: Tensor,
    passes: Sequence[Passes],
    state: Tensor | None = None,
    attend: Attend = causal_attention,
    *,
    recompute: bool = False,
    others: Sequence[Passes] = (),
) -> tuple[Tensor, Tensor]:
    """States [B,T,E] half way through the passes with gradient, and after all, from ``state`` or zeros.

    The second is what is trained; gradient reaches the prelude only through the embeds that the passes with gradient
    inject. A sequence that has run its passes waits for the others.

    Args:
        ids: [B,T] tokens.
        passes: of each sequence, [B].
        recompute: compute what is inside a pass again for the backward; only its input is kept.
        others: passes of sequences elsewhere that are waited for as well: processes that share a model keep step.
    Source: Geiping et al. 2025, arXiv:2502.05171, section 3.3.
    """
    e = model.embeds(ids, attend)
    s = torch.zeros_like(e) if state is None else state
    starts, halves, ends = _columns(passes, ids.device)
    everyone = [*passes, *others]
    first, last = min(p.n_nograd for p in everyone), max(p.depth for p in everyone)
    with torch.no_grad():
        for r in range(first):
            s = model.core_pass(s, e, r, attend)
    half = s
    run = partial(checkpoint, model.core_pass, use_reentrant=False) if recompute else model.core_pass
    alike = len(set(everyone)) == 1
    for r in range(first, last):
        new = run(s, e, r, attend)
        s = new if alike else torch.where(r < starts, new.detach(), torch.where(r < ends, new, s))
        half = torch.where(r < halves, s, half)
    return half, s


def _columns(passes: Sequence[Passes], device: torch.device) -> Iterator[Tensor]:
    """Of each sequence the first pass with gradient, the first of their second half, and one past the last: [B,1,1]."""
    for column in zip(*((p.n_nograd, p.depth - p.k_grad // 2, p.depth) for p in passes), strict=True):
        yield torch.tensor(column, device=device)[:, None, None]


def decode(model: ReferenceModel, s: Tensor, labels: Tensor, attend: Attend = causal_attention) -> Tensor:
    """Logits [N,V] of the positions of state s [B,T,E] whose label is not ``IGNORED``, in reading order."""
    shown = labels != IGNORED
    if model.config.n_coda:
        return model.head(model.run_coda(s, attend)[shown])
    return model.head(model.enter_coda(s[shown]))  # positions do not meet: decode only the labelled ones


def loss(
    model: ReferenceModel, ids: Tensor, labels: Tensor, n_nograd: int, k_grad: int, state: Tensor | None = None
) -> Tensor:
    """Mean cross entropy over the labels that are not ``IGNORED``, as published trainers compute it.

    Args:
        ids: [B,T] tokens.
        labels: [B,T] what each position should predict, already shifted.
        n_nograd: passes without gradient.
        k_grad: passes with gradient, after those.
        state: initial state [B,T,E]; zeros if None.
    """
    _, s = run_passes(model, ids, [Passes(n_nograd, k_grad)] * len(ids), state)
    logits = decode(model, s, labels)
    return functional.cross_entropy(logits.float(), labels[labels != IGNORED])


def divergence(logits: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(softmax(target / t) || softmax(logits / t)) * t², summed over rows of [N,V]; no gradient reaches ``target``.

    Source: Hinton et al. 2015, arXiv:1503.02531.
    """
    wanted = functional.log_softmax(target.detach().float() / temperature, -1)
    given = functional.log_softmax(logits.float() / temperature, -1)
    return functional.kl_div(given, wanted, reduction="sum", log_target=True) * temperature**2


def right_rows(logits: Tensor, labels: Tensor) -> Tensor:
    """Which rows of labels [B,T] have the likeliest token right at every labelled position: [B] bool.

    ``logits`` [N,V] as ``decode`` gives them.
    """
    shown = labels != IGNORED
    right = ~shown
    right[shown] = logits.argmax(-1) == labels[shown]
    return right.all(-1)


def attends(documents: Tensor | None) -> Attend:
    """Attention of packed rows: within each document where ``documents`` [B,T] numbers them, else over all."""
    return causal_attention if documents is None else attention_within(documents)
