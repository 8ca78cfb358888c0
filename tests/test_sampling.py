"""Picking tokens: against a plain slow implementation, by invariants of each setting, and by counting draws."""

import math
from collections import Counter
from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from localdepth.errors import EngineError, SamplingError
from localdepth.sampling import GREEDY, Picked, Sampling, pick

LOGPROB_ATOL = 1e-9  # float64 throughout; only the order of a sum differs
CHI2_P999 = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46, 7: 24.32}  # quantiles of 0.999 by freedom
INF = math.inf
LOGITS = np.array([2.0, 1.0, 0.5, 0.0, -1.0, -2.0, 1.5, -INF], dtype=np.float32)


def rows(min_size: int = 1, max_size: int = 40) -> st.SearchStrategy[NDArray[np.float32]]:
    """Logits with ties and impossible tokens, at least one possible."""
    logit = st.floats(-20, 20, width=32) | st.sampled_from([0.0, 1.0, -INF])
    return (
        st.lists(logit, min_size=min_size, max_size=max_size)
        .filter(lambda values: max(values) > -INF)
        .map(lambda values: np.array(values, dtype=np.float32))
    )


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    top_k=st.integers(0, 12),
    top_p=st.sampled_from([0.0, 0.3, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 2**64 - 1),
    logit_bias=st.dictionaries(st.integers(0, 4), st.floats(-5, 5) | st.just(-INF), max_size=3),
    repeat_penalty=st.sampled_from([0.7, 1.0, 1.3]),
)


def softmax(logits: list[float]) -> list[float]:
    best = max(logits)
    weights = [math.exp(x - best) for x in logits]
    return [w / math.fsum(weights) for w in weights]


def slow_distribution(logits: NDArray[np.float32], sampling: Sampling, recent: list[int]) -> dict[int, float]:
    """What `pick` draws from, one plain step after the other."""
    values = [float(x) for x in logits]
    for token, bias in sampling.logit_bias.items():
        values[token] += bias
    for token in set(recent):
        x = values[token]
        values[token] = x / sampling.repeat_penalty if x > 0 else x * sampling.repeat_penalty
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    if sampling.temperature == 0:
        return {order[0]: 1.0}
    order = order[: sampling.top_k or None]
    probabilities = softmax([values[i] for i in order])
    reached, n = 0.0, 0
    while n < len(order) and (n == 0 or reached < sampling.top_p or sampling.top_p == 1.0):
        reached += probabilities[n]
        n += 1
    order = [i for i, p in zip(order[:n], probabilities, strict=False) if p >= sampling.min_p * probabilities[0]]
    scaled = softmax([values[i] / sampling.temperature for i in order])
    return {i: p for i, p in zip(order, scaled, strict=True) if p > 0}


def frequencies(logits: NDArray[np.float32], sampling: Sampling, n: int, recent: list[int]) -> Counter[int]:
    return Counter(pick(logits, sampling, position=position, recent=recent).id for position in range(n))


def assert_drawn_from(expected: dict[int, float], counts: Counter[int]) -> None:
    total = counts.total()
    assert set(counts) <= set(expected)
    chi2 = sum((counts[i] - total * p) ** 2 / (total * p) for i, p in expected.items())
    assert chi2 < CHI2_P999.get(len(expected) - 1, 1e-9)


# --- the whole chain --------------------------------------------------------------------------------------------------


@given(logits=rows(min_size=5), sampling=samplings, recent=st.lists(st.integers(0, 4), max_size=5), data=st.data())
@settings(max_examples=400, deadline=None)
def test_pick_stays_inside_the_slow_distribution(
    logits: NDArray[np.float32], sampling: Sampling, recent: list[int], data: st.DataObject
) -> None:
    assume(any(x > -INF and sampling.logit_bias.get(i) != -INF for i, x in enumerate(logits)))
    expected = slow_distribution(logits, sampling, recent)
    for position in data.draw(st.lists(st.integers(0, 2**40), max_size=5)):
        assert pick(logits, sampling, position=position, recent=recent).id in expected


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, seed=1),
        Sampling(temperature=0.5, seed=2),
        Sampling(temperature=2.0, top_k=4, seed=3),
        Sampling(temperature=1.0, top_p=0.8, seed=4),
        Sampling(temperature=1.5, min_p=0.2, seed=5),
        Sampling(temperature=1.3, top_k=6, top_p=0.95, min_p=0.05, seed=6),
        Sampling(temperature=1.0, logit_bias={4: 3.0, 0: -INF}, seed=7),
        Sampling(temperature=1.0, repeat_penalty=1.5, seed=8),
    ],
    ids=str,
)
def test_draws_are_distributed_as_the_slow_implementation_says(sampling: Sampling) -> None:
    recent = [0, 0, 5]
    assert_drawn_from(slow_distribution(LOGITS, sampling, recent), frequencies(LOGITS, sampling, 4000, recent))


def test_large_vocabulary_is_cut_like_the_slow_implementation() -> None:
    logits = np.random.default_rng(3).normal(0, 1, 5000).astype(np.float32)  # flat: top-p needs thousands of tokens
    for top_k, top_p in [(0, 0.9), (3000, 0.9), (0, 0.99999), (100, 0.5)]:
        sampling = Sampling(temperature=1.0, top_k=top_k, top_p=top_p)
        expected = slow_distribution(logits, sampling, [])
        picked = {pick(logits, sampling, position=p).id for p in range(60)}
        assert picked <= set(expected)


# --- the plain distribution -------------------------------------------------------------------------------------------


@given(logits=rows(), sampling=samplings.filter(lambda s: not s.logit_bias), data=st.data())
@settings(deadline=None)
def test_logprob_and_top_describe_the_plain_distribution(
    logits: NDArray[np.float32], sampling: Sampling, data: st.DataObject
) -> None:
    n_top = data.draw(st.integers(0, len(logits)))
    picked = pick(logits, sampling, position=0, n_top=n_top)
    values = [float(x) for x in logits]
    probabilities = softmax(values)
    best = max(values)
    total = math.log(math.fsum(math.exp(x - best) for x in values))
    assert picked.logprob == pytest.approx(values[picked.id] - best - total, abs=LOGPROB_ATOL)
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    assert [i for i, _ in picked.top] == [i for i in order[:n_top] if values[i] > -INF]
    assert [p for _, p in picked.top] == pytest.approx(
        [values[i] - best - total for i, _ in picked.top], abs=LOGPROB_ATOL
    )
    assert sum(math.exp(p) for _, p in picked.top) <= sum(probabilities) + LOGPROB_ATOL


def test_bias_changes_the_choice_but_not_its_logprob() -> None:
    plain = pick(LOGITS, GREEDY, position=0, n_top=2)
    biased = pick(LOGITS, Sampling(logit_bias={3: 9.0}), position=0, n_top=2)
    assert (plain.id, biased.id) == (0, 3)
    assert biased.top == plain.top
    assert biased.logprob == pytest.approx(plain.logprob - 2.0)


# --- single settings --------------------------------------------------------------------------------------------------


def test_greedy_takes_the_lowest_of_equal_tokens() -> None:
    picked = pick(np.array([0, 3, 1, 3], dtype=np.float32), GREEDY, position=9)
    logprob = -math.log(2 + math.exp(-2) + math.exp(-3))
    assert picked == Picked(1, pytest.approx(logprob), ())  # type: ignore[arg-type]


@given(logits=rows(), seed=st.integers(0, 2**64 - 1), position=st.integers(0, 2**63))
@settings(deadline=None)
def test_settings_that_leave_one_token_take_the_greedy_one(
    logits: NDArray[np.float32], seed: int, position: int
) -> None:
    expected = pick(logits, GREEDY, position=0).id
    for sampling in (Sampling(temperature=2.0, top_k=1, seed=seed), Sampling(temperature=2.0, top_p=0.0, seed=seed)):
        assert pick(logits, sampling, position=position).id == expected


def test_min_p_of_one_keeps_only_the_most_likely_and_its_equals() -> None:
    logits = np.array([1.0, 2.0, 0.0, 2.0], dtype=np.float32)
    assert set(frequencies(logits, Sampling(temperature=5.0, min_p=1.0), 100, [])) == {1, 3}


def test_tiny_temperature_takes_the_most_likely_token() -> None:
    assert {pick(LOGITS, Sampling(temperature=5e-324), position=p).id for p in range(50)} == {0}


def test_filters_ignore_the_temperature() -> None:
    hot, cold = (Sampling(temperature=t, top_p=0.7) for t in (50.0, 0.8))
    assert set(frequencies(LOGITS, hot, 400, [])) == set(frequencies(LOGITS, cold, 400, [])) == {0, 1, 6}


def test_hot_draws_reach_tokens_whose_probability_underflows() -> None:
    logits = np.array([0.0, -760.0], dtype=np.float32)
    sampling = Sampling(temperature=100.0)
    counts = frequencies(logits, sampling, 12_000, [])
    assert counts[1] > 0
    assert_drawn_from(slow_distribution(logits, sampling, []), counts)


def test_repeat_penalty_counts_a_token_once_and_pushes_both_signs_down() -> None:
    logits = np.array([2.0, 1.9, -0.5, -0.6], dtype=np.float32)
    assert pick(logits, Sampling(repeat_penalty=1.5), position=0, recent=[0, 0, 0]).id == 1
    assert pick(logits[2:], Sampling(repeat_penalty=1.5), position=0, recent=[0]).id == 1


def test_banned_and_impossible_tokens_are_never_drawn() -> None:
    sampling = Sampling(temperature=100.0, logit_bias={0: -INF, 3: -INF})
    assert set(frequencies(LOGITS, sampling, 500, [])) == {1, 2, 4, 5, 6}


# --- randomness -------------------------------------------------------------------------------------------------------


def test_draw_depends_on_seed_and_position_only() -> None:
    sampling = Sampling(temperature=1.0, seed=11)
    forwards = [pick(LOGITS, sampling, position=p).id for p in range(200)]
    backwards = [pick(LOGITS, sampling, position=p).id for p in reversed(range(200))]
    assert forwards == backwards[::-1]
    assert forwards != [pick(LOGITS, replace(sampling, seed=12), position=p).id for p in range(200)]


def test_draws_are_pinned() -> None:
    sampling = Sampling(temperature=1.0, seed=2**64 - 1)
    point = np.random.Generator(np.random.Philox(key=np.array([2**64 - 1, 7], dtype=np.uint64))).random()
    cumulated = np.cumsum(softmax([float(x) for x in LOGITS]))
    assert pick(LOGITS, sampling, position=7).id == int(np.searchsorted(cumulated, point, side="right"))


def test_neighbouring_seeds_and_positions_are_independent() -> None:
    logits = np.zeros(2, dtype=np.float32)
    draws = np.array(
        [[pick(logits, Sampling(temperature=1.0, seed=s), position=p).id for p in range(60)] for s in range(60)]
    )
    for other in (draws[1:] == draws[:-1], draws[:, 1:] == draws[:, :-1]):
        assert abs(other.mean() - 0.5) < 0.035  # four standard errors of 3540 fair coins


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": INF},
        {"temperature": "hot"},
        {"temperature": True},
        {"temperature": None},
        {"top_k": -1},
        {"top_k": 2.0},
        {"top_p": 1.01},
        {"top_p": -0.01},
        {"top_p": math.nan},
        {"min_p": 1.5},
        {"seed": -1},
        {"seed": 2**64},
        {"seed": 1.0},
        {"repeat_penalty": 0.0},
        {"repeat_penalty": -1.0},
        {"repeat_penalty": math.nan},
        {"logit_bias": [1.0]},
        {"logit_bias": {"a": 1.0}},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {1: math.nan}},
        {"logit_bias": {1: INF}},
        {"logit_bias": {1: "x"}},
    ],
    ids=str,
)
def test_setting_outside_its_range_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(SamplingError, match=next(iter(options))):
        Sampling(**options)


def test_settings_are_frozen_and_keep_their_own_bias() -> None:
    bias = {1: 2.0}
    sampling = Sampling(logit_bias=bias)
    bias[1] = -INF
    assert sampling.logit_bias == {1: 2.0}
    assert hash(sampling) == hash(Sampling())
    with pytest.raises(FrozenInstanceError):
        sampling.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize("bad", [math.nan, INF])
def test_broken_logits_are_an_engine_error(bad: float) -> None:
    logits = LOGITS.copy()
    logits[4] = bad
    with pytest.raises(EngineError, match="token 4"):
        pick(logits, GREEDY, position=0)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0)], ids=["greedy", "drawn"])
def test_no_possible_token_is_refused(sampling: Sampling) -> None:
    with pytest.raises(SamplingError, match="no token is possible"):
        pick(np.full(3, -INF, dtype=np.float32), sampling, position=0)
    with pytest.raises(SamplingError, match="no token is possible"):
        pick(LOGITS[:2], replace(sampling, logit_bias={0: -INF, 1: -INF}), position=0)


def test_bias_of_an_unknown_token_is_refused() -> None:
    with pytest.raises(SamplingError, match=r"logit_bias id 8 is outside 0\.\.7"):
        pick(LOGITS, Sampling(logit_bias={8: 1.0}), position=0)


@pytest.mark.parametrize("n_top", [-1, 9])
def test_more_alternatives_than_tokens_are_refused(n_top: int) -> None:
    with pytest.raises(SamplingError, match="top_logprobs"):
        pick(LOGITS, GREEDY, position=0, n_top=n_top)
