"""Generated questions: an independent reader of their text agrees with their answers, and the split is a split."""

import calendar
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localdepth.errors import ConfigError
from localdepth_train.tasks import Question, Split, evaluation, is_right, overlap, questions, split
from localdepth_train.tasks.families import FAMILIES, WORLD, Family
from localdepth_train.tasks.names import is_held_out
from localdepth_train.tasks.near_miss import KINDS
from localdepth_train.tasks.off_topic import REFUSAL, off_topic

families = st.sampled_from(sorted(FAMILIES))
cells = {"family": families, "steps": st.integers(1, 10), "seed": st.integers(0, 1000)}

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = list(calendar.month_name)[1:]
CUPS = {"red", "blue", "green", "black"}
CLOCKWISE = ["north", "east", "south", "west"]


def whole(family: Family) -> str:
    """Pattern of a whole question: an opening, steps and a closing of one family."""
    steps = "|".join(sorted({re.escape(step.text) for step in family.steps}))
    framed = "|".join(f"{re.escape(opening)}({steps})+{re.escape(closing)}" for opening, closing in family.frames)
    starts = "|".join(sorted({family.told(state) for state in family.starts}))
    return framed.replace(r"\{who\}", r"(The \w+|the \w+|[A-Z]\w*)").replace(r"\{start\}", f"({starts})")


WHOLE = re.compile("|".join(map(whole, FAMILIES.values())))


def solve(text: str) -> str:
    """Answer a question by reading its sentences, without any of the generator's tables."""
    if relations := re.findall(r"'s (friend|boss|teacher|doctor)", text):
        person = re.findall(r"(?:Who is|Name|looking for) (\w+)'s", text)[0]
        for relation in relations:
            person = WORLD[person][relation]
        return f"It is {person}."
    opening, *middle = (sentence.split() for sentence in re.findall(r"[^.?]+(?=[.?])", text))
    steps = middle[:-1]
    if cups := [word for word in opening if word in CUPS]:
        [cup] = cups
        for step in steps:
            one, other = (word.lower() for word in step if word in CUPS)
            cup = {one: other, other: one}.get(cup, cup)
        return f"The coin is under the {cup} cup."
    if ways := [word for word in opening if word in CLOCKWISE]:
        [way] = ways
        for step in steps:
            way = turned(way, step)
        return f"It faces {way}."
    for wheel in (DAYS, MONTHS):
        if starts := [wheel.index(word) for word in opening if word in wheel]:
            moves = (number(step) * (-1 if {"back", "past"} & set(step) else 1) for step in steps)
            return f"It is {wheel[(starts[0] + sum(moves)) % len(wheel)]}."
    if "lamp" in opening:
        lit = opening[-1] == "on"
        for step in steps:
            lit = lamp_after(lit, " ".join(step))
        return f"The lamp is {'on' if lit else 'off'}."
    if "floor" in opening:
        moves = (number(step) * (-1 if {"down", "Sink"} & set(step) else 1) for step in steps)
        return f"It is floor {number(opening) + sum(moves)}."
    if square := re.findall(r"\b([a-e])([1-5])\.", text):
        file, rank = "abcde".index(square[0][0]), int(square[0][1])
        for _, way in steps:
            file, rank = file + {"left": -1, "right": 1}.get(way, 0), rank + {"up": 1, "down": -1}.get(way, 0)
        return f"It is on {'abcde'[file]}{rank}."
    total = number(opening)
    for step in steps:
        total = calculated(total, step)
    assert total >= 0
    return f"The last digit is {total % 10}."


def number(sentence: list[str]) -> int:
    """The one number in it."""
    [found] = (int(word) for word in sentence if word.isdigit())
    return found


def calculated(total: int, step: list[str]) -> int:
    if step[0] in {"Double", "Multiply", "Times"}:
        return 2 * total
    return total + number(step) * (-1 if step[0] in {"Take", "Minus", "Decrease"} else 1)


def lamp_after(lit: bool, step: str) -> bool:
    """What becomes of a lamp."""
    if step in {"Leave it alone", "Wait a minute"}:
        return lit
    if step in {"Flip the switch", "Press the switch", "Toggle it"}:
        return not lit
    return step in {"Switch it on", "Light it"}


def turned(way: str, step: list[str]) -> str:
    ways = [word for word in step if word in CLOCKWISE]
    if ways:
        one, other = ways
        return {one: other, other: one}.get(way, way)
    turn = {"left": -1, "right": 1, "around": 2, "twice": 2, "half": 2}
    [quarters] = (turn[word] for word in step if word in turn)
    return CLOCKWISE[(CLOCKWISE.index(way) + quarters) % 4]


def beginnings(question: Question) -> set[tuple[str, ...]]:
    first = FAMILIES[question.family].seen_steps + 1
    return {question.composition[:end] for end in range(first, question.steps + 1)}


@given(**cells, side=st.sampled_from(Split))
def test_an_independent_solver_agrees(family: str, steps: int, seed: int, side: Split) -> None:
    for question in questions(family, steps, 5, seed, side):
        assert solve(question.text) == question.answer
        assert question.steps == len(question.composition) == steps


@given(**cells)
def test_every_label_is_the_answer_so_far(family: str, steps: int, seed: int) -> None:
    template = FAMILIES[family].answer
    for question in questions(family, steps, 5, seed, Split.TRAIN):
        assert len(question.labels) == steps + 1
        for end, value in question.labels[1:]:
            assert solve(question.text[:end] + question.text[question.labels[-1][0] :]) == template.format(value)


@given(**cells, side=st.sampled_from(Split))
def test_the_same_arguments_give_the_same_questions(family: str, steps: int, seed: int, side: Split) -> None:
    assert questions(family, steps, 5, seed, side) == questions(family, steps, 5, seed, side)


@given(**cells)
def test_training_never_shows_a_held_out_composition_or_a_beginning_of_one(family: str, steps: int, seed: int) -> None:
    for question in questions(family, steps, 10, seed, Split.TRAIN):
        assert all(split(family, beginning) is Split.TRAIN for beginning in beginnings(question))


@given(**cells)
def test_held_out_questions_are_held_out(family: str, steps: int, seed: int) -> None:
    for question in questions(family, steps, 10, seed, Split.HELD_OUT):
        assert not question.is_split or split(family, question.composition) is Split.HELD_OUT


def test_a_longer_form_of_a_held_out_composition_is_held_out() -> None:
    held_out = questions("cup", 3, 20, 0, Split.HELD_OUT)
    assert all(split("cup", (*q.composition, "red-blue")) is Split.HELD_OUT for q in held_out)


def test_the_split_never_moves() -> None:
    sides = [split("hop", (a, b, "boss")) for a in ("friend", "doctor") for b in ("boss", "teacher", "friend")]
    assert [i for i, side in enumerate(sides) if side is Split.HELD_OUT] == [2]


def test_about_one_fifth_of_the_shortest_compositions_is_held_out() -> None:
    names = sorted({step.key for step in FAMILIES["month"].steps})
    sides = [split("month", (a, b)) for a in names for b in names]
    assert sides.count(Split.HELD_OUT) / len(sides) == pytest.approx(0.2, abs=0.06)


def test_measured_overlap_of_the_split_cells_is_zero() -> None:
    held_out = evaluation(seed=7, per_cell=50)
    assert overlap(held_out, per_cell=300) == 0.0


def test_overlap_counts_what_training_shows() -> None:
    shown = questions("turn", 3, 50, 0, Split.TRAIN)
    assert overlap(shown, per_cell=1000) > 0.9


def test_evaluation_has_every_cell_and_flags_extrapolation() -> None:
    drawn = evaluation(seed=3, per_cell=4)
    assert {(q.family, q.steps) for q in drawn} == {(f, n) for f in FAMILIES for n in range(1, 11)}
    assert len(drawn) == 4 * 10 * len(FAMILIES)
    assert {q.steps for q in drawn if q.is_extrapolation} == {9, 10}


@pytest.mark.parametrize(("family", "steps"), [("chess", 3), ("cup", 0)])
def test_impossible_cells_are_refused(family: str, steps: int) -> None:
    with pytest.raises(ConfigError):
        questions(family, steps, 1, 0, Split.TRAIN)


def test_only_the_whole_answer_is_right() -> None:
    (question,) = questions("lift", 2, 1, 0, Split.TRAIN)
    assert is_right(question, f" {question.answer}\n")
    assert not is_right(question, question.answer + question.answer)
    assert not is_right(question, question.answer.removesuffix("."))


@given(family=families.filter(lambda name: name != "hop"), steps=st.integers(1, 8), seed=st.integers(0, 1000))
def test_names_of_held_out_questions_are_never_trained(family: str, steps: int, seed: int) -> None:
    own = words(*(part for frame in FAMILIES[family].frames for part in frame))
    own |= words(*(step.text for step in FAMILIES[family].steps), FAMILIES[family].subject.capitalize())
    own |= words(*(FAMILIES[family].told(state) for state in FAMILIES[family].starts))
    for side in Split:
        asked = words(*(question.text for question in questions(family, steps, 10, seed, side)))
        names = {word for word in asked - own if word[0].isupper()}
        assert all(is_held_out(name) is (side is Split.HELD_OUT) for name in names)


def words(*texts: str) -> set[str]:
    return set(re.findall(r"\w+", " ".join(texts)))


def test_off_topic_text_is_refused_and_is_no_question_of_ours() -> None:
    strays = off_topic(2000, seed=0)
    assert all(q.answer == REFUSAL for q in strays)
    asked = {q.text for family in FAMILIES for n in (1, 2, 3) for q in questions(family, n, 200, 0, Split.TRAIN)}
    assert not asked & {q.text for q in strays}
    assert strays == off_topic(2000, seed=0)
    assert max(len(q.text) for q in strays) > 1000


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", Split)
def test_a_near_miss_cannot_be_answered(kind: str, side: Split) -> None:
    rng = random.Random(kind)
    for _ in range(300):
        text = KINDS[kind](rng, side)
        assert not WHOLE.fullmatch(text), text
