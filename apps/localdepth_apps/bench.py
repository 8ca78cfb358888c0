"""Speed against depth: how fast a model file reads a prompt and writes an answer, and what the process holds."""

import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from localdepth.config import ModelConfig
from localdepth.errors import RequestError
from localdepth.generate import FinishReason, Generation
from localdepth.memory import MemoryPlan
from localdepth.model import Model
from localdepth.sampling import Sampling

__all__ = ["Bench", "Rate", "Speed", "measure"]

_DEPTHS = (1, 2, 4, 8, 16, 32, 64)
_N_PROMPT, _N_GENERATED = 128, 32


@dataclass(frozen=True, slots=True)
class Rate:
    """Tokens per second over all rounds."""

    median: float
    best: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """One depth with one number of threads: ``prefill`` reads the prompt, ``decode`` writes one token after another."""

    threads: int
    depth: int
    prefill_tok_s: Rate
    decode_tok_s: Rate

    @property
    def tok_s(self) -> tuple[float, float, float, float]:
        """Median and best of prefill, then of decode."""
        prefill, decode = self.prefill_tok_s, self.decode_tok_s
        return prefill.median, prefill.best, decode.median, decode.best


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What was measured, and with what.

    Attributes:
        memory: what the planner says, with a sequence that fills the context at the deepest depth measured.
        load_ms: time to load the model, by number of threads; the first load of a process opens the library too.
        peak_bytes: most memory this process ever held; None where the system does not say.
    """

    n_prompt: int
    n_generated: int
    rounds: int
    load_ms: dict[int, float]
    memory: MemoryPlan
    peak_bytes: int | None
    speeds: tuple[Speed, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "memory": self.memory.to_dict()}


def measure(
    open_model: Callable[[int | None], Model],
    threads: Sequence[int | None],
    *,
    depths: Sequence[int] | None = None,
    n_prompt: int | None = None,
    n_generated: int | None = None,
    rounds: int = 3,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Bench:
    """Let a model answer random prompts, at every depth in every round, so that a busy moment hits all depths.

    Args:
        open_model: loads the model with a number of threads.
        threads: numbers to compare, one after the other; None is the model's own choice.
        depths: each in the model's range; None takes powers of two.
        n_prompt, n_generated: tokens of prompt and answer; None takes 128 and 32, less in a small context.
        rounds: counted ones; one answer before them warms up.
        on_progress: answers done, answers to do.
    Raises:
        RequestError: a setting outside its range, or a context too small for prompt and answer.
    """
    if rounds < 1:
        raise RequestError(f"rounds={rounds} is below 1; measure at least once")
    load_ms: dict[int, float] = {}
    speeds: list[Speed] = []
    for wanted in threads:
        began = time.perf_counter()
        with open_model(wanted) as model:
            n_threads = model.limits.n_threads
            load_ms[n_threads] = round(1000 * (time.perf_counter() - began), 2)
            runner = _Runner(model, *_sizes(model.limits.n_ctx, n_prompt, n_generated))
            chosen = _check_depths(depths, model.config)
            n_done, n_all = len(speeds) * rounds, len(threads) * len(chosen) * rounds
            memory = model.memory(max(chosen))
            runner.run(max(chosen))
            found: dict[int, list[Generation]] = {depth: [] for depth in chosen}
            for i in range(rounds):
                for j, depth in enumerate(chosen):
                    found[depth].append(runner.run(depth))
                    on_progress(n_done + i * len(chosen) + j + 1, n_all)
        speeds += [_speed(n_threads, depth, answers) for depth, answers in found.items()]
    return Bench(
        n_prompt=runner.n_prompt,
        n_generated=runner.n_generated,
        rounds=rounds,
        load_ms=load_ms,
        memory=memory,
        peak_bytes=_peak_bytes(),
        speeds=tuple(speeds),
    )


class _Runner:
    """Asks prompts that share no prefix, and gets answers that do not end early."""

    def __init__(self, model: Model, n_prompt: int, n_generated: int) -> None:
        self.n_prompt, self.n_generated = n_prompt, n_generated
        self._model = model
        self._random = np.random.default_rng(0)
        self._n_runs = 0
        self._ends: dict[int, float] = {}  # tokens that end an answer, found as they come

    def run(self, depth: int) -> Generation:
        n_vocab = self._model.config.n_vocab
        while True:
            ids = [self._n_runs % n_vocab, *self._random.integers(n_vocab, size=self.n_prompt - 1).tolist()]
            self._n_runs += 1
            answer = self._model.generate(
                ids, depth=depth, max_tokens=self.n_generated, sampling=Sampling(logit_bias=self._ends)
            )
            if answer.finish_reason is not FinishReason.STOP:
                return answer
            self._ends[answer.tokens[-1].id] = -math.inf


def _sizes(n_ctx: int, n_prompt: int | None, n_generated: int | None) -> tuple[int, int]:
    n_generated = min(_N_GENERATED, n_ctx // 2) if n_generated is None else n_generated
    n_prompt = min(_N_PROMPT, n_ctx - n_generated) if n_prompt is None else n_prompt
    if n_prompt < 1 or n_generated < 2 or n_prompt + n_generated > n_ctx:
        raise RequestError(
            f"a prompt of {n_prompt} and an answer of {n_generated} tokens cannot be measured in a context of {n_ctx}; "
            "they need 1 and 2 at least, and room together"
        )
    return n_prompt, n_generated


def _check_depths(depths: Sequence[int] | None, config: ModelConfig) -> tuple[int, ...]:
    if depths is None:
        return tuple(depth for depth in _DEPTHS if depth <= config.max_depth)
    return tuple(config.check_depth(depth) for depth in depths)


def _speed(threads: int, depth: int, answers: Sequence[Generation]) -> Speed:
    prefill = [1000 * answer.stats.n_prompt / answer.stats.prompt_ms for answer in answers]
    decode = [1000 * (answer.stats.n_generated - 1) / answer.stats.decode_ms for answer in answers]
    return Speed(threads=threads, depth=depth, prefill_tok_s=_rate(prefill), decode_tok_s=_rate(decode))


def _rate(tok_s: Sequence[float]) -> Rate:
    return Rate(median=round(statistics.median(tok_s), 2), best=round(max(tok_s), 2))


def _peak_bytes() -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
