"""The spine: run the core on a span until its decision is met. The same for every engine."""

from collections.abc import Callable

from localdepth.engine.base import F32, Engine, Ids, Kv, Rows, Span
from localdepth.policy.base import Decision, Seen

__all__ = ["forward", "resume"]


def forward(
    engine: Engine,
    kv: Kv,
    tokens: Ids,
    decision: Decision,
    rows: Rows = "last",
    state: F32 | None = None,
    observe: Callable[[Span], None] | None = None,
) -> tuple[F32, int]:
    """Extend ``kv`` by ``tokens`` and return their logits with the depth they took.

    Args:
        tokens: new ids, [n].
        decision: between which depths, and what may stop earlier than the ceiling.
        rows: logits of the last position, or of all.
        state: s_0, [n, n_embd]; None is zeros.
        observe: called after every pass, for callers that want the states.
    Returns:
        logits [1, n_vocab] or [n, n_vocab], and the passes run.
    """
    [span] = engine.prelude([(kv, tokens)], [state])
    return _refine(engine, span, decision, rows, observe)


def resume(engine: Engine, kv: Kv, decision: Decision) -> tuple[F32, int]:
    """Take all positions of ``kv`` on from the depth they ran to the decision's, running only the missing passes.

    Returns:
        logits of the last position, [1, n_vocab], and its depth.
    """
    [span] = engine.reopen([kv])
    return _refine(engine, span, decision, "last", None)


def _refine(
    engine: Engine, span: Span, decision: Decision, rows: Rows, observe: Callable[[Span], None] | None
) -> tuple[F32, int]:
    try:
        while span.r < decision.ceiling:
            engine.core([span], 1 if observe else _unwatched(span, decision))
            if observe:
                observe(span)
            if _due(span, decision) and decision.exit and decision.exit.stop(span.r, _seen(engine, span, decision)):
                break
        [logits] = engine.coda([span], rows)
    except BaseException:
        engine.drop([span])
        raise
    engine.commit([span])
    return logits, span.r


def _unwatched(span: Span, decision: Decision) -> int:
    """Passes until somebody looks, at least one."""
    return max(1, (decision.floor if decision.exit else decision.ceiling) - span.r)


def _due(span: Span, decision: Decision) -> bool:
    """Whether stopping now would be allowed and would save a pass."""
    return decision.floor <= span.r < decision.ceiling


def _seen(engine: Engine, span: Span, decision: Decision) -> Seen:
    """What the exit asked for, and nothing more: logits cost a coda."""
    needs = decision.exit.needs if decision.exit else frozenset()
    return Seen(
        change=span.change if "change" in needs else None,
        logits=engine.coda([span])[0][0] if "logits" in needs else None,
    )
