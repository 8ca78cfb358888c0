"""What the logs of training runs say: read, averaged over seeds, printed and drawn."""

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localdepth.errors import StorageError, TrainError
from localdepth_train.figures import draw, lines_with_intervals, looks_for, points_by_depth, sheet
from localdepth_train.intervals import Interval, average, interval, smooth, t_quantile
from localdepth_train.report import Group, as_groups, common_axis, read_run, read_runs, summarise

Record = dict[str, Any]


def step_record(step: int, **changes: Any) -> Record:
    record = {
        "step": step,
        "phase": "heal",
        "loss": 4.0 / step,
        "tokens": 100 * step,
        "flops": 1e12 * step,
        "depths": {"2": 1, "5": 3},
        "mean_depth": 3,
        "expected_depth": 4,
        "backprop_depth": 2,
        "lr": 1.0,
        "gradient_norm": 0.5,
        "tokens_per_second": 50.0,
        "seconds": 2.0 * step,
        "cpu_seconds": 4.0 * step,
    }
    return {key: value for key, value in (record | changes).items() if value is not ...}


def evaluation_record(step: int, seed: int = 0, **metrics: Any) -> Record:
    metrics = metrics or {
        "loss": {"1": 3.0 + 0.1 * seed, "4": 2.0 + 0.1 * seed, "16": 1.0},
        "accuracy": {"1": 0.25, "4": 0.5},
        "cells": {"sum": {"2": {"1": 0.25}}},
    }
    record = {"step": step, "phase": "heal", "tokens": 100 * step, "flops": 1e12 * step, "seconds": 2.0 * step}
    return record | {"evaluation": metrics}


def write_run(folder: Path, records: Iterable[Record], end: str = "") -> Path:
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records) + end)
    return folder


def a_run(folder: Path, *, seed: int = 0, steps: int = 10, **changes: Any) -> Path:
    records = [step_record(step, loss=4.0 / step + 0.1 * seed, **changes) for step in range(1, steps + 1)]
    half = steps // 2
    return write_run(
        folder, [*records[:half], evaluation_record(half, seed), *records[half:], evaluation_record(steps, seed)]
    )


def seeds(folder: Path, name: str = "looped") -> list[Path]:
    return [a_run(folder / f"{name}-seed{k}", seed=k) for k in range(3)]


def report(*arguments: object, program: str = "from localdepth.cli import main; main()") -> Any:
    words = [sys.executable, "-c", program, "train", "report", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, encoding="utf-8")


def test_a_run_is_what_its_log_says(tmp_path: Path) -> None:
    run = read_run(a_run(tmp_path / "run", steps=3))
    np.testing.assert_allclose(run.loss, [4.0, 2.0, 4.0 / 3])
    np.testing.assert_array_equal(run.at["flops"], [1e12, 2e12, 3e12])
    np.testing.assert_array_equal(run.at["tokens"], [100, 200, 300])
    assert (run.name, run.seconds, run.drawn, run.phases) == ("run", 6.0, {2: 3, 5: 9}, (("heal", 0),))
    assert run.evaluated["accuracy"].last() == {1: 0.25, 4: 0.5}
    assert run.evaluated["loss"].values.shape == (2, 3)


def test_evaluations_may_measure_different_things(tmp_path: Path) -> None:
    evaluations = [evaluation_record(1, loss={"1": 3.0, "2": 2.0}), evaluation_record(2, accuracy={"8": 1})]
    run = read_run(write_run(tmp_path / "run", [step_record(1), *evaluations, evaluation_record(3, loss={"2": 1.5})]))
    assert run.evaluated["accuracy"].depths == (8,)
    assert run.evaluated["loss"].last() == {2: 1.5}
    at, values = run.evaluated["loss"].series("step", 1)
    assert (at.tolist(), values.tolist()) == ([1.0], [3.0])


def test_an_evaluation_that_diverged_at_a_depth_leaves_a_gap(tmp_path: Path) -> None:
    evaluations = [evaluation_record(1, loss={"1": 3.0, "64": float("nan")}), evaluation_record(2, accuracy={})]
    run = read_run(write_run(tmp_path / "run", [step_record(1), *evaluations]))
    assert run.evaluated["loss"].last() == {1: 3.0}
    assert "accuracy" not in run.evaluated
    draw(as_groups([run]), tmp_path / "figure.png")


def test_the_time_of_a_run_is_the_last_its_log_tells(tmp_path: Path) -> None:
    records = [step_record(1), evaluation_record(1) | {"seconds": 3.5}, {"event": "stopped"}]
    assert read_run(write_run(tmp_path / "run", records)).seconds == 3.5


def test_a_torn_last_line_is_no_part_of_the_log(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [step_record(1), step_record(2)], end='{"step": 3, "loss": "\xe4')
    assert read_run(folder).at["step"].tolist() == [1.0, 2.0]


def test_unknown_records_and_keys_are_ignored(tmp_path: Path) -> None:
    records = [{"event": "begun"}, step_record(1, news={"x": float("inf")}), {"step": 1, "accuracy": {"1": 0.5}}]
    run = read_run(write_run(tmp_path / "run", records))
    assert (run.at["step"].tolist(), dict(run.evaluated)) == ([1.0], {})


def test_phases_are_found_where_they_begin(tmp_path: Path) -> None:
    records = [step_record(i, phase="heal" if i < 3 else "target") for i in range(1, 5)]
    assert read_run(write_run(tmp_path / "run", records)).phases == (("heal", 0), ("target", 2))


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "holds no training step"),
        ([evaluation_record(1)], "holds no training step"),
        ([[1, 2]], r"log\.jsonl, line 1 is b'\[1, 2\]'"),
        ([step_record(1, loss=float("nan"))], "loss=nan must be a finite number"),
        ([step_record(1, loss="low")], "loss='low' must be"),
        ([step_record(1, tokens=True)], "tokens=True must be"),
        ([step_record(1, flops=10**400)], "flops=1000"),
        ([{"loss": 1.0}], "step=None must be"),
        ([step_record(2), step_record(1)], "line 2: step 1 follows 2"),
        ([step_record(1), step_record(1)], "line 2: step 1 follows 1"),
        ([step_record(1), step_record(2, flops=0)], "line 2: flops 0 follows 1e"),
        ([step_record(1, depths={"0": 3})], "depths as keys"),
        ([step_record(1, depths=[4])], "depths as keys"),
        ([step_record(1), {"step": 1, "evaluation": 0.5}], "evaluation=0.5 must be an object"),
        ([step_record(1), evaluation_record(1, loss={"4": None})], "depth 4=None must be"),
    ],
)
def test_a_log_that_makes_no_sense_is_refused(records: list[Record], message: str, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=message):
        read_run(write_run(tmp_path / "run", records))


def test_a_line_that_is_no_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="line 2 is no JSON"):
        read_run(write_run(tmp_path / "run", [step_record(1)], end="\x00\x00\n"))


def test_a_folder_without_a_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="does not exist"):
        read_run(tmp_path)
    with pytest.raises(TrainError, match="does not exist"):
        read_run(tmp_path / "nowhere")
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(StorageError, match="cannot read"):
        read_run(tmp_path)


def test_runs_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    folders = [a_run(tmp_path / name) for name in ("a/seed0", "a/seed1", "b/seed0")]
    assert [run.name for run in read_runs(folders)] == ["a/seed0", "a/seed1", "b/seed0"]
    assert [run.name for run in read_runs(folders[:2])] == ["seed0", "seed1"]
    assert [run.name for run in read_runs(folders[:1])] == ["seed0"]
    with pytest.raises(TrainError, match="given twice"):
        read_runs([folders[0], tmp_path / "a" / ".." / "a" / "seed0"])


def test_runs_that_differ_in_their_seed_are_a_group(tmp_path: Path) -> None:
    names = ("a-seed0", "b/seed1", "a-seed12", "c", "b/seed2", "a-seed0-long")
    groups = as_groups(read_runs([a_run(tmp_path / name) for name in names]), by_seed=True)
    assert [(group.name, [run.name for run in group.runs]) for group in groups] == [
        ("a", ["a-seed0", "a-seed12"]),
        ("b", ["b/seed1", "b/seed2"]),
        ("c", ["c"]),
        ("a-seed0-long", ["a-seed0-long"]),
    ]
    alone = as_groups(read_runs([tmp_path / "a-seed0", tmp_path / "c"]))
    assert [group.name for group in alone] == ["a-seed0", "c"]


@pytest.mark.parametrize(
    ("df", "known"), [(1, 12.7062), (2, 4.3027), (10, 2.2281), (11, 2.2010), (20, 2.0860), (120, 1.9799)]
)
def test_t_quantiles_equal_the_tables(df: int, known: float) -> None:
    assert t_quantile(df) == pytest.approx(known, abs=2e-4)


def test_an_interval_is_students() -> None:
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.30265 / 3**0.5))
    mean, half_width = interval([5.0])
    assert mean == 5.0
    assert np.isnan(half_width)


def test_runs_are_averaged_where_all_have_been() -> None:
    curve = average([(np.array([0.0, 2.0, 4.0]), np.array([0.0, 2.0, 4.0])), (np.array([1.0, 3.0]), np.ones(2))])
    np.testing.assert_array_equal(curve.x, [1.0, 2.0, 3.0])
    np.testing.assert_array_equal(curve.mean, [1.0, 1.5, 2.0])
    assert (curve.half_width[0], curve.half_width[2] > curve.half_width[1] > 0) == (0.0, True)


def test_runs_that_never_meet_have_no_mean() -> None:
    with pytest.raises(TrainError, match="report them apart"):
        average([(np.array([0.0, 1.0]), np.zeros(2)), (np.array([2.0, 3.0]), np.zeros(2))])


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300))
def test_smoothing_keeps_length_and_range(values: list[float]) -> None:
    smoothed = smooth(np.array(values), share=0.1)
    assert len(smoothed) == len(values)
    assert min(values) - 1e-6 <= smoothed.min() <= smoothed.max() <= max(values) + 1e-6


def test_a_summary_has_the_numbers_of_the_log(tmp_path: Path) -> None:
    [summary] = summarise(as_groups(read_runs([a_run(tmp_path / "run")])))
    numbers = {name: found.mean for name, found in summary.numbers.items()}
    assert numbers == pytest.approx(
        {
            "steps": 10,
            "tokens": 1000,
            "flops": 1e13,
            "loss": 0.4,
            "best_loss": 0.4,
            "mean_depth": 17 / 4,
            "tokens_per_second": 50,
            "seconds": 20,
        }
    )
    assert {depth: found.mean for depth, found in summary.by_depth["loss"].items()} == {1: 3.0, 4: 2.0, 16: 1.0}


def test_a_summary_over_seeds_has_intervals(tmp_path: Path) -> None:
    folders = [*seeds(tmp_path), write_run(tmp_path / "other", [step_record(1), evaluation_record(1, loss={"2": 1.0})])]
    looped, other = summarise(as_groups(read_runs(folders), by_seed=True))
    assert looped.by_depth["loss"][4] == pytest.approx(interval([2.0, 2.1, 2.2]))
    assert looped.numbers["loss"] == pytest.approx(interval([0.4, 0.5, 0.6]))
    assert looped.to_dict()["half_widths"]["loss_by_depth"]["16"] == 0.0
    assert np.isnan(other.to_dict()["half_widths"]["loss"])


def test_a_group_has_only_the_depths_that_all_its_runs_measured(tmp_path: Path) -> None:
    measured: list[Record] = [{"loss": {"1": 1.0, "2": 1.0}}, {"loss": {"2": 3.0, "4": 1.0}, "accuracy": {"1": 1.0}}]
    folders = [
        write_run(tmp_path / f"r-seed{k}", [step_record(1), evaluation_record(1, **found)])
        for k, found in enumerate(measured)
    ]
    [summary] = summarise(as_groups(read_runs(folders), by_seed=True))
    assert {metric: set(cells) for metric, cells in summary.by_depth.items()} == {"loss": {2}}


def test_an_older_log_is_counted_in_steps(tmp_path: Path) -> None:
    old = [{"step": step, "loss": 1.0 / step, "seconds": 1.0 * step} for step in (50, 100)]
    folders = [write_run(tmp_path / "old", old), a_run(tmp_path / "new")]
    runs = read_runs(folders)
    assert (common_axis(runs), common_axis(runs[1:])) == ("step", "flops")
    draw(as_groups(runs), tmp_path / "both.png")
    draw(as_groups(runs[:1]), tmp_path / "old.png")
    assert np.isnan(summarise(as_groups(runs))[0].numbers["flops"].mean)


@pytest.mark.parametrize(("ending", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_a_figure_is_drawn_in_each_format_and_twice_the_same(ending: str, magic: bytes, tmp_path: Path) -> None:
    groups = as_groups(read_runs([*seeds(tmp_path), a_run(tmp_path / "plain")]), by_seed=True)
    first, again = tmp_path / f"a.{ending}", tmp_path / f"b.{ending}"
    draw(groups, first)
    draw(groups, again)
    assert first.read_bytes().startswith(magic)
    assert first.read_bytes() == again.read_bytes()


def words_of(figure: Path) -> set[str]:
    """The texts of an SVG, which stand as comments beside their outlines."""
    return {line.strip()[5:-4] for line in figure.read_text().splitlines() if line.strip().startswith("<!-- ")}


def test_a_figure_says_what_it_shows(tmp_path: Path) -> None:
    changes = {"phase": "target"}
    records = [step_record(i, **(changes if i > 5 else {})) for i in range(1, 11)]
    one = write_run(tmp_path / "one", [*records, evaluation_record(10)])
    draw(as_groups(read_runs([one])), tmp_path / "one.svg")
    titles = {"Training loss", "Depths drawn", "Evaluation loss", "Last evaluation: accuracy by depth"}
    assert titles | {"one", " target", "expected mean", "FLOPs (10¹²)"} <= words_of(tmp_path / "one.svg")
    draw(as_groups(read_runs([*seeds(tmp_path), one]), by_seed=True), tmp_path / "seeds.svg")
    assert {"looped (3 seeds)", "one", "95 % t interval over seeds"} <= words_of(tmp_path / "seeds.svg")


def test_names_that_matplotlib_takes_for_something_else_are_shown(tmp_path: Path) -> None:
    names = ("_hidden", "a$b_$c", "$x^$")
    draw(as_groups(read_runs([a_run(tmp_path / name) for name in names])), tmp_path / "names.svg")
    assert {" _hidden", "a$b_$c", "$x^$"} <= words_of(tmp_path / "names.svg")


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_a_name_in_a_script_the_font_lacks_is_no_reason_to_warn(ending: str, tmp_path: Path) -> None:
    draw(as_groups(read_runs([a_run(tmp_path / "七 rats 🐀")])), tmp_path / f"figure.{ending}")


@pytest.mark.parametrize(
    "changes",
    [
        {"depths": ...},
        {"depths": {"3": 0}},
        {"expected_depth": ...},
        {"tokens_per_second": ...},
        {"flops": ..., "tokens": ...},
    ],
)
def test_a_run_is_drawn_without_what_its_log_leaves_out(changes: Record, tmp_path: Path) -> None:
    draw(as_groups(read_runs([a_run(tmp_path / "run", **changes)])), tmp_path / "figure.png")


def test_a_run_of_one_step_is_drawn(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [step_record(1), evaluation_record(1, loss={"1": 2.0})])
    draw(as_groups(read_runs([folder])), tmp_path / "figure.png")


def test_many_runs_have_looks_of_their_own() -> None:
    assert len(set(looks_for(map(str, range(18))).values())) == 18


def test_a_sheet_of_ones_own_has_lines_and_points(tmp_path: Path) -> None:
    looks = looks_for(["retrofit", "plain"])
    x = np.linspace(0, 1e15, 20)
    with sheet(tmp_path / "own.svg", [["lines", "points"]]) as axes:
        lines_with_intervals(axes["lines"], {"plain": average([(x, x), (x, 2 * x)])}, looks)
        points_by_depth(axes["points"], {"retrofit": {1: Interval(0.5, 0.1), 8: Interval(0.9, 0.05)}}, looks)
    assert {"retrofit", "plain", "depth", "95 % t interval over seeds"} <= words_of(tmp_path / "own.svg")


def test_a_figure_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    groups: list[Group] = as_groups(read_runs([a_run(tmp_path / "run")]))
    with pytest.raises(TrainError, match=r"figure\.jpg must end in one of \.png, \.svg, \.pdf"):
        draw(groups, tmp_path / "figure.jpg")
    with pytest.raises(StorageError, match="nowhere"):
        draw(groups, tmp_path / "nowhere" / "figure.png")


def test_the_command_prints_a_table_and_draws_into_the_run(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "run")
    done = report(folder)
    assert done.returncode == 0, done.stderr
    rows = {line[:20].strip(): line[20:].strip() for line in done.stdout.splitlines()}
    assert rows["accuracy at depth 4"] == "50.0 %"
    assert (rows["tokens"], rows["wall time"], rows["mean depth drawn"]) == ("1,000", "0 min 20 s", "4.25")
    assert str(folder / "report.png") in done.stderr
    assert (folder / "report.png").stat().st_size > 10_000


def test_the_command_averages_over_seeds_and_speaks_json(tmp_path: Path) -> None:
    folders, figure = [*seeds(tmp_path), a_run(tmp_path / "plain")], tmp_path / "figure.pdf"
    done = report(*folders, "--group-seeds", "-o", figure)
    assert "2.1000 ± 0.2484" in done.stdout
    assert "looped 3, plain 1" in done.stdout
    record = json.loads(report(*folders, "--group-seeds", "-o", figure, "--json").stdout)
    looped, plain = record["runs"]
    assert (record["figure"], looped["runs"]) == (str(figure), [folder.name for folder in folders[:3]])
    assert looped["half_widths"]["loss_by_depth"]["4"] == pytest.approx(0.24841, abs=1e-4)
    assert plain["half_widths"]["loss"] is None


def test_several_runs_without_a_place_for_the_figure_get_a_table(tmp_path: Path) -> None:
    done = report(*seeds(tmp_path))
    assert (done.returncode, "give -o" in done.stderr) == (0, True)
    assert not list(tmp_path.rglob("report.png"))


def test_the_command_refuses_what_it_cannot_read_or_draw(tmp_path: Path) -> None:
    done = report(tmp_path, "--json")
    assert (done.returncode, json.loads(done.stdout)["error"]["type"]) == (2, "TrainError")
    done = report(a_run(tmp_path / "run"), "-o", tmp_path / "figure.gif")
    assert (done.returncode, done.stdout, "figure.gif must end in" in done.stderr) == (2, "", True)


@pytest.mark.parametrize(("package", "code"), [("torch", 0), ("matplotlib", 2)])
def test_the_command_needs_matplotlib_but_no_torch(package: str, code: int, tmp_path: Path) -> None:
    program = f"import sys; sys.modules[{package!r}] = None; from localdepth.cli import main; main()"
    done = report(a_run(tmp_path / "run"), program=program)
    assert done.returncode == code, done.stderr
    assert ('pip install "localdepth[train]"' in done.stderr) == (code == 2)
