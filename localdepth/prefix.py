"""The sequence a model ran last is kept, so that going on with it, or asking it again deeper, starts from there.

Keys and values of the prelude and of passes below d are the same whatever the final depth, so a kept prefix serves
the same depth or a deeper one; the coda's are not, so a shallower request starts over. Three cases reuse positions:

* the same prompt again: all of it, deeper or not, bit for bit as if it had started there;
* a longer prompt that begins with the one before, as the next turn of a conversation does: all that they share, equal
  up to the rounding of products with another number of rows;
* a prompt that shares less: whole chunks of prefill, bit for bit.

Under a ring older passes are overwritten, so only the first case applies.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import numpy as np

from localdepth.engine.base import F32, Engine, Kv, Span, initial_state
from localdepth.errors import OutOfMemory
from localdepth.loop import forward, resume
from localdepth.policy.base import Decision

__all__ = ["Prefix", "PrefixCache"]

Observer = Callable[[Span], None]


@dataclass(slots=True)
class Prefix:
    """A cache with the tokens in it.

    Attributes:
        kv: their keys and values.
        ids: tokens of its committed positions.
        n_prompt: leading positions that a prefill from the start would have computed in the same chunks.
        n_asked: length of the prompt that was read last.
        state_seed: what their initial states were drawn from.
    """

    kv: Kv
    ids: list[int] = field(default_factory=list)
    n_prompt: int = 0
    n_asked: int = 0
    state_seed: int | None = None

    @property
    def depth(self) -> int:
        """Depth of its first position, 0 while it is empty."""
        return self.kv.depths[0] if self.ids else 0

    def truncate(self, n: int) -> None:
        """Forget all positions from n on."""
        del self.ids[n:]
        self.kv.truncate(n)
        self.n_prompt = min(self.n_prompt, n)

    def begin(
        self, engine: Engine, ids: Sequence[int], decision: Decision, observe: Observer | None = None
    ) -> tuple[F32, int]:
        """Logits after a prompt that begins with this prefix, [n_vocab], and the depth they took."""
        n = len(self.ids)
        in_whole_chunks = n <= self.n_prompt and n % engine.limits.n_batch == 0
        if n and (self.depth < decision.ceiling or n == len(ids)):
            logits, depth = resume(engine, self.kv, decision)
        if n < len(ids):
            logits, depth = self._forward(engine, ids[n:], decision, None, observe)
        if in_whole_chunks:
            self.n_prompt = len(ids)
        self.n_asked = len(ids)
        return logits[0], depth

    def extend(
        self, engine: Engine, token: int, decision: Decision, state: F32 | None = None, observe: Observer | None = None
    ) -> tuple[F32, int]:
        """Logits after one more token, [n_vocab], and its depth; ``state`` is s_0, [1, n_embd], None draws it."""
        logits, depth = self._forward(engine, [token], decision, state, observe)
        return logits[0], depth

    def _forward(
        self,
        engine: Engine,
        new: Sequence[int],
        decision: Decision,
        state: F32 | None,
        observe: Observer | None,
    ) -> tuple[F32, int]:
        if state is None:
            state = initial_state(engine.config, len(self.ids), len(new), self.state_seed)
        done = forward(engine, self.kv, np.array(new, np.int32), decision, state=state, observe=observe)
        self.ids += new
        return done


class PrefixCache:
    """Keeps at most one sequence that nobody uses at the moment. Driven by the thread that drives the engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._kept: Prefix | None = None

    def open(self, max_depth: int) -> Kv:
        """An empty cache; what is kept makes room for it where there is none.

        Raises: as ``Engine.open``.
        """
        try:
            return self._engine.open(max_depth)
        except OutOfMemory:
            if self._kept is None:
                raise
        self.clear()
        return self._engine.open(max_depth)

    def fresh(self, state_seed: int | None, decision: Decision) -> Prefix:
        """An empty prefix.

        Raises: as ``Engine.open``.
        """
        return Prefix(self.open(decision.ceiling), state_seed=state_seed)

    def take(self, ids: tuple[int, ...], state_seed: int | None, decision: Decision) -> Prefix:
        """A prefix of ``ids`` to go on from, as long as the kept sequence allows; empty otherwise.

        Raises: DepthError beyond what the engine was loaded for; OutOfMemory, and the kept sequence stays.
        """
        kept = self._kept
        if kept is not None:
            n = self._usable(kept, ids, state_seed, decision)
            # deeper planes of an earlier request would only cost copies
            if n or kept.kv.max_depth <= decision.ceiling:
                kept.kv.allow(decision.ceiling)
                self._kept = None
                kept.truncate(n)
                kept.state_seed = state_seed
                return kept
            self.clear()
        return self.fresh(state_seed, decision)

    def keep(self, prefix: Prefix) -> None:
        """Hold on to a sequence that ended well, in place of the one held so far."""
        self.clear()
        self._kept = prefix

    def clear(self) -> None:
        """Let go of what is held."""
        kept, self._kept = self._kept, None  # forgotten first: an interrupt in between must not leave a closed one
        if kept is not None:
            kept.kv.close()

    def _usable(self, kept: Prefix, ids: tuple[int, ...], state_seed: int | None, decision: Decision) -> int:
        """How many leading positions of ``ids`` need not be computed again."""
        fixed = decision.floor == decision.ceiling
        # an exit wants to look after every pass from the floor on
        deep_enough = kept.depth <= decision.ceiling if fixed else kept.depth < decision.floor
        if not kept.ids or kept.state_seed != state_seed or not deep_enough:
            return 0
        pairs = zip(kept.ids, ids, kept.kv.depths, strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1] and pair[2] == kept.depth, pairs))
        own = self._engine.limits.ring is None
        if same == len(ids) and (same == kept.n_prompt or (own and same == kept.n_asked)):
            return same
        if not own or not fixed:  # the positions of a prompt share one depth, and only the exit knows it
            return 0
        if kept.n_asked <= same < len(ids):
            return same
        n_batch = self._engine.limits.n_batch
        return min(same, kept.n_prompt, len(ids) - 1) // n_batch * n_batch
