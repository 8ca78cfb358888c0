"""The model in the package keeps what the README says of it."""

import random
from collections.abc import Sequence

import pytest

from localdepth.gguf import read
from localdepth.loading import DEFAULT_MODEL, load
from localdepth.record import CheckStatus
from localdepth_apps.curve import Curve, measure
from localdepth_train.tasks import Split, evaluation, is_right, overlap
from localdepth_train.tasks.families import FAMILIES
from localdepth_train.tasks.near_miss import KINDS
from localdepth_train.tasks.off_topic import REFUSAL
from tests.conftest import ROOT

SEED = 20270101  # of questions nobody tuned on
STRANGE = (  # written by hand; nothing generated reads like them
    "A robot has three wheels. Two fall off. How many wheels does it have?",
    "The lift holds eight people. Five get out. Who is still inside?",
    "Today is my birthday. How old am I?",
    "The red cup is heavier than the blue cup. Which cup is lighter?",
    "The lamp is broken. Can it be on?",
    "Start a fire with two sticks. What do you need?",
    "The number is prime and less than 20. What is the number?",
    "The trip takes 3 days. It costs 40 euros a day. What does the trip cost?",
    "The robot faces a wall. Why does it stop?",
    "Who is the boss of the boss of Eve?",
    "Which month has 28 days?",
    "What is the last digit of pi?",
    "Tom is taller than Ann. Ann is taller than Ben. Who is the tallest?",
    "The piece on c4 is a knight. Which squares can it reach?",
    "On floor 3 there are 4 doors. On floor 5 there are 6. How many doors are there?",
    "If yesterday was Monday, what day is tomorrow?",
    "Turn left. Turn right.",
    "Swap red and blue.",
    "Double it.",
    "Monday",
)


def curve(depths: Sequence[int], per_cell: int) -> Curve:
    """Accuracy on fresh held-out questions of every family and 1 to 8 steps."""
    questions = evaluation(SEED, per_cell, steps=range(1, 9))
    assert overlap(questions, per_cell=200) == 0.0
    with load() as model:
        return measure(model, questions, depths, is_right)


def check(result: Curve, slack: float) -> None:
    """Depth pays: right when deep, wrong when shallow, more passes for more steps, nothing lost beyond."""
    accuracy = {depth: cell.accuracy for depth, cell in result.total.items()}
    assert accuracy[16] >= 0.97 - slack
    assert accuracy[1] <= 0.60 + slack
    assert accuracy[64] >= accuracy[16] - slack
    needed = [depth for depth in result.passes_to(0.9).values() if depth is not None]
    assert len(needed) == 8
    assert needed == sorted(needed)
    assert needed[-1] > needed[0]


def refused(texts: Sequence[str]) -> float:
    """Share of texts that get the refusal."""
    with load() as model:
        return sum(model.generate(text, depth=16).text == REFUSAL for text in texts) / len(texts)


def test_depth_pays_on_a_few_fresh_questions() -> None:
    check(curve((1, 4, 16, 64), per_cell=3), slack=0.02)


@pytest.mark.slow
def test_depth_pays_on_fresh_questions() -> None:
    check(curve((1, 2, 3, 4, 6, 8, 12, 16, 64), per_cell=50), slack=0.005)


def test_one_pass_is_not_enough_for_six_steps_in_most_families() -> None:
    with load() as model:
        shares = [
            measure(model, evaluation(SEED, 25, [family], [6]), [1], is_right).total[1].accuracy for family in FAMILIES
        ]
    assert sum(share <= 0.4 for share in shares) >= 4


def test_text_of_any_kind_is_answered_and_what_is_off_topic_refused() -> None:
    texts = ["What is the capital of France?", "Übermäßig 漢字 ☕️", "\x00\x07", "sum = 3 + 4", "a" * 40, "a" * 400]
    prose = (ROOT / "README.md").read_text(encoding="utf-8")
    texts += [prose[start : start + length] for start, length in ((0, 80), (500, 400), (6000, 1000))]
    assert refused(texts) == 1


def test_near_misses_are_refused() -> None:
    rng = random.Random(SEED)
    assert refused([KINDS[kind](rng, Split.HELD_OUT) for kind in KINDS for _ in range(10)]) >= 0.95


def test_puzzles_of_other_kinds_in_our_words_are_refused() -> None:
    assert refused(STRANGE) >= 0.95


def test_our_questions_are_not_refused() -> None:
    assert refused([question.text for question in evaluation(SEED, 12, steps=range(1, 9))]) <= 0.005


def test_the_file_was_verified_and_says_where_it_comes_from() -> None:
    with read(ROOT / "localdepth" / "models" / DEFAULT_MODEL) as file:
        assert file.check is not None
        assert file.check.status is CheckStatus.VERIFIED
        assert {"source", "exporter", "quant", "license"} <= set(file.provenance)
        assert file.tokenizer is not None


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_an_easy_end_and_all_but_two_a_hard_one(family: str) -> None:
    with load() as model:
        easy = measure(model, evaluation(SEED, 20, [family], [1]), [2], is_right).total[2]
        hard = measure(model, evaluation(SEED, 20, [family], [8]), [1, 16], is_right).total
    assert easy.accuracy >= 0.9
    assert hard[16].accuracy >= 0.9
    assert family in {"grid", "lamp"} or hard[1].accuracy <= 0.5
