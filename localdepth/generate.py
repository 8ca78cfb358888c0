"""Generation: a stream of tokens, each with the depth it took; a whole answer is a fold over the stream."""

import math
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import partial
from typing import Any

import numpy as np

from localdepth.config import ModelConfig
from localdepth.engine.base import F32, Engine, Span, check_open, shorter_or_larger
from localdepth.errors import ContextOverflow, EngineError, RequestError, SamplingError
from localdepth.policy.base import Decision
from localdepth.prefix import PrefixCache
from localdepth.sampling import GREEDY, Sampling, pick
from localdepth.tokenizer import StopStrings, Tokenizer

__all__ = ["FinishReason", "Generation", "Request", "Stats", "Stream", "Token"]


class FinishReason(StrEnum):
    """Why an answer ended."""

    STOP = "stop"  # the model's end token, or a stop string
    LENGTH = "length"  # max_tokens
    CONTEXT = "context"  # the context is full


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token.

    Attributes:
        text: what this token adds to the answer; empty while a character or a stop string is incomplete.
        depth: passes its position ran to produce it.
        logprob: natural logarithm of its probability under the model, before any sampling setting.
        top: the most likely ids with their logprobs, as many as were asked for.
    """

    id: int
    text: str
    depth: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """What an answer cost.

    Attributes:
        mean_depth: passes over all prompt and generated positions, exit checks in pass equivalents
            included, divided by the positions that ran (the last token never does).
        generated_depth: mean depth of the generated tokens alone.
        passes: the sum behind ``mean_depth``.
        n_cached: positions of the prompt that a kept prefix spared, in part or altogether.
        cached_passes: of ``passes``, those that were not run again for them.
    """

    n_prompt: int
    n_generated: int
    mean_depth: float
    generated_depth: float
    passes: float
    n_cached: int
    cached_passes: int
    prompt_ms: float
    decode_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A whole answer; ``index`` is its place among the prompts of a batch."""

    index: int = 0
    text: str
    tokens: tuple[Token, ...]
    finish_reason: FinishReason
    decision: Decision
    stats: Stats

    @property
    def depth(self) -> int:
        """The deepest depth used."""
        return max(token.depth for token in self.tokens)

    def to_dict(self) -> dict[str, Any]:
        """The answer without its single tokens, as plain values for JSON."""
        return {
            "text": self.text,
            "depth": self.depth,
            "mean_depth": self.stats.mean_depth,
            "chosen_by": self.decision.chosen_by,
            "reason": self.decision.reason,
            "finish_reason": str(self.finish_reason),
            "stats": asdict(self.stats),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Everything one answer needs, checked.

    Attributes:
        ids: prompt, at least one token.
        decision: between which depths its positions run.
        max_tokens: at least 1.
        stop: strings that end the answer and are not part of it; checked by ``StopStrings``.
        state_seed: draws s_0 from the file's distribution; None starts from zeros.
        warm_start: a generated token starts from the raw state of the one before it.
        top_logprobs: how many likely alternatives each token carries.
    """

    ids: tuple[int, ...]
    decision: Decision
    sampling: Sampling = GREEDY
    max_tokens: int = 256
    stop: Sequence[str] = ()
    state_seed: int | None = None
    warm_start: bool = False
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        for name, kind in (("sampling", Sampling), ("decision", Decision)):
            if not isinstance(getattr(self, name), kind):
                raise RequestError(
                    f"{name}={getattr(self, name)!r} is no {kind.__name__}; make one with {kind.__name__}(...)"
                )
        for name, low, high in (("max_tokens", 1, 1 << 31), ("top_logprobs", 0, 1000)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= value <= high:
                raise RequestError(f"{name}={value!r} must be a whole number in {low}..{high}")
        if not isinstance(self.warm_start, bool):
            raise RequestError(f"warm_start={self.warm_start!r} must be True or False")
        seed = self.state_seed
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 64):
            raise RequestError(f"state_seed={seed!r} must be a whole number in 0..2^64-1")


class Stream:
    """Iterates over the tokens of one answer; any thread may close it.

    A stream frees its cache when it ends, when it is closed, and when nothing refers to it any more.
    ``finish_reason`` is None until it has ended by itself; ``stats`` grow with it.

    Raises:
        ContextOverflow, DepthError, SamplingError, RequestError: the model cannot serve the request.
    """

    def __init__(
        self,
        engine: Engine,
        prefixes: PrefixCache,
        tokenizer: Tokenizer | None,
        request: Request,
        lock: threading.RLock,
    ) -> None:
        self.request = request
        self.finish_reason: FinishReason | None = None
        self._engine, self._prefixes, self._tokenizer, self._lock = engine, prefixes, tokenizer, lock
        _check_fits(request, engine)
        self._texts = _Released(tokenizer, request.stop)
        self._cost = _Cost(engine.config, request)
        self._tokens = self._run()
        self._keeps = False  # what was read, when closed early
        self._turn = threading.Lock()  # a generator that runs in one thread must not be closed from another

    @property
    def decision(self) -> Decision:
        """Between which depths, by whom and why."""
        return self.request.decision

    @property
    def stats(self) -> Stats:
        """Cost so far."""
        return self._cost.stats()

    def __iter__(self) -> Iterator[Token]:
        return self

    def __next__(self) -> Token:
        with self._turn:
            return next(self._tokens)

    def collect(self, on_token: Callable[[Token], None] | None = None) -> Generation:
        """Run to the end and return the whole answer; ``on_token`` sees each token as it comes."""
        tokens = []
        for token in self:
            tokens.append(token)
            if on_token:
                on_token(token)
        if self.finish_reason is None or not tokens:
            raise EngineError("the stream was closed before its answer ended; ask again")
        return Generation(
            text="".join(token.text for token in tokens),
            tokens=tuple(tokens),
            finish_reason=self.finish_reason,
            decision=self.decision,
            stats=self.stats,
        )

    def close(self) -> None:
        """End early, once the token in the making is done; safe to call twice."""
        with self._turn:
            self._keeps = True
            self._tokens.close()

    def _run(self) -> Generator[Token, None, None]:
        request, ids = self.request, list(self.request.ids)
        with self._lock:
            sequence = _Sequence(self._engine, self._prefixes, request)
        self._cost.spare(sequence.n_cached, sequence.cached_depth)
        n_new, compute = len(ids), sequence.begin
        try:
            while self.finish_reason is None:
                with self._lock:
                    began = time.perf_counter()
                    logits, depth = compute()
                chosen = pick(logits, request.sampling, position=len(ids), recent=ids, n_top=request.top_logprobs)
                self._cost.add(n_new, depth, time.perf_counter() - began)
                ids.append(chosen.id)
                n_new, compute = 1, partial(sequence.extend, chosen.id)
                self.finish_reason, text = self._advance(chosen.id, len(ids))
                yield Token(chosen.id, text, depth, chosen.logprob, chosen.top)
        except GeneratorExit:
            if not self._keeps:  # the collector found it, in whatever this thread is doing: nothing may be touched
                return
        except BaseException:
            with self._lock:
                sequence.close()
            raise
        with self._lock:
            sequence.keep()

    def _advance(self, token_id: int, n_ids: int) -> tuple[FinishReason | None, str]:
        """Whether the answer ends with this token, and what the token adds to it."""
        if self._tokenizer is not None and self._tokenizer.is_eos(token_id):
            return FinishReason.STOP, self._texts.flush()
        text, stopped = self._texts.push(token_id)
        if stopped:
            return FinishReason.STOP, text
        if n_ids - len(self.request.ids) == self.request.max_tokens:
            return FinishReason.LENGTH, text + self._texts.flush()
        if n_ids == self._engine.limits.n_ctx:
            return FinishReason.CONTEXT, text + self._texts.flush()
        return None, text


def _check_fits(request: Request, engine: Engine) -> None:
    """Refuse before anything is computed what the model would refuse later."""
    limits, config = engine.limits, engine.config
    if len(request.ids) >= limits.n_ctx:
        raise ContextOverflow(
            f"the prompt has {len(request.ids)} tokens and n_ctx={limits.n_ctx} must also hold the answer; "
            f"{shorter_or_larger(config, limits)}"
        )
    check_open(limits, request.decision.ceiling)
    if request.top_logprobs > config.n_vocab:
        raise SamplingError(f"top_logprobs={request.top_logprobs} is outside 0..{config.n_vocab}, the vocabulary")
    if beyond := [i for i in request.sampling.logit_bias if i >= config.n_vocab]:
        raise SamplingError(f"logit_bias id {beyond[0]} is outside 0..{config.n_vocab - 1}; use ids of this model")


class _Sequence:
    """The positions of one answer, on top of what is kept of an earlier one."""

    def __init__(self, engine: Engine, prefixes: PrefixCache, request: Request) -> None:
        self._engine, self._prefixes, self._request = engine, prefixes, request
        if request.warm_start:  # states that one token hands to the next are nothing to go on from
            self._prefix = prefixes.fresh(request.state_seed, request.decision)
        else:
            self._prefix = prefixes.take(request.ids, request.state_seed, request.decision)
        self._observe = self._remember if request.warm_start else None
        self._warm: F32 | None = None  # raw state of the last position, [1, n_embd]
        self.n_cached, self.cached_depth = len(self._prefix.ids), self._prefix.depth

    def begin(self) -> tuple[F32, int]:
        """Logits after the prompt, [n_vocab], and the depth they took."""
        return self._prefix.begin(self._engine, self._request.ids, self._request.decision, self._observe)

    def extend(self, token: int) -> tuple[F32, int]:
        """Logits after one more token, [n_vocab], and its depth."""
        return self._prefix.extend(self._engine, token, self._request.decision, self._warm, self._observe)

    def keep(self) -> None:
        """Leave the positions to the next answer."""
        if self._request.warm_start:
            self.close()
        else:
            self._prefixes.keep(self._prefix)

    def close(self) -> None:
        """Free the cache."""
        self._prefix.kv.close()

    def _remember(self, span: Span) -> None:
        self._warm = span.state()[-1:]


class _Released:
    """Text of the answer that is safe to show: whole characters, nothing that may begin a stop string."""

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str]) -> None:
        if stop and tokenizer is None:
            raise RequestError(f"stop={list(stop)!r} needs a model file with a tokenizer; this one has none")
        self._decoder = None if tokenizer is None else tokenizer.decoder()
        self._stops = StopStrings(stop)

    def push(self, token_id: int) -> tuple[str, bool]:
        return ("", False) if self._decoder is None else self._stops.push(self._decoder.push(token_id))

    def flush(self) -> str:
        if self._decoder is None:
            return ""
        text, stopped = self._stops.push(self._decoder.flush())
        return text if stopped else text + self._stops.flush()


class _Cost:
    """Adds up passes and time."""

    def __init__(self, config: ModelConfig, request: Request) -> None:
        self._n_prompt = len(request.ids)
        self._check = _CheckCost.of(config, request.decision)
        self._decision = request.decision
        self._depths: list[int] = []  # of the generated tokens
        self._passes = 0.0
        self._positions = 0
        self._seconds: list[float] = []
        self._n_cached = self._cached_passes = 0

    def spare(self, n: int, depth: int) -> None:
        """Note that ``n`` positions bring ``depth`` passes each from a kept prefix."""
        self._n_cached, self._cached_passes = n, n * depth

    def add(self, n: int, depth: int, seconds: float) -> None:
        """Count a call of ``n`` positions that ran ``depth`` passes and gave one token."""
        n_checks = max(0, min(depth, self._decision.ceiling - 1) - self._decision.floor + 1)
        self._passes += n * depth + n_checks * (n * self._check.position + self._check.call)
        self._positions += n
        self._depths.append(depth)
        self._seconds.append(seconds)

    def stats(self) -> Stats:
        n = len(self._depths)
        return Stats(
            n_prompt=self._n_prompt,
            n_generated=n,
            mean_depth=self._passes / max(self._positions, 1),
            generated_depth=sum(self._depths) / max(n, 1),
            passes=self._passes,
            n_cached=self._n_cached,
            cached_passes=self._cached_passes,
            prompt_ms=1000 * sum(self._seconds[:1]),
            decode_ms=1000 * sum(self._seconds[1:]),
        )


@dataclass(frozen=True, slots=True)
class _CheckCost:
    """What one look at the logits costs, in passes: the coda for every position, the head for one."""

    position: float = 0.0
    call: float = 0.0

    @classmethod
    def of(cls, config: ModelConfig, decision: Decision) -> "_CheckCost":
        if decision.exit is None or "logits" not in decision.exit.needs:
            return cls()
        shapes = config.tensors()

        def size(*prefixes: str) -> int:
            return sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(prefixes))

        core = size("core.", "injection.state.")
        return cls(size("coda.") / core, size("token_embd." if config.tied_head else "output.weight") / core)
