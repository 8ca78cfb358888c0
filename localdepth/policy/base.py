"""What a policy is: it looks at a query and decides between which depths its positions run, and why."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from localdepth.errors import DepthError

__all__ = ["Decision", "DepthPolicy", "Exit", "Query", "Seen"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """What a policy may look at.

    Attributes:
        tokens: ids of the prompt, [n].
        text: the prompt as text; empty where the caller passed ids.
        tags: words the caller attached, for rules.
        embedding: computes the pooled prelude output, [n_embd]; nothing is spent until it is called.
    """

    tokens: tuple[int, ...]
    text: str = ""
    tags: tuple[str, ...] = ()
    embedding: Callable[[], npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What an exit may look at after a pass; what it did not ask for is None.

    Attributes:
        change: relative change of the state in this pass.
        logits: of the last position, [n_vocab].
    """

    change: float | None = None
    logits: npt.NDArray[np.float32] | None = None


class Exit(Protocol):
    """Stops between floor and ceiling. ``needs`` names what ``stop`` looks at: "change", "logits"."""

    needs: frozenset[str]

    def stop(self, r: int, seen: Seen) -> bool:
        """True when r passes are enough."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Between ``floor`` and ``ceiling`` passes, by whom and why; ``exit`` may stop in between.

    Raises:
        DepthError: unless 1 <= floor <= ceiling.
    """

    floor: int
    ceiling: int
    chosen_by: str
    reason: str
    exit: Exit | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.floor, int) and isinstance(self.ceiling, int) and 1 <= self.floor <= self.ceiling):
            raise DepthError(
                f"a decision needs 1 <= floor <= ceiling, got {self.floor} and {self.ceiling}; fix the policy"
            )


class DepthPolicy(Protocol):
    """Decides the depth of a query."""

    def decide(self, query: Query) -> Decision:
        """Floor, ceiling and the reason; never outside the model's depth range."""
