"""Schedules equal the published trainers'; the steps curriculum grows a family when it has mastered its longest."""

import itertools
import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localdepth_train.curriculum import Ramp, StepsCurriculum, backprop_depth_at, lr_multiplier, mean_depth_at

LR_ROUNDING = 1e-8  # the reference curve is stored with eight decimals


def run_lengths(values: list[int]) -> list[list[int]]:
    return [[value, len(list(group))] for value, group in itertools.groupby(values)]


def test_mean_depth_equals_the_published_schedules(fixtures: Path) -> None:
    record = json.loads((fixtures / "parity/training_refs/training_refs.json").read_text())
    for name, reference in record["curricula"].items():
        a = reference["args"]
        means = [
            mean_depth_at(step, a["max_steps"], a["max_rec"], Ramp(a["wtype"]), a["warmup"])
            for step in range(a["max_steps"])
        ]
        assert run_lengths(means) == reference["mean_recurrence_rle"], name
        assert sum(means) == reference["sum_mean_recurrence"], name
        growth = a.get("bp", {"max_backprop": 8, "start": 1, "warmup": 0.0})
        limits = growth["max_backprop"], growth["start"], growth["warmup"]
        backprop = [backprop_depth_at(step, a["max_steps"], mean, *limits) for step, mean in enumerate(means)]
        assert run_lengths(backprop) == reference["backprop_depth_rle"], name


def test_learning_rate_equals_the_published_schedules(fixtures: Path) -> None:
    record = json.loads((fixtures / "parity/training_refs/training_refs.json").read_text())
    for name, reference in record["lr_multiplier"].items():
        a = reference["args"]
        curve = [lr_multiplier(step, a["max_steps"], a["warm"], a["cool"]) for step in range(a["max_steps"])]
        assert curve == pytest.approx(reference["curve"], abs=LR_ROUNDING), name


@given(st.integers(1, 500), st.integers(1, 64), st.sampled_from(Ramp), st.floats(0, 1))
def test_mean_depth_never_falls_and_ends_at_the_mean(steps: int, mean: int, ramp: Ramp, share: float) -> None:
    means = [mean_depth_at(step, steps, mean, ramp, share) for step in range(steps + 1)]
    assert means == sorted(means)
    assert means[0] >= 1
    assert means[-1] == mean


@given(st.integers(2, 500), st.integers(1, 64), st.integers(1, 16), st.integers(1, 16), st.floats(0, 1))
def test_backprop_depth_grows_and_never_exceeds_the_mean(
    steps: int, mean: int, backprop: int, start: int, share: float
) -> None:
    start = min(start, backprop)
    depths = [backprop_depth_at(step, steps, mean, backprop, start, share) for step in range(steps - 1)]
    assert depths == sorted(depths)
    assert all(1 <= depth <= min(mean, backprop) for depth in depths)


@given(st.integers(1, 500), st.floats(0, 0.5), st.floats(0, 0.5))
def test_learning_rate_stays_between_floor_and_one(steps: int, warmup: float, cooldown: float) -> None:
    factors = [lr_multiplier(step, steps, warmup, cooldown) for step in range(steps)]
    assert all(1e-3 <= factor <= 1 for factor in factors)


def begun() -> StepsCurriculum:
    return StepsCurriculum.begin(["cup", "day"], start=2, max_steps=4, threshold=0.86, mastered_weight=0.35)


def answer(curriculum: StepsCurriculum, family: str, steps: int, depth: int, n: int = 400) -> None:
    for _ in range(n):
        curriculum.record(family, steps, depth, right=True)


def test_right_answers_at_the_level_raise_it() -> None:
    curriculum = begun()
    answer(curriculum, "cup", steps=2, depth=2)
    assert curriculum.levels == {"cup": 3, "day": 2}


@pytest.mark.parametrize(("steps", "depth"), [(1, 8), (2, 1)])
def test_shorter_questions_and_too_few_passes_do_not_count(steps: int, depth: int) -> None:
    curriculum = begun()
    answer(curriculum, "cup", steps, depth)
    assert curriculum.levels["cup"] == 2


def test_off_topic_answers_do_not_count() -> None:
    curriculum = begun()
    answer(curriculum, "off-topic", steps=0, depth=4)
    assert curriculum.levels == {"cup": 2, "day": 2}


def test_level_stops_at_the_top_and_the_family_is_then_drawn_less() -> None:
    curriculum = begun()
    for steps in (2, 3, 4):
        answer(curriculum, "cup", steps, depth=8)
    assert curriculum.levels["cup"] == 4
    assert curriculum.is_mastered("cup")
    rng = random.Random(0)
    drawn = [curriculum.draw(rng)[0] for _ in range(4000)]
    assert drawn.count("cup") / drawn.count("day") == pytest.approx(0.35 * 2 / 4, rel=0.15)


def test_a_family_at_twice_the_level_comes_half_as_often() -> None:
    curriculum = begun()
    answer(curriculum, "cup", steps=2, depth=8)
    answer(curriculum, "cup", steps=3, depth=8)
    rng = random.Random(0)
    drawn = [curriculum.draw(rng)[0] for _ in range(4000)]
    assert curriculum.levels == {"cup": 4, "day": 2}
    assert drawn.count("cup") / drawn.count("day") == pytest.approx(0.5, rel=0.15)


def test_draws_stay_within_the_level() -> None:
    curriculum, rng = begun(), random.Random(0)
    drawn = [curriculum.draw(rng) for _ in range(200)]
    assert {steps for _, steps in drawn} == {1, 2}


def test_state_is_restored() -> None:
    curriculum, other = begun(), begun()
    answer(curriculum, "cup", steps=2, depth=2)
    other.restore(curriculum.state())
    assert other == curriculum
