"""The model in the package keeps what the README says of it."""

from collections.abc import Sequence

import pytest

from localdepth.gguf import CheckStatus, read
from localdepth.loading import DEFAULT_MODEL, load
from localdepth_apps.curve import Curve, measure
from localdepth_train.families import FAMILIES
from localdepth_train.off_topic import REFUSAL
from localdepth_train.tasks import evaluation, is_right, overlap
from tests.conftest import ROOT

SEED = 20270101  # of questions nobody tuned on


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


def test_depth_pays_on_a_few_fresh_questions() -> None:
    check(curve((1, 4, 16, 64), per_cell=4), slack=0.02)


@pytest.mark.slow
def test_depth_pays_on_fresh_questions() -> None:
    check(curve((1, 2, 3, 4, 6, 8, 12, 16, 64), per_cell=50), slack=0.005)


def test_text_of_any_kind_is_answered_and_what_is_off_topic_refused() -> None:
    with load() as model:
        for text in ("What is the capital of France?", "Übermäßig 漢字 ☕️", "\x00\x07", "sum = 3 + 4", "a" * 40):
            assert model.generate(text).text == REFUSAL, text


def test_the_file_was_verified_and_says_where_it_comes_from() -> None:
    with read(ROOT / "localdepth" / "models" / DEFAULT_MODEL) as file:
        assert file.check is not None
        assert file.check.status is CheckStatus.VERIFIED
        assert {"source", "exporter", "quant", "license"} <= set(file.provenance)
        assert file.tokenizer is not None


def test_every_family_has_an_easy_and_a_hard_end() -> None:
    with load() as model:
        for family in FAMILIES:
            deep, shallow = (
                [model.generate(q.text, depth=d).text for q in evaluation(SEED, 6, [family], [8])] for d in (16, 1)
            )
            assert deep != shallow, family
