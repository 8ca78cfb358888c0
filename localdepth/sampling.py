"""From logits to one token: which tokens stay possible, and which of them is drawn.

In the order of llama.cpp's default chain: logit bias, repeat penalty, top-k, top-p, min-p, temperature, draw. So the
three filters see the model's own distribution, whatever the temperature. Each keeps a prefix of the tokens sorted by
probability, lower ids first among equals. The draw depends on nothing but the logits, the seed and the position:
chunks, batches and engines do not change it.
Source: llama.cpp, ``common_params_sampling::samplers``; min-p: Nguyen et al. 2024, arXiv:2407.01082; top-p: Holtzman
et al. 2019, arXiv:1904.09751; repeat penalty: Keskar et al. 2019, arXiv:1909.05858.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localdepth.errors import EngineError, SamplingError

__all__ = ["GREEDY", "Picked", "Sampling", "pick"]

_MAX_BIAS = 1e4  # far beyond any logit; -inf is the way to ban a token
_FIRST_SORT = 256  # tokens that usually suffice for a top-p


def _check_range(name: str, value: Any, low: float, high: float) -> None:
    kind, noun = (int, "a whole number") if isinstance(low, int) else (int | float, "a number")
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
        raise SamplingError(f"{name}={value!r} is not {noun} in {low}..{high}; pass one that is")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one request picks its tokens.

    Attributes:
        temperature: 0 takes the most likely token; 1 draws from the model's distribution.
        top_k: keep this many most likely tokens; 0 keeps all.
        top_p: keep the fewest most likely tokens that reach this probability together; 1 keeps all.
        min_p: keep tokens at least this fraction as likely as the most likely one; 0 keeps all.
        seed: 0..2**64 - 1; equal seeds draw equal tokens.
        logit_bias: added to the logits of these ids; ``-inf`` bans one.
        repeat_penalty: makes recent tokens less likely if above 1.
    Raises:
        SamplingError: when a value is of the wrong type or out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    repeat_penalty: float = 1.0

    def __post_init__(self) -> None:
        _check_range("temperature", self.temperature, 0.0, 100.0)
        _check_range("top_k", self.top_k, 0, 1 << 31)
        _check_range("top_p", self.top_p, 0.0, 1.0)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("seed", self.seed, 0, (1 << 64) - 1)
        _check_range("repeat_penalty", self.repeat_penalty, 0.01, 100.0)
        if not isinstance(self.logit_bias, Mapping):
            raise SamplingError(f"logit_bias={self.logit_bias!r} must map token ids to numbers, such as {{42: -1.5}}")
        for token_id, bias in self.logit_bias.items():
            _check_range("id in logit_bias", token_id, 0, 1 << 31)
            if bias != -math.inf:
                _check_range(f"logit_bias[{token_id}]", bias, -_MAX_BIAS, _MAX_BIAS)
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))  # the caller's may change


GREEDY = Sampling()


@dataclass(frozen=True, slots=True)
class Picked:
    """One picked token.

    Attributes:
        id: the token.
        logprob: its log probability in the model's plain distribution, before every setting.
        top: the most likely tokens of that distribution with their log probabilities, impossible ones left out.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def pick(
    logits: NDArray[np.float32], sampling: Sampling, *, position: int, recent: Sequence[int] = (), n_top: int = 0
) -> Picked:
    """Pick the token for ``position``.

    Args:
        logits: ``[n_vocab]``; ``-inf`` marks a token as impossible.
        sampling: the request's settings.
        position: where the picked token will stand in its sequence; with the seed it fixes the draw.
        recent: ids the repeat penalty looks at.
        n_top: how many of the most likely tokens to report.
    Raises:
        EngineError: when the logits hold NaN or +inf.
        SamplingError: when no token is possible, or ``n_top`` or an id of ``logit_bias`` is outside the vocabulary.
    """
    n_vocab = len(logits)
    if not 0 <= n_top <= n_vocab:
        raise SamplingError(f"top_logprobs={n_top} is outside 0..{n_vocab}, the vocabulary; ask for fewer")
    plain = logits.astype(np.float64)
    best = _maximum(plain)
    logprobs = plain - (best + np.log(np.exp(plain - best).sum()))
    adjusted = _adjust(plain, sampling, recent)
    token = int(adjusted.argmax()) if sampling.temperature == 0 else _draw(adjusted, sampling, position)
    top = tuple((int(i), float(logprobs[i])) for i in _most_likely(plain, n_top) if logprobs[i] > -math.inf)
    return Picked(token, float(logprobs[token]), top)


def _maximum(logits: NDArray[np.float64]) -> float:
    best = float(logits.max())  # NaN spreads
    if math.isnan(best) or best == math.inf:
        bad = int((np.isnan(logits) | (logits == math.inf)).argmax())
        raise EngineError(f"the logit of token {bad} is {logits[bad]}; the model file or the engine is broken")
    if best == -math.inf:
        raise SamplingError("no token is possible: every logit is -inf; allow at least one token")
    return best


def _adjust(logits: NDArray[np.float64], sampling: Sampling, recent: Sequence[int]) -> NDArray[np.float64]:
    """Logits after bias and repeat penalty, which leave at least one token possible."""
    adjusted = logits.copy()
    for token_id, bias in sampling.logit_bias.items():
        if token_id >= len(logits):
            raise SamplingError(f"logit_bias id {token_id} is outside 0..{len(logits) - 1}; use ids of this model")
        adjusted[token_id] += bias
    if recent and sampling.repeat_penalty != 1.0:
        seen = np.unique(np.asarray(recent, dtype=np.int64))
        values = adjusted[seen]
        adjusted[seen] = np.where(values > 0, values / sampling.repeat_penalty, values * sampling.repeat_penalty)
    _maximum(adjusted)
    return adjusted


def _draw(logits: NDArray[np.float64], sampling: Sampling, position: int) -> int:
    ids = _kept(logits, sampling)
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the best to -inf
        scaled = (logits[ids] - logits[ids].max()) / sampling.temperature
    cumulated = np.exp(scaled).cumsum()
    key = np.array([sampling.seed, position], dtype=np.uint64)
    point = np.random.Generator(np.random.Philox(key=key)).random() * cumulated[-1]
    return int(ids[np.searchsorted(cumulated, point, side="right")])


def _kept(logits: NDArray[np.float64], sampling: Sampling) -> NDArray[np.intp]:
    """Ids that top-k, top-p and min-p leave, ascending, so that near ties do not reorder the draw."""
    ids = np.arange(len(logits))
    if 0 < sampling.top_k < len(logits):
        ids = _most_likely(logits, sampling.top_k)
    if sampling.top_p < 1.0:
        ids = _nucleus(logits, ids, sampling.top_p)
    if sampling.min_p > 0.0:
        ids = ids[np.exp(logits[ids] - logits.max()) >= sampling.min_p]
    return np.sort(ids)


def _nucleus(logits: NDArray[np.float64], ids: NDArray[np.intp], top_p: float) -> NDArray[np.intp]:
    """The fewest most likely of ``ids`` that reach ``top_p`` of their probability together; at least one."""
    values = logits[ids]
    weights = np.exp(values - values.max())
    wanted = top_p * weights.sum()
    n = _FIRST_SORT
    while True:  # sorting a whole large vocabulary takes longer than everything else here
        order = _most_likely(values, min(n, len(ids)))
        cumulated = weights[order].cumsum()
        if cumulated[-1] >= wanted or n >= len(ids):
            return ids[order[: 1 + np.searchsorted(cumulated, wanted)]]
        n *= 8


def _most_likely(values: NDArray[np.float64], n: int) -> NDArray[np.intp]:
    """Indices of the ``n`` largest values, largest first, lower indices first among equals."""
    if n == 0:
        return np.arange(0)
    indices = np.arange(len(values))
    if n < len(values):
        smallest = np.partition(values, -n)[-n]
        above = indices[values > smallest]
        indices = np.concatenate([above, indices[values == smallest][: n - len(above)]])
    return indices[np.argsort(-values[indices], kind="stable")]
