"""``Model.batch``: answers as they are done, and no answer lost to another prompt's failure."""

from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

import pytest

from localdepth.errors import BatchError, ContextOverflow, EngineError, PromptError, RequestError
from localdepth.loading import load
from localdepth.model import Model
from localdepth.policy.base import Decision, Query
from localdepth.prompt import Prompt
from localdepth.sampling import Sampling


def test_answers_are_those_of_the_prompts_alone(model: Model) -> None:
    prompts: list[Prompt] = ["the cat", [0, 2, 9, 3], [{"role": "user", "content": "the rat"}]]
    sampling = Sampling(temperature=1.0, seed=7)
    answers = list(model.batch(prompts, depth=3, sampling=sampling, max_tokens=5, top_logprobs=1))
    assert [answer.index for answer in answers] == [0, 1, 2]
    for prompt, answer in zip(prompts, answers, strict=True):
        alone = model.generate(prompt, depth=3, sampling=sampling, max_tokens=5, top_logprobs=1)
        assert [token.id for token in answer.tokens] == [token.id for token in alone.tokens]
        assert len(answer.tokens[0].top) == 1


def test_prompts_are_taken_as_answers_are_asked_for(model: Model) -> None:
    taken: list[int] = []

    def endless() -> Iterator[str]:
        for i in count():
            taken.append(i)
            yield f"the cat {i}"

    answers = model.batch(endless(), depth=1, max_tokens=2)
    assert taken == []
    assert [answer.index for answer in islice(answers, 3)] == [0, 1, 2]
    assert taken == [0, 1, 2]


def test_refused_prompts_are_told_together_after_all_answers(model: Model) -> None:
    answers = model.batch(["the cat", "", "the rat", [5] * 64], depth=1, max_tokens=2)
    assert [answer.index for answer in islice(answers, 2)] == [0, 2]
    with pytest.raises(BatchError, match=r"2 of the prompts .* prompt 1 the first \(PromptError") as caught:
        next(answers)
    assert {i: type(error) for i, error in caught.value.errors.items()} == {1: PromptError, 3: ContextOverflow}
    assert isinstance(caught.value, RequestError)


def test_settings_no_prompt_could_have_are_refused_at_once(model: Model) -> None:
    for settings in ({"depth": 65}, {"depth": None}, {"max_tokens": 0}, {"stop": "x"}, {"sampling": 1}):
        with pytest.raises(RequestError):
            model.batch(["the cat"], **settings)  # type: ignore[arg-type]  # wrong on purpose
    for prompts in ("the cat", 5):
        with pytest.raises(PromptError, match="list"):
            model.batch(prompts)  # type: ignore[arg-type]  # wrong on purpose


def test_a_policy_is_asked_once_for_each_prompt(model: Model) -> None:
    seen: list[str] = []

    class Shallow:
        def decide(self, query: Query) -> Decision:
            seen.append(query.text)
            return Decision(floor=1, ceiling=1, chosen_by="test", reason="")

    list(model.batch(["the cat", "the rat"], depth=Shallow(), max_tokens=1))
    assert seen == ["the cat", "the rat"]


def test_a_machine_that_fails_and_a_source_that_fails_are_told_at_once(model_file: Path) -> None:
    def source() -> Iterator[str]:
        yield "the cat"
        raise ValueError("the file ended")

    with load(model_file) as model:
        answers = model.batch(source(), depth=1, max_tokens=1)
        assert next(answers).index == 0
        with pytest.raises(ValueError, match="the file ended"):
            next(answers)
        later = model.batch(["the cat", "the rat"], depth=1, max_tokens=1)
        next(later)
    with pytest.raises(EngineError, match="closed"):
        next(later)


def test_an_empty_batch_has_no_answers(model: Model) -> None:
    assert list(model.batch([])) == []
