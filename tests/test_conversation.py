"""Conversations: what is kept, what is sent, what is taken back."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localdepth.conversation import Conversation, Exchange
from localdepth.engine.toy import random_weights
from localdepth.errors import ContextOverflow, DepthError, PromptError, RequestError
from localdepth.loading import inspect, load
from localdepth.model import Model
from localdepth.record import TokenizerRecord
from localdepth.sampling import Sampling
from tests import engines
from tests.conftest import tokenizer_json

NO_END = Sampling(logit_bias={1: float("-inf")})  # answers last until max_tokens


def exchange(question: str = "the cat", answer: str = "sat", depth: int = 4) -> Exchange:
    return Exchange(question=question, answer=answer, depth=depth, chosen_by="request", finish_reason="stop")


def say(conversation: Conversation, model: Model, question: str, depth: int = 2) -> Exchange:
    """Ask to the end; what the conversation took over."""
    with conversation.ask(model, question, depth=depth, sampling=NO_END, max_tokens=4) as reply:
        list(reply)
    assert reply.exchange is not None
    return reply.exchange


def test_the_next_turn_does_not_read_the_last_question_again(model: Model) -> None:
    conversation = Conversation()
    say(conversation, model, "the cat")
    with conversation.ask(model, "the rat", depth=2, sampling=NO_END, max_tokens=4) as reply:
        list(reply)
    assert reply.stats.n_cached >= len(model.tokenize("the cat"))
    with conversation.again(model, depth=4, sampling=NO_END, max_tokens=4) as reply:
        list(reply)
    assert reply.stats.n_cached == reply.stats.n_prompt


def test_an_answer_is_that_of_the_messages_before_it(model: Model) -> None:
    conversation = Conversation("on the mat")
    first, second = say(conversation, model, "the cat"), say(conversation, model, "the rat")
    assert conversation.exchanges == [first, second]
    messages = [
        {"role": "system", "content": "on the mat"},
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": first.answer},
        {"role": "user", "content": "the rat"},
    ]
    assert second.answer == model.generate(messages, depth=2, sampling=NO_END, max_tokens=4).text
    assert conversation.messages() == [*messages, {"role": "assistant", "content": second.answer}]
    assert (second.depth, second.chosen_by, second.finish_reason) == (2, "request", "length")


def test_a_file_without_template_continues_the_text(model_file: Path, tmp_path: Path) -> None:
    config = inspect(model_file)
    record = TokenizerRecord(tokenizer_json(), bos=0, eos=(1,), add_bos=True)
    engines.write_model(tmp_path / "m.gguf", config, random_weights(config, 3), tokenizer=record)
    with load(tmp_path / "m.gguf") as model:
        assert not model.has_chat_template
        conversation = Conversation()
        first, second = say(conversation, model, "the cat"), say(conversation, model, "the rat")
        text = f"the cat{first.answer}\n\nthe rat"
        assert second.answer == model.generate(text, depth=2, sampling=NO_END, max_tokens=4).text


def test_asking_again_replaces_the_last_answer(model: Model) -> None:
    conversation = Conversation()
    first, shallow = say(conversation, model, "the cat"), say(conversation, model, "the rat", depth=1)
    depth = conversation.deeper(model.config)
    assert depth == 2
    with conversation.again(model, depth=depth, sampling=NO_END, max_tokens=4) as reply:
        list(reply)
    assert conversation.exchanges == [first, reply.exchange]
    assert reply.exchange is not None
    assert (reply.exchange.question, reply.exchange.depth) == ("the rat", 2)
    assert reply.exchange != shallow


def test_deeper_doubles_up_to_the_models_maximum(model: Model) -> None:
    depths = [Conversation(exchanges=[exchange(depth=depth)]).deeper(model.config) for depth in (1, 6, 31, 33, 63)]
    assert depths == [2, 12, 62, 64, 64]
    with pytest.raises(DepthError, match="64"):
        Conversation(exchanges=[exchange(depth=64)]).deeper(model.config)


def test_a_stopped_answer_stays_with_what_was_said(model: Model) -> None:
    conversation = Conversation()
    with conversation.ask(model, "the cat", depth=2, sampling=NO_END, max_tokens=30) as reply:
        said = [next(reply).text for _ in range(8)]
    assert conversation.exchanges == [reply.exchange]
    assert reply.exchange is not None
    assert (reply.exchange.answer, reply.exchange.finish_reason) == ("".join(said), "interrupted")
    reply.close()
    assert len(conversation.exchanges) == 1
    say(conversation, model, "the rat")
    assert len(conversation.exchanges) == 2


def test_an_answer_stopped_before_a_word_leaves_no_trace(model: Model) -> None:
    conversation = Conversation()
    conversation.ask(model, "the cat", depth=2).close()
    assert conversation.exchanges == []


def test_a_stopped_second_answer_leaves_the_first(model: Model) -> None:
    conversation = Conversation()
    first = say(conversation, model, "the cat")
    with conversation.again(model, depth=9, sampling=NO_END) as reply:
        for _ in range(5):
            next(reply)
    assert conversation.exchanges == [first]
    assert reply.exchange is None


def test_an_answer_left_right_after_its_last_token_is_whole(model: Model) -> None:
    conversation = Conversation()
    with conversation.ask(model, "the cat", depth=1, sampling=NO_END, max_tokens=3) as reply:
        for _ in range(3):
            next(reply)
    assert conversation.exchanges[0].finish_reason == "length"


def test_what_the_context_cannot_hold_is_left_out_and_counted(model: Model) -> None:
    conversation = Conversation()
    counts = []
    for i in range(9):
        with conversation.ask(model, f"the rat {i}", depth=1, sampling=NO_END, max_tokens=4) as reply:
            list(reply)
        counts.append(reply.n_forgotten)
    assert counts == sorted(counts)
    assert counts[0] == 0 < counts[-1] < 9
    assert len(conversation.exchanges) == 9
    assert len(set(counts)) < 5, "half of the context is freed at a time"


def test_a_question_too_long_even_alone_is_refused_and_nothing_is_lost(model: Model) -> None:
    conversation = Conversation()
    first = say(conversation, model, "the cat")
    with pytest.raises(ContextOverflow, match="n_ctx=64"):
        conversation.ask(model, "abc " * 100)
    assert conversation.exchanges == [first]
    with conversation.ask(model, "the rat", max_tokens=1) as reply:
        assert reply.n_forgotten == 0


def test_undo_gives_the_question_back(model: Model) -> None:
    conversation = Conversation(exchanges=[exchange("a"), exchange("b")])
    assert conversation.undo().question == "b"
    assert conversation.undo().question == "a"
    with pytest.raises(RequestError, match="nothing has been asked"):
        conversation.undo()
    with pytest.raises(RequestError, match="nothing has been asked"):
        conversation.again(model)


@pytest.mark.parametrize("question", ["", " \n"])
def test_an_empty_question_is_refused(question: str, model: Model) -> None:
    with pytest.raises(PromptError, match="empty"):
        Conversation().ask(model, question)


text = st.text(st.characters(exclude_categories=["Cs"]))
exchanges = st.lists(st.builds(exchange, text, text, st.integers(1, 64)), max_size=3)


@given(text, exchanges)
def test_json_brings_the_conversation_back(system: str, said: list[Exchange]) -> None:
    conversation = Conversation(system, said)
    back = Conversation.from_json(conversation.to_json())
    assert (back.system, back.exchanges) == (system, said)


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "[]",
        "{}",
        '{"system": "", "exchanges": [{}]}',
        '{"system": "", "exchanges": 5}',
        '{"system": 5, "exchanges": []}',
        '{"system": "\\ud800", "exchanges": []}',
        "[" * 100_000,
        Conversation(exchanges=[exchange()]).to_json().replace('"depth": 4', '"depth": "4"'),
    ],
)
def test_text_that_is_no_conversation_is_refused(damage: str) -> None:
    with pytest.raises(RequestError, match="saved"):
        Conversation.from_json(damage)


def test_markdown_shows_questions_as_quotes_and_how_answers_ended() -> None:
    said = [exchange("one\ntwo", "**yes**"), replace(exchange(), finish_reason="interrupted")]
    shown = Conversation("Be brief.", said).to_markdown()
    assert shown.startswith("*Be brief.*\n\n> one\n> two\n\n**yes**\n\n*depth 4*\n")
    assert "*depth 4, interrupted*" in shown
