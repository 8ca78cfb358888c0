"""What is kept of the last sequence changes the work, never the answer."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localdepth.engine.base import Engine, Limits
from localdepth.engine.ggml.engine import GgmlEngine
from localdepth.engine.toy import random_weights
from localdepth.errors import EngineError
from localdepth.generate import Generation
from localdepth.gguf import read
from localdepth.model import Model
from localdepth.policy.base import Decision, Query, Seen
from localdepth.prefix import PrefixCache
from localdepth.prompt import PromptReader
from localdepth.quant import Quant
from tests import engines
from tests.published import FAMILIES

ROUNDING = 1e-4  # of logprobs, where products had another number of rows
QUANTISED = 5e-2  # the same with rounded activations, amplified by random weights
PROMPT = list(range(40, 61))


@pytest.fixture(params=["toy", "ggml", "onnx"])
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def load(kind: str, folder: Path, family: str = "huginn", **limits: object) -> Model:
    config = replace(FAMILIES[family], n_ctx=64)
    engine = engines.make(kind, config, random_weights(config, seed=5), folder, **{"n_batch": 8, **limits})
    return Model(engine, PromptReader(None, config.n_vocab))


@pytest.fixture
def model(kind: str, tmp_path: Path) -> Iterator[Model]:
    with load(kind, tmp_path) as loaded:
        yield loaded


@pytest.fixture
def fresh(kind: str, tmp_path: Path) -> Iterator[Model]:
    """The same model, for the answers of one that keeps nothing: each test asks it once."""
    with load(kind, tmp_path) as loaded:
        yield loaded


def bits(answer: Generation) -> list[tuple[int, float]]:
    return [(token.id, token.logprob) for token in answer.tokens]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ring", [None, 2, 3])
def test_the_same_again_deeper_is_bit_for_bit_a_fresh_start(
    kind: str, tmp_path: Path, family: str, ring: int | None
) -> None:
    with load(kind, tmp_path, family, ring=ring) as model, load(kind, tmp_path, family, ring=ring) as fresh:
        model.generate(PROMPT, depth=2, max_tokens=3)
        deeper = model.generate(PROMPT, depth=7, max_tokens=6)
        assert bits(deeper) == bits(fresh.generate(PROMPT, depth=7, max_tokens=6))
        assert deeper.stats.n_cached == len(PROMPT)
        assert deeper.stats.cached_passes == 2 * len(PROMPT)
        assert deeper.stats.mean_depth == 7


def test_the_same_again_is_bit_for_bit_the_same(model: Model) -> None:
    first, second = (model.generate(PROMPT, depth=4, max_tokens=6) for _ in range(2))
    assert bits(first) == bits(second)
    assert (first.stats.n_cached, second.stats.n_cached) == (0, len(PROMPT))


def test_a_shallower_request_starts_over(model: Model, fresh: Model) -> None:
    model.generate(PROMPT, depth=6, max_tokens=3)
    shallow = model.generate(PROMPT, depth=3, max_tokens=6)
    assert bits(shallow) == bits(fresh.generate(PROMPT, depth=3, max_tokens=6))
    assert shallow.stats.n_cached == 0


@pytest.mark.parametrize("depths", [(4, 4), (3, 5)])
def test_the_next_turn_computes_only_what_is_new(model: Model, fresh: Model, depths: tuple[int, int]) -> None:
    first = model.generate(PROMPT, depth=depths[0], max_tokens=4)
    turn = [*PROMPT, *(token.id for token in first.tokens), 7, 8, 9]
    answer = model.generate(turn, depth=depths[1], max_tokens=5)
    assert answer.stats.n_cached == len(PROMPT) + 3  # the last token of an answer never runs
    close(answer, fresh.generate(turn, depth=depths[1], max_tokens=5))
    again = model.generate(turn, depth=depths[1] + 2, max_tokens=5)
    assert again.stats.n_cached == len(turn)


def close(one: Generation, other: Generation) -> None:
    np.testing.assert_allclose([t.logprob for t in one.tokens], [t.logprob for t in other.tokens], atol=ROUNDING)
    assert [t.id for t in one.tokens] == [t.id for t in other.tokens]


def test_a_shared_beginning_is_reused_in_whole_chunks(model: Model, fresh: Model, kind: str) -> None:
    model.generate(PROMPT, depth=4, max_tokens=3)
    other = [*PROMPT[:19], 5, 6, 7, 8]
    answer, expected = (m.generate(other, depth=5, max_tokens=5) for m in (model, fresh))
    assert answer.stats.n_cached == 16
    close(answer, expected)
    assert kind == "toy" or bits(answer) == bits(expected)  # the toy engine knows no chunks


@pytest.mark.parametrize("quant", [Quant.Q8_0, Quant.Q4_K, Quant.F16, Quant.F32])
def test_what_is_said_to_be_bit_for_bit_is_so_in_every_quant(tmp_path: Path, quant: Quant) -> None:
    """The same prompt, deeper; one that shares two chunks; beginnings, which share whole chunks or none."""
    config = replace(FAMILIES["retrofit_llama"], n_ctx=64, n_embd=256, n_head=4, n_head_kv=2, head_dim=64, n_ff=256)
    path = engines.write_model(tmp_path / "m.gguf", config, random_weights(config, seed=5), quant)
    asked = [(PROMPT, 3), (PROMPT, 5), ([*PROMPT[:17], 4], 6), (PROMPT[:9], 6), (PROMPT[:3], 6), (PROMPT[:1], 6)]
    with read(path) as file:
        kept, engine = (GgmlEngine(file, Limits(n_ctx=64, kv_depth=8, n_batch=8)) for _ in range(2))
    with Model(kept, PromptReader(None, config.n_vocab)) as model:
        for ids, depth in asked:
            with Model(engine, PromptReader(None, config.n_vocab)) as fresh:
                expected = bits(fresh.generate(ids, depth=depth, max_tokens=4))
            assert bits(model.generate(ids, depth=depth, max_tokens=4)) == expected
            with read(path) as file:
                engine = GgmlEngine(file, Limits(n_ctx=64, kv_depth=8, n_batch=8))


@pytest.mark.parametrize("quant", [Quant.Q8_0, Quant.Q4_K])
def test_the_next_turn_of_a_quantised_model_differs_by_rounding(tmp_path: Path, quant: Quant) -> None:
    config = replace(FAMILIES["retrofit_llama"], n_ctx=64, n_embd=256, n_head=4, n_head_kv=2, head_dim=64, n_ff=256)
    path = engines.write_model(tmp_path / "m.gguf", config, random_weights(config, seed=5), quant)
    with read(path) as file:
        both = [Model(GgmlEngine(file, Limits(n_ctx=64, kv_depth=8)), PromptReader(None, config.n_vocab)) for _ in "ab"]
    first = both[0].generate(PROMPT, depth=4, max_tokens=4)
    turn = [*PROMPT, *(token.id for token in first.tokens), 7, 8, 9]
    kept, fresh = (m.generate(turn, depth=4, max_tokens=1, top_logprobs=5) for m in both)
    assert kept.stats.n_cached == len(PROMPT) + 3
    expected = dict(fresh.tokens[0].top)
    assert all(abs(logprob - expected.get(i, logprob)) < QUANTISED for i, logprob in kept.tokens[0].top)
    for m in both:
        m.close()


def test_a_turn_whose_answer_is_spelt_otherwise_reuses_the_question(model: Model, fresh: Model) -> None:
    model.generate(PROMPT, depth=4, max_tokens=4)
    turn = [*PROMPT, 1, 2, 3]
    answer = model.generate(turn, depth=4, max_tokens=4)
    assert answer.stats.n_cached >= len(PROMPT)
    close(answer, fresh.generate(turn, depth=4, max_tokens=4))


def test_chunks_that_a_conversation_cut_in_pieces_are_not_whole(model: Model, fresh: Model, kind: str) -> None:
    turns = [PROMPT, [*PROMPT, 1, 2, 3], [*PROMPT, 1, 2, 3, 4, 4, 4, 4, 4, 4]]
    for turn in turns:
        model.generate(turn, depth=4, max_tokens=1)
    other = [*turns[-1][:26], 9]
    answer, expected = (m.generate(other, depth=4, max_tokens=4) for m in (model, fresh))
    assert answer.stats.n_cached == 16  # the chunk after it was read in two turns
    close(answer, expected)
    assert kind == "toy" or bits(answer) == bits(expected)


def test_a_stream_begun_after_its_model_is_closed_says_so(model: Model) -> None:
    model.generate(PROMPT, depth=2, max_tokens=2)
    stream = model.stream(PROMPT, depth=2)
    model.close()
    with pytest.raises(EngineError, match="closed"):
        next(stream)


def test_under_a_ring_only_the_same_prompt_is_reused(kind: str, tmp_path: Path) -> None:
    with load(kind, tmp_path, ring=2) as model:
        model.generate(PROMPT, depth=4, max_tokens=3)
        assert model.generate([*PROMPT, 1], depth=4, max_tokens=2).stats.n_cached == 0


def test_another_state_seed_starts_over(model: Model, fresh: Model) -> None:
    model.generate(PROMPT, depth=4, state_seed=1, max_tokens=3)
    answer = model.generate(PROMPT, depth=4, state_seed=2, max_tokens=4)
    assert answer.stats.n_cached == 0
    assert bits(answer) == bits(fresh.generate(PROMPT, depth=4, state_seed=2, max_tokens=4))
    assert model.generate(PROMPT, depth=5, state_seed=2, max_tokens=4).stats.n_cached == len(PROMPT)


def test_states_handed_from_token_to_token_are_not_reused(model: Model) -> None:
    warm = [model.generate(PROMPT, depth=2, warm_start=True, max_tokens=6) for _ in range(2)]
    assert bits(warm[0]) == bits(warm[1])
    assert warm[1].stats.n_cached == 0


def test_a_stream_closed_early_leaves_what_it_read(model: Model) -> None:
    stream = model.stream(PROMPT, depth=3)
    next(stream)
    next(stream)
    stream.close()
    assert model.generate(PROMPT, depth=3, max_tokens=2).stats.n_cached == len(PROMPT)


class _StopsAt:
    """An exit that stops at one pass and wants to see nothing."""

    needs: frozenset[str] = frozenset()

    def __init__(self, r: int) -> None:
        self.r = r

    def stop(self, r: int, seen: Seen) -> bool:
        return r >= self.r


class _Early:
    def __init__(self, r: int, floor: int) -> None:
        self.r, self.floor = r, floor

    def decide(self, query: Query) -> Decision:
        return Decision(floor=self.floor, ceiling=8, chosen_by="test", reason="early", exit=_StopsAt(self.r))


def test_an_exit_looks_at_every_pass_it_would_have_seen(model: Model) -> None:
    first = model.generate(PROMPT, depth=_Early(5, floor=3), max_tokens=2)
    assert [token.depth for token in first.tokens] == [5, 5]
    second = model.generate(PROMPT, depth=_Early(4, floor=3), max_tokens=2)
    assert [token.depth for token in second.tokens] == [4, 4]
    assert second.stats.n_cached == 0
    third = model.generate(PROMPT, depth=_Early(6, floor=5), max_tokens=2)
    assert [token.depth for token in third.tokens] == [6, 6]
    assert third.stats.n_cached == len(PROMPT)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    config = replace(FAMILIES["huginn"], n_ctx=64)
    made = engines.make("ggml", config, random_weights(config, seed=5), tmp_path_factory.mktemp("engine"), n_batch=4)
    yield made
    made.close()


Asked = tuple[list[int], int]
asked: st.SearchStrategy[list[Asked]] = st.lists(
    st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=14), st.integers(1, 5)), min_size=2, max_size=5
)


@settings(max_examples=40, deadline=None)
@given(asked)
def test_any_order_of_requests_gives_the_logits_of_a_fresh_cache(engine: Engine, requests: Sequence[Asked]) -> None:
    cache = PrefixCache(engine)
    for ids, depth in requests:
        decision = engines.fixed(depth)
        prefix = cache.take(tuple(ids), None, decision)
        logits, _ = prefix.begin(engine, ids, decision)
        prefix.extend(engine, 1, decision)
        cache.keep(prefix)
        kv = engine.open(depth)
        expected, _ = engines.forward(engine, kv, np.array(ids, np.int32), decision)
        kv.close()
        np.testing.assert_allclose(logits, expected[0], atol=ROUNDING)
    cache.clear()
