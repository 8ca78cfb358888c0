"""Whether there is room for a model and its caches, judged by plans before anything is taken; and what would fit."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from localdepth.engine.base import Kv, Limits
from localdepth.memory import MemoryPlan, available_bytes, check_fits

__all__ = ["check_room", "free_bytes", "smaller"]

_SMALL = 1 << 27  # bytes that any machine has; asking costs 20 ms
_RING = 4  # planes that a request short of memory is offered
_SHORTEST = 64  # context

Ways = Iterable[Iterable[tuple[str, MemoryPlan]]]


def free_bytes(limits: Limits, wanted: int, ask: Callable[[], int] = available_bytes) -> int:
    """Memory we may take in all; small wishes are granted without asking the system."""
    if limits.memory_limit is not None:
        return limits.memory_limit
    return _SMALL if wanted < _SMALL else ask()


def check_room(
    limits: Limits,
    plan: Callable[[int], MemoryPlan],
    depth: int,
    kv: Kv | None,
    others: Sequence[Kv],
    loaded: int,
    ways: Ways,
    ask: Callable[[], int] = available_bytes,
) -> None:
    """Refuse a cache of this depth, or one that grows to it, where there is no room.

    Args:
        plan: bytes of the model with one sequence of a depth.
        kv: the cache that grows; None for a new one.
        others: caches that are open besides.
        loaded: bytes of the model that are taken already.
        ways: to need less, as ``check_fits`` takes them.
    Raises: OutOfMemory, saying what would fit.
    """
    wanted = plan(depth)
    planned = sum(plan(other.max_depth).sequence for other in others)
    if limits.memory_limit is None:  # what is written of them is not free any more
        planned -= sum(plan(other.max_depth).sequence * other.n // limits.n_ctx for other in others)
        planned -= plan(kv.max_depth).sequence * kv.n // limits.n_ctx if kv else 0
        planned -= loaded
    check_fits(wanted, free_bytes(limits, wanted.total + planned, ask) - planned, ways)


def smaller(
    limits: Limits,
    depth: int,
    lean: Callable[[int, Limits], MemoryPlan],
    now: Callable[[int], MemoryPlan],
    *,
    loading: bool,
) -> Iterator[Iterator[tuple[str, MemoryPlan]]]:
    """Ways to need less than a sequence of ``depth`` takes, each with its settings, gentlest first.

    Args:
        lean: the plan for a depth, loaded anew with other limits.
        now: the plan for another depth, as loaded.
        loading: name settings of ``load``, not of a request.
    """
    if limits.ring is None and depth > _RING:
        yield iter([(f"ring={_RING} (--ring {_RING})", lean(depth, replace(limits, ring=_RING)))])
    yield _shorter(limits, depth, lean)
    word = "kv_depth={0} (--kv-depth {0})" if loading else "depth={0}"
    yield ((word.format(less), now(less)) for less in range(depth - 1, 0, -1))
    if loading:
        least = replace(limits, n_ctx=min(_SHORTEST, limits.n_ctx))
        yield iter([(f"n_ctx={least.n_ctx} with kv_depth=1", lean(1, least))])


def _shorter(limits: Limits, depth: int, lean: Callable[[int, Limits], MemoryPlan]) -> Iterator[tuple[str, MemoryPlan]]:
    n_ctx = limits.n_ctx // 2
    while n_ctx >= _SHORTEST:
        yield f"n_ctx={n_ctx} (--n-ctx {n_ctx})", lean(depth, replace(limits, n_ctx=n_ctx))
        n_ctx //= 2
