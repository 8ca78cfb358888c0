"""The seam every engine implements. Above it nobody asks which engine runs.

One thread drives an engine. A ``Kv`` caches one sequence; a ``Span`` is a run of consecutive new positions
of one ``Kv`` that stand at the same pass r. All calls take lists of spans; a batch of one is the simple case.
Results never depend on which spans share a call.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from localdepth.config import ModelConfig, StateInit
from localdepth.errors import ConfigError, ContextOverflow, DepthError, PromptError
from localdepth.memory import MemoryPlan
from localdepth.slots import n_planes

__all__ = [
    "F32",
    "Engine",
    "Ids",
    "Kv",
    "KvType",
    "Limits",
    "Rows",
    "Span",
    "check_open",
    "check_pass",
    "check_span",
    "initial_state",
    "n_slots",
    "shorter_or_larger",
]

F32 = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]
Rows = Literal["last", "all"]


class KvType(StrEnum):
    """Element type of the K/V cache."""

    F32 = "f32"
    F16 = "f16"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Machine settings of one loaded model.

    Attributes:
        n_ctx: positions one sequence may hold.
        kv_depth: deepest pass the cache makes room for; planes are allocated on first use.
        ring: None for a plane per pass (OWN), k to share k planes in a ring.
        kv_type: element type of the cache.
        n_batch: positions computed at a time in prefill.
        n_threads: threads of the engine's compute.
        low_memory: no copies of weights in faster layouts.
        memory_limit: bytes that may be taken in all; None takes what the machine has free.
    Raises:
        ConfigError: when a value is out of range.
    """

    n_ctx: int
    kv_depth: int
    ring: int | None = None
    kv_type: KvType = KvType.F16
    n_batch: int = 256
    n_threads: int = 1
    low_memory: bool = False
    memory_limit: int | None = None

    def __post_init__(self) -> None:
        for name in ("n_ctx", "kv_depth", "n_batch", "n_threads", "ring", "memory_limit"):
            value = getattr(self, name)
            if value is None and name in ("ring", "memory_limit"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r} must be a whole number of at least 1")
        if self.n_threads > 512:
            raise ConfigError(f"n_threads={self.n_threads} must not exceed 512")


class Kv(Protocol):
    """Cache of one sequence: ``n`` committed positions; position p ran ``depths[p]`` passes, at most ``max_depth``."""

    @property
    def n(self) -> int: ...
    @property
    def depths(self) -> Sequence[int]: ...
    @property
    def max_depth(self) -> int: ...
    def truncate(self, n: int) -> None:
        """Forget all positions from ``n`` on."""

    def allow(self, max_depth: int) -> None:
        """Let positions run up to ``max_depth`` passes from now on; never fewer than before.

        Raises: as ``Engine.open``.
        """

    def fork(self, n: int) -> "Kv":
        """A new cache that starts with a copy of the first ``n`` positions."""

    def close(self) -> None:
        """Release the memory; safe to call twice."""


class Span(Protocol):
    """Consecutive positions ``start .. start + n - 1`` of one Kv, all having run ``r`` passes."""

    @property
    def kv(self) -> Kv: ...
    @property
    def start(self) -> int: ...
    @property
    def n(self) -> int: ...
    @property
    def r(self) -> int: ...
    @property
    def change(self) -> float:
        """||s_r - s_{r-1}|| / ||s_r||, the mean over positions; infinite before the first pass."""

    def state(self) -> F32:
        """Copy of the raw state s_r, [n, n_embd]."""

    def embeds(self) -> F32:
        """Copy of the prelude's output e, [n, n_embd]."""


class Engine(Protocol):
    """Runs one model file."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def limits(self) -> Limits: ...

    def kv_bytes(self, depth: int, n_ctx: int) -> int:
        """Cache bytes of one sequence of ``n_ctx`` positions that runs ``depth`` passes."""

    def plan(self, depth: int) -> MemoryPlan:
        """Everything the loaded model takes with one sequence of ``depth`` passes that fills its context."""

    def open(self, max_depth: int) -> Kv:
        """An empty cache for one sequence whose positions run at most ``max_depth`` passes.

        Raises: DepthError beyond ``limits.kv_depth``; OutOfMemory where its planes have no room.
        """

    def prelude(self, work: Sequence[tuple[Kv, Ids]], states: Sequence[F32 | None]) -> list[Span]:
        """Open one span per item at r = 0: ids [n] int32 continue their Kv; a state is s_0 [n, n_embd], None zeros.

        A Kv carries one open span at a time.
        Raises: ContextOverflow when start + n > n_ctx; PromptError for ids outside the vocabulary.
        """

    def reopen(self, kvs: Sequence[Kv]) -> list[Span]:
        """Open all committed positions of each Kv again, at the depth d they ran, to go on from s_d.

        The positions of a Kv must have run the same depth. Planes of the prelude and of passes below d stand; the
        coda runs again. Going on to D equals having started there: bit for bit, where the positions were one span.
        """

    def core(self, spans: Sequence[Span], n: int = 1) -> None:
        """Apply the core n times to each span: s_{r+1} = core(inject(s_r, e)).

        K/V is written at plane(r, ring); other positions are read at visible(r, depth, ring).
        Raises: DepthError beyond the depth the Kv was opened for; EngineError when the device fails.
        Source: Geiping et al. 2025, arXiv:2502.05171, section 3.
        """

    def coda(self, spans: Sequence[Span], rows: Rows = "last") -> list[F32]:
        """Logits after r passes, [1, n_vocab] or [n, n_vocab]; memoised until r moves."""

    def commit(self, spans: Sequence[Span]) -> None:
        """Make the spans' K/V final: their positions join the Kv at depth r. Runs the coda if it has not run."""

    def drop(self, spans: Sequence[Span]) -> None:
        """Cancel open spans; their Kv is as before the prelude. Positions that were open again are forgotten."""

    def close(self) -> None:
        """Release everything; safe to call twice."""


def check_span(config: ModelConfig, limits: Limits, start: int, ids: Ids, state: F32 | None) -> None:
    """Refuse what would make native code abort: empty or foreign ids, overflow, states of a wrong shape."""
    if ids.ndim != 1 or ids.size == 0:
        raise PromptError(f"token ids have shape {list(ids.shape)}; pass at least one token in a flat list")
    low, high = (int(ids[0]),) * 2 if ids.size == 1 else (int(ids.min()), int(ids.max()))
    if low < 0 or high >= config.n_vocab:
        bad = low if low < 0 else high
        raise PromptError(f"token id {bad} is outside 0..{config.n_vocab - 1}, the vocabulary of this model")
    if start + ids.size > limits.n_ctx:
        raise ContextOverflow(
            f"{start} cached + {ids.size} new tokens exceed n_ctx={limits.n_ctx}; {shorter_or_larger(config, limits)}"
        )
    if state is not None and state.shape != (ids.size, config.n_embd):
        raise PromptError(f"state has shape {list(state.shape)}; it must be [{ids.size}, {config.n_embd}]")


def check_open(limits: Limits, max_depth: int) -> None:
    """Refuse a cache deeper than the limits allow."""
    if max_depth > limits.kv_depth:
        raise DepthError(
            f"depth={max_depth} is beyond kv_depth={limits.kv_depth}, the deepest this model was loaded for; "
            f"ask for less, or load it with kv_depth={max_depth}"
        )


def check_pass(r: int, max_depth: int) -> None:
    """Refuse pass ``r`` of a cache that was opened for fewer."""
    if r >= max_depth:
        raise DepthError(f"pass {r + 1} is beyond depth {max_depth}, which this cache was opened for")


def shorter_or_larger(config: ModelConfig, limits: Limits) -> str:
    """What to do about a context that is too small."""
    if limits.n_ctx >= config.n_ctx:
        return "shorten the prompt, this model was made for no more"
    return f"shorten the prompt, or load the model with a larger n_ctx (it was made for up to {config.n_ctx})"


def n_slots(config: ModelConfig, depth: int, ring: int | None) -> int:
    """K/V planes of all layers when ``depth`` passes run."""
    return config.n_prelude + config.n_coda + config.n_core * n_planes(depth, ring)


def initial_state(config: ModelConfig, start: int, n: int, seed: int | None) -> F32 | None:
    """s_0 for positions ``start .. start + n - 1``, [n, n_embd]: None (zeros) without a seed.

    With a seed, position p draws from ``Philox(key=(seed, p))`` at the file's standard deviation, so the state
    does not depend on chunks, batch or engine.
    """
    if seed is None or config.state_init is StateInit.ZEROS:
        return None
    rows = [
        np.random.Generator(np.random.Philox(key=np.array([seed, p], dtype=np.uint64))).standard_normal(config.n_embd)
        for p in range(start, start + n)
    ]
    return (np.stack(rows) * config.state_std).astype(np.float32)
