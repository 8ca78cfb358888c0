"""One depth for a whole request: a number, or a word that stands for one in this model."""

from dataclasses import dataclass
from typing import cast

from localdepth.config import ModelConfig
from localdepth.errors import DepthError
from localdepth.policy.base import Decision, DepthPolicy, Query

__all__ = ["FixedDepth", "as_policy", "words"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedDepth:
    """Always the same depth."""

    depth: int
    chosen_by: str
    reason: str

    def decide(self, query: Query) -> Decision:
        return Decision(floor=self.depth, ceiling=self.depth, chosen_by=self.chosen_by, reason=self.reason)


def words(config: ModelConfig) -> dict[str, int]:
    """What depth words and effort levels mean for this model."""
    default, top, low = config.default_depth, config.max_depth, config.auto_min_depth
    quick = max(low, default // 4)
    levels = {
        "quick": quick,
        "deep": top,
        "none": low,
        "minimal": quick,
        "low": default // 2,
        "medium": default,
        "high": (default + top) // 2,
        "xhigh": top,
        "max": top,
    }
    return {word: min(max(depth, low), top) for word, depth in levels.items()}


def as_policy(depth: int | str | DepthPolicy, config: ModelConfig) -> DepthPolicy:
    """The policy that a ``depth`` argument stands for.

    Args:
        depth: passes in 1..max_depth, "auto", a word from ``words``, or a policy, which is returned as it is.
    Raises:
        DepthError: outside the range, or an unknown word.
    """
    if isinstance(depth, str):
        return _from_word(depth, config)
    if isinstance(depth, int) or not callable(getattr(depth, "decide", None)):
        passes = config.check_depth(cast(int, depth))
        return FixedDepth(depth=passes, chosen_by="request", reason=f"depth={passes} was asked for")
    return depth


def _from_word(word: str, config: ModelConfig) -> DepthPolicy:
    if word == "auto":
        return FixedDepth(
            depth=config.default_depth,
            chosen_by="default",
            reason="no depth was asked for and this file has no router: its default",
        )
    known = words(config)
    if word not in known:
        raise DepthError(
            f"depth={word!r} is neither a whole number in 1..{config.max_depth} nor one of auto, {', '.join(known)}"
        )
    return FixedDepth(
        depth=known[word], chosen_by="request", reason=f"{word!r} means depth {known[word]} in this model"
    )
